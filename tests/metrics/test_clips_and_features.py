"""Files in, features out: sidecars, labels from prompts, and a cache that is never stale."""

import json

import numpy as np
import pytest
import torch

from foley.metrics.features import (
    ClipFile,
    extract_files,
    label_from_text,
    labels_by_caption,
    resolve_labels,
    scan_directory,
)

LABELS = ["rain", "bell", "alarm", "car_alarm", "dog bark"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("rain", "rain"),
        ("Heavy RAIN falls", "rain"),
        ("a car alarm goes off", "car_alarm"),
        ("a dog bark repeats", "dog bark"),
        ("a bell in the rain", None),
        ("training day", None),
        ("", None),
    ],
)
def test_label_from_text(text: str, label: str | None) -> None:
    assert label_from_text(text, LABELS) == label


def test_labels_come_from_the_sidecar_then_known_captions_then_words(tmp_path) -> None:
    known = labels_by_caption([("it pours", "rain"), ("ding", "bell"), ("ding", "alarm"), (None, "bell")])
    assert known == {"it pours": "rain"}
    captions = [("it pours", "bell"), ("it pours", None), ("an alarm", None), ("ding", None)]
    clips = [ClipFile(tmp_path / "a.wav", "a", label, caption) for caption, label in captions]
    assert resolve_labels(clips, known, LABELS) == ["bell", "rain", "alarm", None]


def test_scan_reads_sidecars_and_refuses_empty_folders_and_bad_json(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no audio file"):
        scan_directory(tmp_path)
    (tmp_path / "b.wav").touch()
    (tmp_path / "a.WAV").touch()
    (tmp_path / "b.json").write_text(json.dumps({"prompt": "rain falls", "label": "rain", "id": "clip/7"}))
    assert [(c.id, c.label, c.caption) for c in scan_directory(tmp_path)] == [
        ("a", None, None),
        ("clip/7", "rain", "rain falls"),
    ]
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not JSON"):
        scan_directory(tmp_path)


def load(path) -> tuple[np.ndarray, int]:
    return np.array([[float(value)] for value in path.read_text().split()], dtype=np.float32), 100


@pytest.fixture
def clips(tmp_path) -> list[ClipFile]:
    for index, content in enumerate(("0.1 0.2 0.3 0.4", "0.5 0.6 0.7 0.8")):
        (tmp_path / f"{index}.wav").write_text(content)
    return scan_directory(tmp_path)


def test_cached_features_equal_fresh_ones_and_are_not_made_twice(clips, protocol, tmp_path) -> None:
    fresh = extract_files(clips, protocol, load, tmp_path / "cache")
    assert protocol.extractor.clips_seen == 2
    cached = extract_files(clips, protocol, load, tmp_path / "cache")
    assert protocol.extractor.clips_seen == 2
    assert torch.equal(cached.features, fresh.features)
    assert torch.equal(cached.peaks, torch.tensor([0.4, 0.8]))


def test_stale_features_are_never_used(clips, protocol, other_protocol, tmp_path) -> None:
    extract_files(clips, protocol, load, tmp_path / "cache")
    clips[0].path.write_text("0.9 0.9 0.9 0.9")
    changed = extract_files(clips, protocol, load, tmp_path / "cache")
    assert protocol.extractor.clips_seen == 3
    assert changed.features[0, 0] == pytest.approx(0.9)
    extract_files(clips, other_protocol, load, tmp_path / "cache")
    assert other_protocol.extractor.clips_seen == 2


def test_a_damaged_cache_file_is_made_anew(clips, protocol, tmp_path, caplog) -> None:
    fresh = extract_files(clips, protocol, load, tmp_path / "cache")
    next((tmp_path / "cache").rglob("*.safetensors")).write_bytes(b"broken")
    again = extract_files(clips, protocol, load, tmp_path / "cache")
    assert torch.equal(again.features, fresh.features)
    assert "extracting its features again" in caplog.text


def test_equal_files_are_extracted_once(clips, protocol, tmp_path) -> None:
    clips[0].path.write_text(clips[1].path.read_text())
    both = extract_files(clips, protocol, load)
    assert protocol.extractor.clips_seen == 1
    assert torch.equal(both.features[0], both.features[1])


def test_only_a_few_clips_are_in_memory_at_a_time(tmp_path, protocol) -> None:
    for index in range(40):
        (tmp_path / f"{index:02d}.wav").write_text(f"0.1 0.2 0.3 {index / 100}")
    waiting = []

    def counted(path) -> tuple[np.ndarray, int]:
        waiting.append(len(list(tmp_path.glob("cache/*/*"))))
        return load(path)

    extract_files(scan_directory(tmp_path), protocol, counted, tmp_path / "cache")
    assert max(position - kept for position, kept in enumerate(waiting)) < 16
