"""scripts/filter_clap.py with a CLAP model of random weights."""

import json
from pathlib import Path

import numpy as np
import soundfile
from commands import run_command
from tiny_clap import save_clap

CAPTIONS = ("a dog barks", "rain falls on a roof", "a siren wails")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def filter_clap(folder: Path, threshold: float) -> None:
    settings = {"manifest": folder / "clips.jsonl", "audio_dir": folder, "out": folder / "out", "threshold": threshold}
    quiet = {"paths.output_dir": folder, "+trainer.enable_progress_bar": "false"}
    overrides = {**settings, **quiet, "scorer.name": folder / "clap"}
    run_command("script/filter_clap", *(f"{key}={value}" for key, value in overrides.items()))


def test_all_clips_are_scored_once_and_any_threshold_may_follow(tmp_path, caplog):
    save_clap(tmp_path / "clap")
    rows = [{"path": f"{number}.wav", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    for number, row in enumerate(rows):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, 4800 * (number + 1))
        soundfile.write(tmp_path / row["path"], noise, 48000)
    rows.append({"path": "absent.wav", "caption": "x"})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    caplog.set_level("INFO")
    filter_clap(tmp_path, -1.0)
    assert "3 clips scored, 1 could not be" in caplog.text
    assert all(f"threshold {limit} keeps" in caplog.text for limit in ("-1.00", "0.35", "0.40", "0.45"))
    scores = lines(tmp_path / "out" / "scores.jsonl")
    assert [row["id"] for row in scores] == ["0.wav", "1.wav", "2.wav"]
    assert len(lines(tmp_path / "out" / "manifest.jsonl")) == 3
    assert (tmp_path / "out" / "histogram.png").stat().st_size > 1000
    journal = (tmp_path / "out" / "results-rank0000.jsonl").read_text()
    second = sorted(row["clap_score"] for row in scores)[1]
    filter_clap(tmp_path, second)
    assert (tmp_path / "out" / "results-rank0000.jsonl").read_text() == journal
    assert len(lines(tmp_path / "out" / "manifest.jsonl")) == 2
