"""`sample.py features=...`: files of features in the place of prompts."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from small_system import CONFIGS
from test_sample_cli import run_sample

from foley.cli.sampling import open_requested, requested_clips
from foley.core.config import PROJECT_ROOT
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.models.text import FeatureError
from foley.system.system import build_system, save_system

TEXT = {"_target_": "foley.models.text.FeatureConditioner", "feature_dim": 5, "dim": 16, "max_length": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for name in ("a", "b"):
        save_file({"features": torch.randn(4, 5)}, folder / f"{name}.safetensors")
    save_system(build_system({**CONFIGS, "text": TEXT}), folder / "video")
    save_system(build_system(CONFIGS), folder / "text")
    return folder


@pytest.mark.slow
def test_a_folder_of_features_becomes_a_folder_of_clips(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["steps=2", "duration_seconds=0.3", "num=2", f"output_dir={out}", "device=cpu"]
    done = run_sample(f"features={folder}", f"system={folder / 'video'}", *options)
    assert done.returncode == 0, done.stderr
    prompts = [json.loads(file.read_text(encoding="utf-8"))["prompt"] for file in sorted(out.glob("*.json"))]
    assert [Path(prompt).stem for prompt in prompts] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["features={0}/a.safetensors", "prompt=rain", "system={0}/video"], "give one of the three"),
        (["features={0}/none.safetensors", "system={0}/video"], "is neither a .safetensors file nor a folder"),
        (["features={0}/a.safetensors", "system={0}/text"], "takes captions, not features"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, arguments: list[str], message: str) -> None:
    overrides = ["output_dir=x", "device=cpu", *(argument.format(folder) for argument in arguments)]
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        cfg = compose("sample", overrides)
    with pytest.raises(ValueError, match=message):
        _ = requested_clips(cfg), open_requested(cfg, GenerationSettings())


def test_a_caption_is_no_features(folder: Path) -> None:
    with pytest.raises(FeatureError, match="no directory of features is given"):
        TextToAudio.load(folder / "video").generate(["rain"], 0.3, num_steps=1)
