"""Scores of samples at validation, under the extractor that ships."""

import json
from pathlib import Path

import pytest
import soundfile
import torch
from training_parts import run

from foley.core.config import PROJECT_ROOT
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.metrics.protocols import embedded
from foley.training.callbacks import listening
from foley.training.callbacks.evaluation import SampleScores


class Codec(torch.nn.Module):
    """Two hundred samples a frame."""

    sample_rate_hz = 4000
    hop_samples = 200

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.gain * latent.mean(dim=1, keepdim=True).repeat_interleave(200, dim=-1)


@pytest.fixture
def scores(tmp_path: Path) -> SampleScores:
    rows = []
    for index in range(6):
        audio = torch.randn(8000, generator=torch.Generator().manual_seed(index)).numpy() / 10
        soundfile.write(tmp_path / f"{index}.wav", audio, 8000)
        rows.append({"path": f"{index}.wav", "id": str(index), "caption": f"sound {index}", "label": "white noise"})
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return SampleScores(
        reference=str(tmp_path / "clips.jsonl"),
        split=None,
        max_clips=4,
        protocol={"embedded": embedded(PROJECT_ROOT / "data" / "extractor")},
        cache_dir=str(tmp_path / "features"),
        codec_path="codec",
        duration_seconds=0.5,
        guidance=ClassifierFreeGuidance(2.0),
        num_steps=3,
        batch_size=3,
    )


def test_scores_are_logged_at_validation(tmp_path: Path, scores: SampleScores, monkeypatch) -> None:
    monkeypatch.setattr(listening, "load_trained", lambda path, name: Codec(1.0))
    trainer, _, _ = run(tmp_path, 7, callbacks=[scores])
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val/embedded/frechet_distance"] > 0
    assert {"val/embedded/kl_softmax", "val/embedded/kernel_audio_distance", "val/embedded/accuracy/all"} <= set(logged)
    assert len(scores.prompts) == 4
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 6


def test_silent_samples_have_no_scores_and_do_not_stop_the_run(tmp_path: Path, scores, monkeypatch, caplog) -> None:
    monkeypatch.setattr(listening, "load_trained", lambda path, name: Codec(0.0))
    trainer, _, _ = run(tmp_path, 7, callbacks=[scores])
    assert "val/embedded/frechet_distance" not in trainer.callback_metrics
    assert "all 4 generated clips are silent" in caplog.text
