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
from foley.training.callbacks import evaluation, listening
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


class TwoProcesses:
    """What the callback asks of the trainer of one of two processes; `met` gets the barriers."""

    world_size = 2
    datamodule = None

    def __init__(self, rank: int) -> None:
        self.global_rank, self.is_global_zero, self.strategy, self.met = rank, rank == 0, self, []

    def barrier(self, name: str) -> None:
        self.met.append(name)


def test_processes_share_the_reference_before_the_first_step(tmp_path: Path, scores, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "takes_captions", lambda module: True)
    extracted = []
    extract = evaluation.extract_files

    def noting(clips, *args, **kwargs):
        extracted.append([clip.id for clip in clips])
        return extract(clips, *args, **kwargs)

    monkeypatch.setattr(evaluation, "extract_files", noting)
    for rank in (1, 0):
        trainer = TwoProcesses(rank)
        scores.on_fit_start(trainer, None)
        assert trainer.met == ["features of the reference"]
    assert extracted == [["1", "3", "5"], ["0", "2", "4"], [str(index) for index in range(6)]]
    assert set(scores._known) == {"embedded"}


@pytest.mark.parametrize(("count", "world_size"), [(5, 2), (6, 3), (2, 4), (1, 1)])
def test_shares_of_processes_come_back_in_order_and_each_once(count: int, world_size: int) -> None:
    shares = [listening.shared_out(count, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    gathered = torch.tensor(shares).float()[:, :, None, None]
    assert listening.in_order(gathered, count).flatten().tolist() == list(range(count))


def test_silent_samples_have_no_scores_and_do_not_stop_the_run(tmp_path: Path, scores, monkeypatch, caplog) -> None:
    monkeypatch.setattr(listening, "load_trained", lambda path, name: Codec(0.0))
    trainer, _, _ = run(tmp_path, 7, callbacks=[scores])
    assert "val/embedded/frechet_distance" not in trainer.callback_metrics
    assert "all 4 generated clips are silent" in caplog.text
