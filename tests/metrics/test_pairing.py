"""Which generated clip belongs to which recording, where ids say it and where only names or captions do."""

import json

import numpy as np
import pytest
import soundfile

from foley.data.audio import read_channels
from foley.metrics.evaluation import evaluate_files
from foley.metrics.features import ClipFile, scan_directory
from foley.metrics.pairing import PairingError, align_ids
from foley.metrics.references import crop_length, read_clips

CAPTIONS = ["a dog barks", "rain on a roof", "a bell"]


def clip(tmp_path, path, id=None, caption=None):
    return ClipFile(tmp_path / path, id or path, None, caption)


@pytest.fixture
def reference(tmp_path):
    return [clip(tmp_path, f"audio/{n}.wav", caption=caption) for n, caption in enumerate(CAPTIONS)]


def test_common_ids_decide_even_where_some_are_missing(tmp_path, reference):
    samples = [clip(tmp_path, "x.wav", "audio/0.wav"), clip(tmp_path, "1.wav", "stranger", CAPTIONS[2])]
    assert align_ids(samples, reference) == (samples, "id")


def test_files_called_as_the_recordings_are_theirs(tmp_path, reference):
    aligned, rule = align_ids([clip(tmp_path, "2.flac"), clip(tmp_path, "0.flac")], reference)
    assert ([c.id for c in aligned], rule) == (["audio/2.wav", "audio/0.wav"], "file name")


def test_clips_called_after_their_prompts_pair_by_caption(tmp_path, reference):
    samples = [clip(tmp_path, f"000{n}_{n}.wav", caption=f" {caption}") for n, caption in enumerate(CAPTIONS)]
    aligned, rule = align_ids(samples, reference)
    assert ([c.id for c in aligned], rule) == ([c.id for c in reference], "caption")


@pytest.mark.parametrize("captions", [["a dog barks", "thunder"], ["a bell", "a bell"], ["", "a bell"], [None, None]])
def test_captions_that_do_not_tell_clips_apart_pair_nothing(tmp_path, reference, captions):
    samples = [clip(tmp_path, f"s{n}.wav", caption=caption) for n, caption in enumerate(captions)]
    assert align_ids(samples, reference) == (samples, "id")


def test_a_caption_of_two_recordings_pairs_nothing_and_two_captions_of_one_do(tmp_path, reference):
    samples = [clip(tmp_path, "s.wav", caption="a bell")]
    assert align_ids(samples, [*reference, clip(tmp_path, "b.wav", caption="a bell")])[1] == "id"
    twice = [*reference, clip(tmp_path, "audio/2.wav", "another", "ding"), clip(tmp_path, "audio/2.wav", "b", "a bell")]
    assert align_ids(samples, twice)[1] == "caption"


@pytest.fixture
def sets(tmp_path):
    """A manifest without ids, and the clips that were generated for its captions."""
    rows = [{"path": f"audio/{n}.wav", "caption": caption} for n, caption in enumerate(CAPTIONS)]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for folder, seconds in (("audio", 0.4), ("samples", 0.5)):
        (tmp_path / folder).mkdir()
        for n, caption in enumerate(CAPTIONS):
            samples = np.eye(1, round(100 * seconds), n)[0] / 2
            stem = f"{n}" if folder == "audio" else f"{n:04d}_{caption.replace(' ', '-')}"
            soundfile.write(tmp_path / folder / f"{stem}.wav", samples, 100)
            if folder == "samples":
                (tmp_path / folder / f"{stem}.json").write_text(json.dumps({"prompt": caption, "seed": n}))
    return tmp_path


def evaluate(sets, protocol, pairing="auto"):
    samples, reference = scan_directory(sets / "samples"), read_clips(sets / "clips.jsonl")
    return evaluate_files(samples, reference, protocol, read_channels, pairing)


def test_samples_of_a_manifest_pair_with_it_out_of_the_box(sets, protocol):
    for pairing in ("auto", "required"):
        evaluation = evaluate(sets, protocol, pairing)
        assert (evaluation.pairing, evaluation.scores["kl_softmax"].n) == ("paired by caption", "3")
        assert evaluation.notes[0] == "all 3 generated clips pair with 3 of 3 reference recordings"


def test_what_does_not_pair_is_said_with_names_of_both_sides(sets, protocol, caplog):
    for sidecar in (sets / "samples").glob("*.json"):
        sidecar.unlink()
    evaluation = evaluate(sets, protocol)
    assert evaluation.pairing == "none"
    assert "kl_softmax" not in evaluation.scores
    assert "0000_a-dog-barks" in evaluation.notes[0]
    assert "'audio/0.wav'" in evaluation.notes[0]
    assert evaluation.notes[0] in caplog.text
    with pytest.raises(PairingError, match=r"3 of 3.*0000_a-dog-barks.*references are called \['audio/0.wav'"):
        evaluate(sets, protocol, "required")


def test_both_sets_are_cropped_to_the_shorter_one(sets):
    samples, reference = scan_directory(sets / "samples"), read_clips(sets / "clips.jsonl")
    (sets / "audio/0.wav").write_bytes(b"")
    assert crop_length("shorter", samples, reference) == 0.4
    assert (crop_length(None, samples, reference), crop_length(2, samples, reference)) == (None, 2)
    with pytest.raises(ValueError, match="crop_seconds=short must be a number of seconds, shorter, or null"):
        crop_length("short", samples, reference)
