"""Reference clips out of folders, manifests and tables."""

from pathlib import Path

import pytest

from foley.metrics.features import ClipFile
from foley.metrics.references import of_labels, read_clips


def test_clips_of_a_manifest_lie_in_audio_dir(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.wav").touch()
    (tmp_path / "clips.csv").write_text("path,caption,split\na.wav,a dog,test\nb.wav,rain,train\n")
    (tmp_path / "clips.jsonl").write_text('{"path": "a.wav", "caption": "a dog", "split": "test", "label": "dog"}\n')
    (of_table,) = read_clips(tmp_path / "clips.csv", "test", tmp_path / "audio")
    (of_manifest,) = read_clips(tmp_path / "clips.jsonl", None, tmp_path / "audio")
    (of_folder,) = read_clips(tmp_path / "audio")
    assert {clip.path for clip in (of_table, of_manifest, of_folder)} == {tmp_path / "audio" / "a.wav"}
    assert [clip.label for clip in (of_table, of_manifest, of_folder)] == [None, "dog", None]
    with pytest.raises(FileNotFoundError, match=r"1 of 1 clips do not exist .*a\.wav.*audio_dir="):
        read_clips(tmp_path / "clips.jsonl")
    with pytest.raises(ValueError, match=r"no split 'val', only \['test', 'train'\]"):
        read_clips(tmp_path / "clips.csv", "val")


def test_a_reference_of_the_labels_of_the_samples_has_no_others() -> None:
    reference = [ClipFile(Path(name), name, label, "") for name, label in (("a", "rain"), ("b", "dog"), ("c", None))]
    sample = ClipFile(Path("s"), "s", "dog", "")
    assert of_labels(reference, [sample, ClipFile(Path("t"), "t", None, "")]) == [reference[1]]
    with pytest.raises(ValueError, match=r"no clip of the reference has a label of the samples \(None\)"):
        of_labels(reference, [])
