"""CLAP scores, the threshold and the counts."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from foley.core.locks import FolderInUseError, only_writer
from foley.core.sharding import Shard
from foley.data.annotating import Fault, annotate
from foley.data.clap_filter import ClapScorer, keep_by_threshold


class Plane:
    """Sounds point in the direction of their level, captions in that of their length: cosines in closed form."""

    sample_rate_hz = 8000

    def audio(self, clips):
        return torch.tensor([[np.cos(clip[0]), np.sin(clip[0])] for clip in clips])

    def text(self, captions):
        return torch.tensor([[np.cos(len(text) / 10), np.sin(len(text) / 10)] for text in captions])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_cosines_and_bad_clips_are_faults(tmp_path):
    for name, level in (("a.wav", 0.2), ("b.wav", 0.5)):
        soundfile.write(tmp_path / name, np.full(800, level), 8000, subtype="FLOAT")
    scorer = ClapScorer(lambda device: Plane(), str(tmp_path), "plane")
    scorer.start(1, torch.device("cpu"))
    rows = [{"path": name, "caption": "x" * 7} for name in ("a.wav", "absent.wav", "b.wav")]
    first, absent, last = scorer.annotate(rows)
    assert isinstance(absent, Fault)
    assert first["clap_score"] == pytest.approx(np.cos(0.7 - 0.2))
    assert last["clap_score"] == pytest.approx(np.cos(0.7 - 0.5))
    assert isinstance(scorer.annotate([rows[1]])[0], Fault)


def test_a_down_mix_other_than_the_mean_is_part_of_the_scores_identity(tmp_path):
    left_silent = np.stack([np.zeros(800), np.full(800, 0.5)], axis=1)
    soundfile.write(tmp_path / "a.wav", left_silent, 8000, subtype="FLOAT")
    mean, loudest = (ClapScorer(lambda device: Plane(), str(tmp_path), "plane", downmix=m) for m in ("mean", "loudest"))
    assert "downmix" not in mean.identity
    assert loudest.identity["downmix"] == "loudest"
    scores = []
    for scorer in (mean, loudest):
        scorer.start(1, torch.device("cpu"))
        scores.append(scorer.annotate([{"path": "a.wav", "caption": "x" * 7}])[0]["clap_score"])
    assert scores == pytest.approx([np.cos(0.7 - 0.25), np.cos(0.7 - 0.5)])


def test_a_second_process_does_not_write_the_results_of_the_same_share(tmp_path, write_jsonl):
    scorer = ClapScorer(lambda device: Plane(), str(tmp_path), "plane")
    ran = []
    trainer = SimpleNamespace(global_rank=0, world_size=1, predict=lambda *_, **__: ran.append(1))
    given = scorer, tmp_path / "clips.jsonl", tmp_path / "out", trainer, 1
    with only_writer(Shard(1, 2).writer_folder(tmp_path / "out"), "results"):
        with pytest.raises(FolderInUseError, match="another process is writing results"):
            annotate(*given, shard=Shard(1, 2))
        annotate(*given, shard=Shard(0, 2))
    assert ran == [1]


def test_the_threshold_is_kept_and_counts_are_exact(tmp_path, write_jsonl):
    values = [0.10, 0.35, 0.39999, 0.40, 0.45, 0.80]
    rows = [{"id": str(n), "path": f"{n}.wav", "caption": "x", "license": "CC0"} for n in range(len(values) + 1)]
    manifest = write_jsonl(*rows)
    results = [{"id": str(n), "caption": "x", "clap_score": value} for n, value in enumerate(values)]
    results.append({"id": "6", "caption": "an older caption", "clap_score": 0.9})
    write_jsonl(*results, name="results-rank0000.jsonl")
    filtered = keep_by_threshold(manifest, tmp_path, 0.40, [0.35, 0.40, 0.45])
    assert (filtered.kept, filtered.unscored) == ({0.35: 5, 0.40: 3, 0.45: 2}, 1)
    assert [(row["id"], row["license"]) for row in lines(tmp_path / "manifest.jsonl")] == [
        ("3", "CC0"),
        ("4", "CC0"),
        ("5", "CC0"),
    ]
    assert [row["clap_score"] for row in lines(tmp_path / "scores.jsonl")] == values
    assert json.loads((tmp_path / "summary.json").read_text())["kept"] == {"0.35": 5, "0.40": 3, "0.45": 2}
