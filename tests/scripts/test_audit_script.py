"""`foley audit`: its report, its page, and the exit code that a build waits for."""

import json

import numpy as np
import pytest
import soundfile
from commands import run_command

from foley.cli.errors import is_fault
from foley.metrics.audit import FINDINGS, AuditedClip, AuditLimits, measure
from foley.reporting.audit import describe_findings

RATE = 24000


@pytest.fixture
def sounds(tmp_path):
    """A clean clip, one that begins with a click, one that is silent and one that is none."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    fading = 0.3 * np.cos(2 * np.pi * 440 * np.arange(RATE) / RATE) * np.linspace(1, 0, RATE)
    for name, samples in {"clean": tone, "a <click>": fading, "mute": 0 * tone}.items():
        soundfile.write(folder / f"{name}.wav", samples, RATE)
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


def run(tmp_path, *overrides):
    """The report, its rows by name, and the page."""
    run_command("script/audit", f"output_dir={tmp_path / 'out'}", *overrides)
    rows = [json.loads(line) for line in (tmp_path / "out" / "clips.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    return report, {row["clip"]: row for row in rows}, (tmp_path / "out" / "index.html").read_text()


def test_a_folder_becomes_counts_rows_and_a_page(sounds, tmp_path):
    report, rows, page = run(tmp_path, f"folder={sounds}")
    assert (report["clips"], report["clips_with_findings"]) == (4, 3)
    assert report["counts"] == {"unreadable": 1, "silent": 1, "click_start": 1}
    assert report["limits"]["ends_ratio"] == AuditLimits.shipped().ends_ratio
    assert {name: row["findings"] for name, row in rows.items()} == {
        "a <click>.wav": ["click_start"],
        "broken.wav": ["unreadable"],
        "clean.wav": [],
        "mute.wav": ["silent"],
    }
    assert rows["a <click>.wav"]["start_jump_db"] == pytest.approx(0.0, abs=0.01)
    # The worst first, played where they lie; what cannot be read has no picture.
    places = [page.index(f"{name}") for name in ("broken.wav", "mute.wav", "a &lt;click&gt;.wav")]
    assert places == sorted(places)
    assert 'src="../sounds/a &lt;click&gt;.wav"' in page
    assert page.count("<img") == 2
    assert "clean.wav" not in page


def test_a_manifest_and_limits_of_ones_own(sounds, tmp_path):
    lines = [json.dumps({"path": f"{name}.wav", "caption": "x", "split": "test"}) for name in ("clean", "a <click>")]
    (sounds / "clips.jsonl").write_text(
        "\n".join([*lines, json.dumps({"path": "mute.wav", "caption": "y", "split": "train"})])
    )
    report, rows, _ = run(tmp_path, f"folder={sounds / 'clips.jsonl'}", "split=test", "limits.ends_ratio=1000")
    assert (report["clips"], report["counts"]) == (2, {})
    assert set(rows) == {"clean.wav", "a <click>.wav"}


def test_findings_that_are_named_are_an_error_of_the_user_once_the_report_is_written(sounds, tmp_path):
    with pytest.raises(ValueError, match=r"fail_on=silent: of 4 clips 1 silent; see .*out/index\.html") as error:
        run(tmp_path, f"folder={sounds}", "fail_on=[clipping,silent]")
    assert not is_fault(error.value)  # one message, exit code 1
    assert (tmp_path / "out" / "audit.json").is_file()
    run(tmp_path, f"folder={sounds}", "fail_on=[clipping,loop]")


def test_a_finding_that_there_is_not_is_refused_before_anything_is_heard(sounds, tmp_path):
    with pytest.raises(ValueError, match=r"fail_on must be one of unreadable, not_finite, .*got 'noise'"):
        run(tmp_path, f"folder={sounds}", "fail_on=[noise]")
    assert not (tmp_path / "out").exists()


def test_every_finding_can_be_told_by_its_measurement():
    row = measure(np.zeros((RATE, 2), np.float32), RATE, AuditLimits.shipped())
    row |= {"reason": "is empty", "repeat": {"of": "a.wav"}, "cutoff_hz": 4000.0}
    for name in FINDINGS:
        assert describe_findings(AuditedClip("b.wav", (name,), row)).startswith(name.replace("_", " "))
