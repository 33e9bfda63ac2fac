"""Damaged recordings: read as finite samples, or refused by their path, at once and without a gigabyte."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from fuzzing import bounded, damaged, right_or_named
from hypothesis import given
from hypothesis import strategies as st

from foley.data.audio import MAX_ABS_SAMPLE, read_audio

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("MP3", None),
    ("AIFF", "PCM_24"),
]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A quarter of a second of stereo noise in each format."""
    folder = tmp_path_factory.mktemp("recordings")
    samples = 0.3 * np.random.default_rng(0).standard_normal((4000, 2)).clip(-3, 3).astype("float32")
    files = {}
    for kind, subtype in FORMATS:
        path = folder / f"{kind}-{subtype}"
        soundfile.write(path, samples, 16_000, format=kind, subtype=subtype)
        files[path.name] = path.read_bytes()
    return files


@bounded
@given(st.data())
def test_a_damaged_recording_is_read_or_refused_by_its_path(
    recordings: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(recordings)))
    path = tmp_path / "damaged.wav"
    path.write_bytes(data.draw(damaged(recordings[name])))
    samples = right_or_named(lambda: read_audio(path, 8000), str(path))
    assert samples is None or (samples.ndim == 1 and samples.size and np.abs(samples).max() <= 2 * MAX_ABS_SAMPLE)


@bounded
@given(st.binary(max_size=2000))
def test_bytes_that_are_no_recording_are_refused_by_their_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bytes.flac"
    path.write_bytes(content)
    assert right_or_named(lambda: read_audio(path, 8000), str(path)) is None
