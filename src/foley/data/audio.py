"""Audio files, read and written: every format in, finite float32 out, and WAV with headroom back.

The content decides the format, not the file's name. Channels are averaged (six as well as two), which keeps the range
[-1, 1]; other rates go through a polyphase Kaiser filter. Floating files keep samples beyond 1, up to a limit. What
cannot be used is refused with its path.
"""

import math
import re
from pathlib import Path

import numpy as np
import soundfile
from torch import Tensor

from foley.core.files import atomic_write
from foley.core.rates import FloatArray, resample

MAX_ABS_SAMPLE = 16.0
PEAK_CEILING = 10 ** (-1 / 20)
"""-1 dBFS: louder audio is attenuated to this peak, quieter audio is never made louder."""

_DURATION_TOLERANCE_SECONDS = 0.1
# What libsndfile reports of a data chunk that ends early, and the size that a streaming writer puts there.
_SIZE_DISAGREES = re.compile(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_BYTES = 0x7FFFFFFF


class AudioError(RuntimeError):
    """A clip that cannot be used; the message starts with its path."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


def read_audio(
    path: Path,
    sample_rate_hz: int,
    max_duration_seconds: float | None = None,
    expected_seconds: float | None = None,
) -> FloatArray:
    """Mono samples `[T]` of the file at `path`, at `sample_rate_hz`; takes and raises what `read_channels` does."""
    samples, rate = read_channels(path, max_duration_seconds, expected_seconds)
    return resample(mix_down(samples), rate, sample_rate_hz)


def read_channels(
    path: Path, max_duration_seconds: float | None = None, expected_seconds: float | None = None
) -> tuple[FloatArray, int]:
    """Samples `[T, channels]` of the file at `path` as they are stored, and their rate.

    Args:
        max_duration_seconds: read no more than the beginning of this length.
        expected_seconds: the duration that the manifest promises; a clip that is shorter is truncated.

    Raises:
        AudioError: missing, empty, truncated or undecodable file; NaN, Inf or samples beyond `MAX_ABS_SAMPLE`.
    """
    try:
        with open_audio(path, expected_seconds) as file:
            rate = file.samplerate
            limit = file.frames if max_duration_seconds is None else math.ceil(max_duration_seconds * rate)
            wanted = min(file.frames, limit)
            samples = file.read(wanted, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise AudioError(path, f"cannot be decoded ({error})") from error
    _refuse_truncated(path, len(samples) / rate, wanted / rate)
    check_samples(path, samples)
    return samples, rate


def open_audio(path: Path, expected_seconds: float | None = None) -> soundfile.SoundFile:
    """The file, opened, with its header checked; raises AudioError as `read_audio` does."""
    if not path.is_file():
        raise AudioError(path, "the file does not exist")
    if path.stat().st_size == 0:
        raise AudioError(path, "is empty")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.SoundFileError as error:
        raise AudioError(path, f"cannot be decoded ({error})") from error
    try:
        if file.frames == 0:
            raise AudioError(path, "holds no samples")
        here = file.frames / file.samplerate
        _refuse_truncated(path, here, max(expected_seconds or 0.0, here * _missing_factor(file)))
    except AudioError:
        file.close()
        raise
    return file


def _missing_factor(file: soundfile.SoundFile) -> float:
    """By how much the header of an uncompressed file says it is longer; streamed files, which do not know, give 1."""
    match = _SIZE_DISAGREES.search(file.extra_info)
    if match is None or int(match[1]) >= _UNKNOWN_BYTES or int(match[2]) == 0:
        return 1.0
    return int(match[1]) / int(match[2])


def _refuse_truncated(path: Path, here_seconds: float, promised_seconds: float) -> None:
    if here_seconds < promised_seconds - _DURATION_TOLERANCE_SECONDS:
        raise AudioError(path, f"is truncated: it holds {here_seconds:.3f} of {promised_seconds:.3f} s")


def check_samples(path: Path | str, samples: FloatArray) -> None:
    """Refuse samples that no recording holds; raises AudioError."""
    if samples.size == 0:
        raise AudioError(path, "holds no samples")
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        raise AudioError(path, "holds NaN or infinite samples")
    if peak > MAX_ABS_SAMPLE:
        raise AudioError(path, f"holds a sample of {peak:.3g}, beyond the limit of {MAX_ABS_SAMPLE:g}")


def mix_down(samples: FloatArray) -> FloatArray:
    """`[T, channels]` to `[T]`: the mean of the channels."""
    mono: FloatArray = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    return mono


def write_wav(path: Path, audio: Tensor, sample_rate_hz: int, peak_ceiling: float = PEAK_CEILING) -> float:
    """Write `audio` `[T]` or `[channels, T]` as PCM16, atomically; returns the gain applied (1 or less).

    Audio read from PCM16 comes back bit by bit with an infinite `peak_ceiling`: nothing is attenuated then, and what
    exceeds full scale is clipped. Raises ValueError where a sample is not finite; nothing is written then.
    """
    return _write(path, audio, sample_rate_hz, peak_ceiling, "WAV")


def write_flac(path: Path, audio: Tensor, sample_rate_hz: int) -> float:
    """As `write_wav` writes with its default ceiling, in about half the space."""
    return _write(path, audio, sample_rate_hz, PEAK_CEILING, "FLAC")


def _write(path: Path, audio: Tensor, sample_rate_hz: int, peak_ceiling: float, kind: str) -> float:
    if not bool(audio.isfinite().all()):
        raise ValueError(f"{path}: refusing to write audio that holds NaN or infinity")
    peak = float(audio.abs().max()) if audio.numel() else 0.0
    gain = min(1.0, peak_ceiling / peak) if peak else 1.0
    samples = (audio * gain).float().cpu().numpy().T

    def write(temporary: Path) -> None:
        soundfile.write(temporary, samples, sample_rate_hz, subtype="PCM_16", format=kind)

    atomic_write(path, write)
    return gain
