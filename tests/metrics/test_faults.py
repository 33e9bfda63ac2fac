"""Reliability row 18 on files: a missing pair, stale features, silent and unusable output."""

import json
import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from foley.core.config import PROJECT_ROOT
from foley.data.audio import AudioError, read_channels
from foley.metrics.evaluation import SilentAudioError, evaluate_files
from foley.metrics.features import FaultyClipsError, extract_files, scan_directory
from foley.metrics.pairing import PairingError
from foley.metrics.protocols import load_protocol
from foley.reporting.scores import write_report

LABELS = ("rain", "bell", "dog bark", "seven")


def write(folder, name, loudest, level=0.5):
    """A clip that the extractor of these tests takes for `LABELS[loudest]`."""
    folder.mkdir(exist_ok=True)
    samples = np.zeros(30)
    samples[loudest] = level
    soundfile.write(folder / f"{name}.wav", samples, 100, subtype="FLOAT")
    sidecar = {"id": name, "label": LABELS[loudest], "prompt": LABELS[loudest]}
    (folder / f"{name}.json").write_text(json.dumps(sidecar))
    return folder / f"{name}.wav"


@pytest.fixture
def folders(tmp_path):
    """Generated clips and their references, eight of each."""
    for index in range(8):
        write(tmp_path / "samples", str(index), index % 4)
        write(tmp_path / "reference", str(index), index % 4, level=0.4)
    return tmp_path / "samples", tmp_path / "reference"


def evaluate(folders, protocol, pairing="required", cache=None):
    return evaluate_files(*map(scan_directory, folders), protocol, read_channels, pairing, cache)


def test_a_missing_pair_is_an_error_and_names_the_clip(folders, protocol):
    assert evaluate(folders, protocol).pairing == "paired by id"
    (folders[1] / "3.wav").unlink()
    for pairing in ("required", "auto"):
        with pytest.raises(PairingError, match=r"1 of 8.*'?3'?"):
            evaluate(folders, protocol, pairing)
    assert evaluate(folders, protocol, "none").n_reference == 7


def test_a_recording_without_a_clip_is_an_error_where_pairs_are_required(folders, protocol):
    for suffix in ("wav", "json"):
        (folders[0] / f"3.{suffix}").unlink()
    with pytest.raises(PairingError, match=r"1 of 8 reference recordings have no generated clip.*'3'"):
        evaluate(folders, protocol)
    assert evaluate(folders, protocol, "auto").n_reference == 8


def test_a_recording_with_several_captions_counts_once_and_pairs_by_any_of_them(folders, protocol):
    samples, reference = map(scan_directory, folders)
    captions = [replace(clip, id=f"{clip.id}-{n}", caption=f"{n}") for clip in reference for n in range(5)]
    chosen = [replace(clip, id=f"{clip.id}-{index % 5}") for index, clip in enumerate(samples)]
    once, often = (
        evaluate_files(generated, known, protocol, read_channels, "required", resamples=4)
        for generated, known in ((samples, reference), (chosen, captions))
    )
    assert (often.n_reference, often.pairing, often.scores) == (8, "paired by id", once.scores)


def test_a_rewritten_file_of_equal_size_and_date_has_new_features(folders, protocol, tmp_path):
    clips, cache = scan_directory(folders[0]), tmp_path / "cache"
    before = extract_files(clips, protocol, read_channels, cache)
    stat = clips[0].path.stat()
    write(folders[0], "0", 2)
    os.utime(clips[0].path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert clips[0].path.stat().st_size == stat.st_size
    after = extract_files(clips, protocol, read_channels, cache)
    assert (int(before.features[0].argmax()), int(after.features[0].argmax())) == (0, 2)
    assert (before.features[1:] == after.features[1:]).all()


def test_a_moved_file_keeps_its_features(folders, protocol, tmp_path):
    extract_files(scan_directory(folders[0]), protocol, read_channels, tmp_path / "cache")
    seen = protocol.extractor.clips_seen
    folders[0].rename(tmp_path / "elsewhere")
    extract_files(scan_directory(tmp_path / "elsewhere"), protocol, read_channels, tmp_path / "cache")
    assert protocol.extractor.clips_seen == seen


def test_silent_output_raises_an_alarm_in_log_and_report(folders, protocol, tmp_path, caplog):
    write(folders[0], "5", 1, level=0.0)
    with caplog.at_level(logging.ERROR):
        evaluation = evaluate(folders, protocol)
    write_report([evaluation], tmp_path / "report")
    assert evaluation.silent == ["5"]
    assert "SILENT OUTPUT: 1 of 8" in caplog.text
    assert "ALARM" in (tmp_path / "report/evaluation.md").read_text()
    for index in range(8):
        write(folders[0], str(index), 0, level=0.0)
    with pytest.raises(SilentAudioError, match="all 8 generated clips are silent"):
        evaluate(folders, protocol)


def test_few_faulty_files_are_left_out_with_their_pairs_and_named_in_the_report(folders, protocol, tmp_path):
    (folders[0] / "2.wav").write_bytes(b"no sound")
    (folders[1] / "5.wav").write_bytes(b"")
    clips = map(scan_directory, folders)
    evaluation = evaluate_files(*clips, protocol, read_channels, "required", max_faulty_share=0.2)
    assert (evaluation.n_generated, evaluation.n_reference, evaluation.pairing) == (6, 7, "paired by id")
    assert "1 generated clips cannot be used and are left out: 2" in evaluation.notes
    assert "1 reference clips cannot be used and are left out: 5" in evaluation.notes
    write_report([evaluation], tmp_path)
    assert "left out: 2" in (tmp_path / "evaluation.md").read_text()


def test_a_set_that_hides_a_format_that_is_not_decoded_is_refused(folders, protocol):
    (folders[0] / "3.wav").rename(folders[0] / "3.m4a")
    (folders[0] / "3.m4a").write_bytes(b"ftypM4A")
    with pytest.raises(FaultyClipsError, match=r"1 of 8 clips cannot be used: .*3\.m4a"):
        evaluate(folders, protocol)


def test_aiff_is_read(shared, tmp_path):
    shutil.copy(shared / "cases/audio/twelve.aiff", tmp_path)
    embedded = load_protocol("embedded", PROJECT_ROOT / "data" / "extractor")
    features = extract_files(scan_directory(tmp_path), embedded, read_channels)
    assert (features.ids, dict(features.faulty)) == (["twelve"], {})
    assert features.peaks > 0


@pytest.mark.parametrize(("samples", "message"), [([], "holds no samples"), ([0.1, np.nan], "NaN|not finite")])
def test_an_empty_or_broken_file_stops_the_evaluation_and_is_named(folders, protocol, samples, message):
    soundfile.write(folders[0] / "2.wav", np.array(samples), 100, subtype="FLOAT")
    with pytest.raises((AudioError, ValueError), match=rf"2\.wav.*({message})"):
        evaluate(folders, protocol)
