"""Files in, features out: sidecars, labels from prompts, and a cache that is never stale."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foley.metrics.features import (
    ClipFile,
    FaultyClipsError,
    extract_files,
    label_from_text,
    labels_by_caption,
    resolve_labels,
    scan_directory,
)
from foley.metrics.protocols import ProtocolError

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
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        scan_directory(tmp_path / "nowhere")
    (tmp_path / "b.wav").touch()
    with pytest.raises(FileNotFoundError, match=r"b\.wav is a file, not a folder"):
        scan_directory(tmp_path / "b.wav")
    (tmp_path / "a.WAV").touch()
    (tmp_path / "b.json").write_text(json.dumps({"prompt": "rain falls", "label": "rain", "id": "clip/7"}))
    assert [(c.id, c.label, c.caption) for c in scan_directory(tmp_path)] == [
        ("a", None, None),
        ("clip/7", "rain", "rain falls"),
    ]
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is damaged or not the sidecar of a clip"):
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


def test_features_lie_in_subfolders_and_those_of_one_folder_are_found(clips, protocol, tmp_path) -> None:
    fresh = extract_files(clips, protocol, load, tmp_path / "cache")
    for file in list((tmp_path / "cache").rglob("*.safetensors")):
        assert file.parent.name == file.name[:2]
        file.rename(file.parents[1] / file.name)
    again = extract_files(clips, protocol, load, tmp_path / "cache")
    assert torch.equal(again.features, fresh.features)
    assert protocol.extractor.clips_seen == 2


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


def test_every_kind_of_sound_is_taken_and_other_files_are_counted(tmp_path, caplog) -> None:
    for name in ("a.aiff", "b.AIF", "c.opus", "d.m4a", "e.xyz", "page.html", ".hidden.wav"):
        (tmp_path / name).touch()
    assert [clip.path.name for clip in scan_directory(tmp_path)] == ["a.aiff", "b.AIF", "c.opus", "d.m4a"]
    assert "1 files are left out (1 .xyz), such as e.xyz" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"id": ""}, "`id` is empty"), ({"id": 1.5}, "`id` must be text, got 1.5"), ([1], "holds no object")],
)
def test_an_id_that_names_nothing_is_refused(fields, message, tmp_path) -> None:
    (tmp_path / "a.wav").touch()
    (tmp_path / "a.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        scan_directory(tmp_path)


def test_an_id_of_null_is_no_id_and_a_number_is_one(tmp_path) -> None:
    for name, id in (("a", None), ("b", 7)):
        (tmp_path / f"{name}.wav").touch()
        (tmp_path / f"{name}.json").write_text(json.dumps({"id": id}))
    assert [clip.id for clip in scan_directory(tmp_path)] == ["a", "7"]


def test_faulty_files_are_left_out_up_to_a_share_and_named(clips, protocol, caplog) -> None:
    clips[1].path.write_text("nan")
    with pytest.raises(FaultyClipsError, match=r"1 of 2 clips cannot be used: .*1\.wav.*max_faulty_share"):
        extract_files(clips, protocol, load)
    with pytest.raises(ValueError, match="max_faulty_share=nan: give a number >= 0 and <= 1"):
        extract_files(clips, protocol, load, max_faulty_share=float("nan"))
    kept = extract_files(clips, protocol, load, max_faulty_share=0.5)
    assert (kept.ids, list(kept.faulty)) == (["0"], ["1"])
    assert "they are left out" in caplog.text


def test_features_of_an_older_or_foreign_cache_are_made_anew(clips, protocol, tmp_path) -> None:
    fresh = extract_files(clips, protocol, load, tmp_path / "cache")
    for number, file in enumerate((tmp_path / "cache").rglob("*.safetensors")):
        row = load_file(file)
        save_file({"features": row["features"]} if number else {**row, "features": torch.zeros(1, 9)}, file)
    again = extract_files(clips, protocol, load, tmp_path / "cache")
    assert torch.equal(again.features, fresh.features)
    assert again.seconds.tolist() == pytest.approx([0.04, 0.04])


def test_a_crop_is_what_is_judged_and_has_features_of_its_own(clips, protocol, tmp_path) -> None:
    cropped = replace(protocol, crop_seconds=0.02)
    extract_files(clips, protocol, load, tmp_path / "cache")
    found = extract_files(clips, cropped, load, tmp_path / "cache")
    assert torch.equal(found.features[0], torch.tensor([0.1, 0.2, 0.0, 0.0]))
    assert torch.equal(found.peaks, torch.tensor([0.2, 0.6]))
    assert found.seconds.tolist() == pytest.approx([0.02, 0.02])
    assert (cropped.describe()["crop_seconds"], cropped.identity == protocol.identity) == (0.02, False)
    with pytest.raises(ProtocolError, match="crop_seconds=nan must be a positive number"):
        replace(protocol, crop_seconds=float("nan"))
