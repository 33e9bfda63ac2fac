"""Caching a denoiser that attends to features of video: from experiment=video_to_audio to a cached clip."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compose_command, run_command
from hydra.utils import instantiate
from safetensors.torch import save_file
from stirring_parts import stir
from torch import nn

from foley.accel.layers import find_cacheable_layers
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import save_system, untrained_system

STEPS, SOLVER = 6, "euler_flow"  # what the flow of this experiment is sampled with
SMALL = ("codec=tiny", "text.dim=16", "model.width=32", "model.depth=2", "model.num_heads=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment's system in small, with features of two clips, calibrated on them."""
    folder = tmp_path_factory.mktemp("video")
    for name in ("a", "b"):
        save_file({"features": torch.randn(4, 512)}, folder / f"{name}.safetensors")
    torch.manual_seed(0)
    cfg = compose_command("train", "experiment=video_to_audio", f"text.directory={folder}", "data.cache_dir=x", *SMALL)
    system = untrained_system(cfg)
    stir(system.modules["denoiser"])  # layers that start at zero would have nothing to cache
    save_system(system, folder / "system")
    (folder / "clips.txt").write_text("a\nb\n")
    options = [f"steps={STEPS}", "duration_seconds=0.3", "guidance_scale=3", f"solver={SOLVER}", "device=cpu"]
    run_command("script/calibrate", f"system={folder}/system", f"prompts={folder}/clips.txt", *options)
    return folder


def _generate(folder: Path, policy: str = "none", *overrides: str) -> tuple[torch.Tensor, dict[str, Any], list[int]]:
    """The audio of both clips, its settings, and how often each cacheable layer ran."""
    pipeline = TextToAudio.load(folder / "system")
    accelerator = instantiate(compose_command("sample", f"system={folder}/system", f"accel={policy}", *overrides).accel)
    layers = find_cacheable_layers(pipeline.denoiser)
    calls = [0] * len(layers)
    for index, layer in enumerate(layers):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        # A layer is called even where its output is reused; the last product within it is not.
        [module for module in layer.module.modules() if isinstance(module, nn.Linear)][-1].register_forward_hook(count)
    result = pipeline.generate(["a", "b"], 0.3, num_steps=STEPS, solver=SOLVER, accelerator=accelerator, batch_size=2)
    return result.audio, dict(result.settings), calls


def test_the_curves_are_of_layers_that_see_features(folder: Path) -> None:
    info = json.loads((folder / "system" / "calibration" / f"{SOLVER}_{STEPS}.json").read_text())
    assert info["num_prompts"] == 2
    assert {"self_attention", "cross_attention", "feed_forward"} >= set(info["layer_kinds"]) >= {"cross_attention"}


def test_the_features_are_heard_and_caching_at_delta_zero_changes_nothing(folder: Path) -> None:
    plain, settings, calls = _generate(folder)
    assert not torch.equal(plain[0], plain[1])
    exact, settings_exact, calls_exact = _generate(folder, "audiocache", "accel.threshold=0")
    assert torch.equal(exact, plain)
    assert calls == calls_exact == [STEPS] * len(calls)
    assert settings_exact["macs"] == settings["macs"]


@pytest.mark.parametrize(("policy", "computed"), [("accel.threshold=1e9", 1), ("fora", STEPS // 2)])
def test_reused_layers_are_not_called(folder: Path, policy: str, computed: int) -> None:
    named = ("fora",) if policy == "fora" else ("audiocache", policy)
    audio, settings, calls = _generate(folder, *named)
    assert audio.isfinite().all()
    assert calls == [computed] * len(calls)
    assert settings["macs"] < settings["macs_uncached"]
    assert settings["solver"] == SOLVER
