"""`python evaluate.py`: reports, pairing, silence and unknown protocols, from files to files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import wandb
from commands import run_command
from hydra.errors import InstantiationException, MissingConfigException
from tiny_clap import save_clap

from foley.core.components import save_component
from foley.core.config import PROJECT_ROOT
from foley.metrics.audit import in_words
from foley.metrics.embedded.network import EmbeddedExtractor
from foley.metrics.evaluation import SilentAudioError
from foley.metrics.latency import RealTimeFactor
from foley.metrics.pairing import PairingError

RATE_HZ = 24000
CONFIG = {
    "labels": ["pure tone", "white noise"],
    "label_groups": {"procedural": ["pure tone", "white noise"]},
    "widths": [4, 4, 4, 4, 4],
    "feature_dim": 2,
}


def write_clip(folder: Path, name: str, audio: np.ndarray, **fields: str) -> None:
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / f"{name}.wav", audio, RATE_HZ)
    (folder / f"{name}.json").write_text(json.dumps(fields))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    target = f"{EmbeddedExtractor.__module__}.{EmbeddedExtractor.__qualname__}"
    save_component(EmbeddedExtractor(**CONFIG), {"_target_": target, **CONFIG}, tmp_path / "extractor")
    time = np.arange(RATE_HZ // 2) / RATE_HZ
    for index in range(4):
        tone = 0.5 * np.sin(2 * np.pi * (300 + 100 * index) * time)
        noise = 0.1 * np.random.default_rng(index).standard_normal(time.size)
        for folder in ("samples", "reference"):
            write_clip(tmp_path / folder, f"tone{index}", tone, prompt="a pure tone", label="pure tone")
            write_clip(tmp_path / folder, f"noise{index}", noise, prompt="radio static")
    return tmp_path


def overrides(workspace: Path, *extra: str) -> list[str]:
    return [
        f"samples={workspace / 'samples'}",
        f"reference={workspace / 'reference'}",
        f"paths.data_dir={workspace}",
        f"paths.weights_dir={workspace / 'weights'}",
        "resamples=20",
        f"cache_dir={workspace / 'cache'}",
        f"output_dir={workspace / 'out'}",
        *extra,
    ]


def run(workspace: Path, *extra: str) -> dict:
    """The same in this process, which spares the start of another one."""
    run_command("evaluate", *overrides(workspace, *extra))
    return json.loads((workspace / "out" / "evaluation.json").read_text())["embedded"]


def test_command_line_writes_reports_and_shows_the_table(workspace: Path) -> None:
    command = [sys.executable, str(PROJECT_ROOT / "evaluate.py"), *overrides(workspace)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Frechet distance" in done.stdout
    assert "protocol embedded v1" in done.stdout
    stored = json.loads((workspace / "out" / "evaluation.json").read_text())["embedded"]
    distance = stored["scores"]["frechet_distance"]
    assert distance["value"] == pytest.approx(0, abs=1e-6)
    assert distance["n"] == "8 / 8"
    assert 0 <= distance["low"] <= distance["high"]
    assert stored["pairing"] == "paired by id"
    assert "# Evaluation, protocol `embedded`" in (workspace / "out" / "evaluation.md").read_text()


def test_labels_come_from_sidecars_and_from_known_captions(workspace: Path) -> None:
    accuracy = run(workspace)["accuracy"]["all"]
    assert accuracy["n"] == 8
    assert {label: n for label, (_, n) in accuracy["per_class"].items()} == {"pure tone": 4, "white noise": 4}


def test_a_report_says_how_fast_its_clips_were_made(workspace: Path) -> None:
    assert run(workspace)["rtf"] is None
    assert "- RTF: no clip says how fast it was made" in (workspace / "out" / "evaluation.md").read_text()
    for index in range(4):
        sidecar = workspace / "samples" / f"tone{index}.json"
        made = RealTimeFactor(0.01 * (index + 1), "NVIDIA H200", 8 if index else 2).to_json()
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **made}))
    stored = run(workspace)
    assert stored["rtf"] == {"value": pytest.approx(0.025), "machine": "NVIDIA H200", "batch_size": 8}
    report = (workspace / "out" / "evaluation.md").read_text()
    assert "- RTF: 0.025 (NVIDIA H200, batch 8), mean of 4 of 8 clips" in report


def test_a_report_counts_what_is_heard_of_the_samples(workspace: Path) -> None:
    rng = np.random.default_rng(9)
    write_clip(workspace / "samples", "noise0", np.clip(4 * rng.standard_normal(RATE_HZ), -1, 1), prompt="radio static")
    stored = run(workspace)["audit"]
    assert (stored["clips"], stored["counts"]["clipping"]) == (8, 1)
    assert f"- {in_words(stored)}" in (workspace / "out" / "evaluation.md").read_text()
    assert run(workspace, "audit=false")["audit"] is None


def test_reference_may_be_one_split_of_a_manifest(workspace: Path) -> None:
    rows = [
        {"path": f"reference/tone{i}.wav", "caption": "a tone", "label": "pure tone", "split": "test" if i else "train"}
        for i in range(4)
    ]
    manifest = workspace / "clips.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    stored = run(workspace, f"reference={manifest}", "split=test")
    assert (stored["n_reference"], stored["pairing"]) == (3, "none")


def test_both_sets_are_cropped_on_request_and_the_report_says_so(workspace: Path) -> None:
    write_clip(workspace / "reference", "tone0", 0.5 * np.ones(RATE_HZ), prompt="a pure tone")
    noted = run(workspace)
    assert "crop_seconds" not in noted["protocol"]
    assert "1 of 8 pairs differ in length (generated 0.5 to 0.5 s" in noted["notes"][1]
    cropped = run(workspace, "crop_seconds=shorter")
    assert (cropped["protocol"]["crop_seconds"], cropped["seconds"]["reference"]) == (0.5, [0.5, 0.5, 0.5])
    assert len(cropped["notes"]) == 1


def test_missing_pairs_silence_and_unknown_protocols_are_refused(workspace: Path) -> None:
    (workspace / "reference" / "tone0.wav").unlink()
    with pytest.raises(PairingError, match="tone0"):
        run(workspace, "pairing=required")
    with pytest.raises(InstantiationException, match=r"Cnn14_16k_mAP=0\.438\.pth does not exist"):
        run(workspace, "protocol=[embedded,panns]")
    with pytest.raises(MissingConfigException, match=r"protocol/pans[^$]*embedded"):
        run(workspace, "protocol=pans")
    write_clip(workspace / "mute", "nothing", np.zeros(RATE_HZ))
    with pytest.raises(SilentAudioError, match="nothing"):
        run(workspace, f"samples={workspace / 'mute'}")
    assert not (workspace / "out").exists()


@pytest.mark.slow
def test_several_protocols_in_one_report_and_one_log(workspace: Path) -> None:
    save_clap(workspace / "clap")
    for clip in range(4):
        for folder in ("samples", "reference"):
            write_clip(workspace / folder, f"noise{clip}", 0.1 * np.ones(RATE_HZ), prompt="rain falls on a metal roof")
    run(
        workspace,
        "protocol=[embedded,clap]",
        f"protocol.clap.name_or_path={workspace / 'clap'}",
        "logger=wandb",
        f"logger.wandb.save_dir={workspace}",
        "logger.wandb.id=scores",
    )
    logged = dict(wandb.run.summary)
    wandb.finish()  # as the end of the process does
    stored = json.loads((workspace / "out" / "evaluation.json").read_text())
    assert list(stored) == ["embedded", "clap"]
    assert -1 <= stored["clap"]["scores"]["clap_score"]["value"] <= 1
    assert stored["clap"]["scores"]["clap_score_unrelated"]["value"] < 0.9
    assert "# Evaluation, protocol `clap`" in (workspace / "out" / "evaluation.md").read_text()
    assert logged["clap/clap_score"] == pytest.approx(stored["clap"]["scores"]["clap_score"]["value"])
    assert list((workspace / "wandb").glob("offline-run-*/run-scores.wandb"))
