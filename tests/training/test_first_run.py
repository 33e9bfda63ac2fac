"""`python train.py` and nothing else: what it trains, on what, and how it ends."""

import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from foley.cli import sampling
from foley.cli.sampling import write_listening_page
from foley.core.config import CONFIG_DIR, PROJECT_ROOT
from foley.training import shipped_latents
from foley.training.requirements import refuse_missing
from foley.training.shipped_latents import ShippedLatents


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", ["name=first", "experiment=first", *overrides])


@pytest.mark.parametrize(
    ("typed", "added"),
    [
        ([], ["experiment=first"]),
        (["hydra.run.dir=x"], ["experiment=first"]),
        (["seed=1"], []),
        (["--help"], []),
        (["-m", "hydra.sweep.dir=x"], []),
    ],
)
def test_nothing_typed_is_the_first_training(typed: list[str], added: list[str], monkeypatch: Any) -> None:
    seen: list[str] = []
    monkeypatch.setattr("foley.cli.command.command", lambda name, **_: lambda task: lambda: seen.extend(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["train.py", *typed])
    runpy.run_path(str(PROJECT_ROOT / "train.py"), run_name="__main__")
    assert seen == [*typed, *added]


def test_it_lacks_nothing() -> None:
    cfg = config()
    refuse_missing(cfg)
    assert cfg.trainer.accelerator == "cpu"
    assert cfg.lr_schedule.warmup_steps < cfg.trainer.max_steps
    assert Path(cfg.codec_path, "config.json").is_file()


def test_its_latents_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"kept_in": str(tmp_path), "sizes": {"train": 3, "val": 1}, "duration_seconds": 0.5}
    first = ShippedLatents(**options, batch_size=2)
    assert {split: len(dataset) for split, dataset in first.datasets.items()} == {"train": 3, "val": 1}  # type: ignore[arg-type]
    monkeypatch.setattr(shipped_latents, "encode_latents", None)
    assert ShippedLatents(**options, batch_size=2).codec_hash == first.codec_hash
    with pytest.raises(TypeError):  # other clips are encoded anew
        ShippedLatents(**options, batch_size=2, seed=1)


def test_it_ends_with_a_page_and_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked: list[Any] = []
    generation = SimpleNamespace(write=asked.append)
    system = SimpleNamespace(generate=lambda *request, **options: asked.append(request) or generation)
    monkeypatch.setattr(sampling, "TextToAudio", SimpleNamespace(load=lambda path: asked.append(path) or system))
    cfg = config(f"paths.output_dir={tmp_path}")
    assert write_listening_page(cfg) == tmp_path / "listen/index.html"
    assert asked == [tmp_path / "checkpoints/last.ckpt", (list(cfg.listen), 2.0), tmp_path / "listen"]
    assert f"listen: {tmp_path}/listen/index.html" in caplog.text
    assert f"foley sample system={tmp_path}/checkpoints/last.ckpt prompt=" in caplog.text
    cfg.codec_path = None
    with pytest.raises(ValueError, match="give codec_path="):
        write_listening_page(cfg)
