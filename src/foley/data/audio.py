"""Audio files, read and written: every format in, finite float32 out, and WAV with headroom back.

The content decides the format, not the file's name. Channels are averaged (six as well as two), which keeps the range
[-1, 1], with a warning where that loses the sound, or kept where they are wanted; other rates go through a polyphase
Kaiser filter. Floating files keep samples beyond 1, up to a limit. What cannot be used is refused with its path, and no
header is believed: samples are read in blocks until they end.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

import numpy as np
import soundfile
import torch
from torch import Tensor

from foley.core.channels import (
    ChannelsError,
    check_downmix,
    doubled_recordings,
    fit_channels,
    lossy_mixes,
    mix_down,
)
from foley.core.files import atomic_write
from foley.core.rates import HIGHEST_RATE_HZ, LOWEST_RATE_HZ, FloatArray, is_sample_rate, resample
from foley.core.remote import read_bytes, url_of

MAX_ABS_SAMPLE = 16.0
PEAK_CEILING = 10 ** (-1 / 20)
"""-1 dBFS: louder audio is attenuated to this peak, quieter audio is never made louder."""

_DURATION_TOLERANCE_SECONDS = 0.1
# What libsndfile reports of a data chunk that ends early, and the size that a streaming writer puts there.
_SIZE_DISAGREES = re.compile(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_BYTES = 0x7FFFFFFF
# FLAC's longest frames of silence hold 5,461 samples a byte; nothing holds more.
_MOST_FRAMES_PER_BYTE = 6000
_MOST_SAMPLES = 1 << 29  # of all channels: 2 GiB of float32
_BLOCK_SAMPLES = 1 << 22


class AudioError(RuntimeError):
    """A clip that cannot be used; the message starts with its path."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


class NotFiniteError(AudioError):
    """A clip with NaN or infinite samples."""


def read_audio(
    path: Path,
    sample_rate_hz: int,
    max_duration_seconds: float | None = None,
    expected_seconds: float | None = None,
    downmix: str = "mean",
    channels: int = 1,
) -> FloatArray:
    """Samples of the file at `path` as `fitted` makes them; takes and raises what `read_channels` does.

    Args:
        downmix: how several channels become one: "mean", "loudest", the one with the most energy, or "refuse", which
            raises AudioError.
        channels: as `fitted` takes it; 1 is mono.
    """
    check_downmix(downmix)
    samples, rate = read_channels(path, max_duration_seconds, expected_seconds)
    return fitted(samples, rate, str(path), sample_rate_hz, channels, downmix)


def fitted(
    samples: FloatArray, rate_hz: int, name: str, sample_rate_hz: int, channels: int = 1, downmix: str = "mean"
) -> FloatArray:
    """Stored samples `[T, any number]` at `sample_rate_hz`: mono `[T]`, or `[channels, T]` where several are wanted.

    A mean that loses the sound (`foley.core.channels.loss_of_mean`) is warned of, and a mono recording that is to have
    several channels. Raises AudioError, which calls it `name`, for channels that "refuse" does not mix.
    """
    if samples.shape[1] != channels and downmix == "mean":
        lossy_mixes.note(name, samples)
    if samples.shape[1] == 1 < channels:
        doubled_recordings.note(name, channels)
    with _naming(name):
        return resample(fit_channels(samples, channels, downmix), rate_hz, sample_rate_hz)


@contextmanager
def _naming(name: Path | str) -> Iterator[None]:
    """A block that mixes the channels of a recording: where these are refused, AudioError names it."""
    try:
        yield
    except ChannelsError as error:
        raise AudioError(name, str(error)) from error


def read_channels(
    path: Path,
    max_duration_seconds: float | None = None,
    expected_seconds: float | None = None,
    downmix: str | None = None,
) -> tuple[FloatArray, int]:
    """Samples `[T, channels]` of the file at `path` as they are stored, and their rate.

    Args:
        max_duration_seconds: read no more than the beginning of this length.
        expected_seconds: the duration that the manifest promises; a clip that is shorter is truncated.
        downmix: how several channels become one `[T, 1]`; None leaves them apart.

    Raises:
        AudioError: missing, empty, truncated or undecodable file; a header that cannot be true; more than 2 GiB of
            samples; NaN, Inf or samples beyond `MAX_ABS_SAMPLE`; channels that `downmix="refuse"` does not mix.
        ValueError: an unknown `downmix`.
    """
    with open_audio(path, expected_seconds) as file:
        samples, rate = decode(file, path, max_duration_seconds), file.samplerate
    with _naming(path):
        return samples if downmix is None else mix_down(samples, downmix)[:, None], rate


def read_encoded(content: bytes, name: str, max_duration_seconds: float | None = None) -> tuple[FloatArray, int]:
    """Samples `[T, channels]` of a file that is in memory, and their rate; raises AudioError, which calls it `name`."""
    try:
        with soundfile.SoundFile(BytesIO(content)) as file:
            _check_header(name, file, len(content))
            return decode(file, name, max_duration_seconds), file.samplerate
    except soundfile.SoundFileError as error:
        raise AudioError(name, f"cannot be decoded ({error})") from error


def decode(file: soundfile.SoundFile, path: Path | str, max_duration_seconds: float | None = None) -> FloatArray:
    """Samples `[T, channels]` of an opened file, checked; raises AudioError, which calls it `path`."""
    limit = file.frames if max_duration_seconds is None else math.ceil(max_duration_seconds * file.samplerate)
    wanted = min(file.frames, limit)
    if wanted * file.channels > _MOST_SAMPLES:
        raise AudioError(
            path,
            f"lasts {wanted / file.samplerate:.0f} s in {file.channels} channels, more than the 2 GiB of samples that "
            "are read at once; cut it into parts",
        )
    try:
        samples = np.concatenate(list(_blocks(file, wanted)))
    except soundfile.SoundFileError as error:
        raise AudioError(path, f"cannot be decoded ({error})") from error
    _refuse_truncated(path, len(samples) / file.samplerate, wanted / file.samplerate)
    check_samples(path, samples)
    return samples


def _blocks(file: soundfile.SoundFile, frames: int) -> Iterator[FloatArray]:
    """`[T, channels]` each, up to `frames` in all: memory follows what is there, not what a header declares."""
    most, got = max(1, _BLOCK_SAMPLES // file.channels), 1
    while got:
        block = file.read(min(most, frames), dtype="float32", always_2d=True)
        yield block
        frames, got = frames - len(block), len(block)


def open_audio(path: Path, expected_seconds: float | None = None) -> soundfile.SoundFile:
    """The file, opened, with its header checked; raises AudioError as `read_channels` does."""
    source, num_bytes = _source(path)
    if num_bytes == 0:
        raise AudioError(path, "is empty")
    try:
        file = soundfile.SoundFile(source)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a .raw file, whose rate nothing says
        raise AudioError(path, f"cannot be decoded ({error})") from error
    try:
        _check_header(path, file, num_bytes)
        here = file.frames / file.samplerate
        _refuse_truncated(path, here, max(expected_seconds or 0.0, here * _missing_factor(file)))
    except AudioError:
        file.close()
        raise
    return file


def _source(path: Path) -> tuple[Path | BytesIO, int]:
    """What libsndfile opens, and its size in bytes: the file, or what is at the URL that the path stands for."""
    try:
        if url_of(path) is not None:
            content = read_bytes(path)
            return BytesIO(content), len(content)
        if not path.is_file():
            raise FileNotFoundError
        path.open("rb").close()  # libsndfile would only say "System error."
        return path, path.stat().st_size
    except FileNotFoundError as error:
        raise AudioError(path, "the file does not exist") from error
    except OSError as error:
        raise AudioError(path, f"cannot be opened ({error.strerror or error})") from error


def _check_header(path: Path | str, file: soundfile.SoundFile, num_bytes: int) -> None:
    if file.frames == 0:
        raise AudioError(path, "holds no samples")
    if not is_sample_rate(file.samplerate):
        raise AudioError(
            path,
            f"declares a rate of {file.samplerate} Hz; recordings have between {LOWEST_RATE_HZ} and "
            f"{HIGHEST_RATE_HZ} Hz, so its header is damaged",
        )
    if file.frames > num_bytes * _MOST_FRAMES_PER_BYTE:
        raise AudioError(path, f"declares {file.frames} samples in {num_bytes} bytes, so its header is damaged")


def _missing_factor(file: soundfile.SoundFile) -> float:
    """By how much the header of an uncompressed file says it is longer; streamed files, which do not know, give 1."""
    match = _SIZE_DISAGREES.search(file.extra_info)
    if match is None or int(match[1]) >= _UNKNOWN_BYTES or int(match[2]) == 0:
        return 1.0
    return int(match[1]) / int(match[2])


def _refuse_truncated(path: Path | str, here_seconds: float, promised_seconds: float) -> None:
    if here_seconds < promised_seconds - _DURATION_TOLERANCE_SECONDS:
        raise AudioError(path, f"is truncated: it holds {here_seconds:.3f} of {promised_seconds:.3f} s")


def check_samples(path: Path | str, samples: FloatArray) -> None:
    """Refuse samples that no recording holds; raises AudioError."""
    if samples.size == 0:
        raise AudioError(path, "holds no samples")
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        raise NotFiniteError(path, "holds NaN or infinite samples")
    if peak > MAX_ABS_SAMPLE:
        raise AudioError(path, f"holds a sample of {peak:.3g}, beyond the limit of {MAX_ABS_SAMPLE:g}")


FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
"""By the ending of a file, libsndfile's names of what is in it."""
_RATES_HZ = {
    "opus": (8000, 12000, 16000, 24000, 48000),
    "mp3": (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
}
NO_TAGS: Mapping[str, str] = MappingProxyType({})


def read_tags(path: Path) -> dict[str, str]:
    """What a file says of itself: INFO of WAV, Vorbis comments of FLAC, OGG and Opus, ID3 of MP3; raises AudioError.

    The names are libsndfile's, such as `title` and `comment`.
    """
    with open_audio(path) as file:
        return {name: text for name, text in file.copy_metadata().items() if text}


def write_wav(
    path: Path,
    audio: Tensor,
    sample_rate_hz: int,
    peak_ceiling: float = PEAK_CEILING,
    tags: Mapping[str, str] = NO_TAGS,
) -> float:
    """Write `audio` `[T]` or `[channels, T]` as PCM16, atomically; returns the gain applied (1 or less).

    Audio read from PCM16 comes back bit by bit with an infinite `peak_ceiling`: nothing is attenuated then, and what
    exceeds full scale is written as 32-bit floats, which hold it. Tags change no sample. Raises ValueError where a
    sample is not finite; nothing is written then.

    Args:
        tags: what `read_tags` is to give back.
    """
    return _write(path, audio, sample_rate_hz, peak_ceiling, "wav", tags)


def write_flac(path: Path, audio: Tensor, sample_rate_hz: int) -> float:
    """As `write_wav` writes with its default ceiling, in about half the space."""
    return _write(path, audio, sample_rate_hz, PEAK_CEILING, "flac", NO_TAGS)


def encode_audio(
    audio: Tensor,
    sample_rate_hz: int,
    file_format: str = "wav",
    peak_ceiling: float = PEAK_CEILING,
    tags: Mapping[str, str] = NO_TAGS,
) -> bytes:
    """`audio` as `write_wav` takes it, as the content of a file: wav, flac, ogg, opus or mp3, with its tags.

    Opus and MP3 know few rates: others are resampled to the next one above. Raises ValueError for an unknown format,
    and as `write_wav` does.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format={file_format!r}: give {', '.join(FORMATS)}")
    known = _RATES_HZ.get(file_format, (sample_rate_hz,))
    rate = next((rate for rate in known if rate >= sample_rate_hz), known[-1])
    if rate != sample_rate_hz:
        audio = torch.from_numpy(resample(audio.float().cpu().numpy(), sample_rate_hz, rate))
    # Only WAV holds more than full scale; measured last, for a filter overshoots.
    samples, _ = _levelled(audio, peak_ceiling if file_format == "wav" else min(peak_ceiling, 1.0), "the audio")
    content = BytesIO()
    _store(content, samples, rate, file_format, tags)
    return content.getvalue()


def _write(
    path: Path, audio: Tensor, sample_rate_hz: int, peak_ceiling: float, file_format: str, tags: Mapping[str, str]
) -> float:
    samples, gain = _levelled(audio, peak_ceiling, path)
    atomic_write(path, lambda temporary: _store(temporary, samples, sample_rate_hz, file_format, tags))
    return gain


def _levelled(audio: Tensor, peak_ceiling: float, name: Path | str) -> tuple[FloatArray, float]:
    """Samples `[T]` or `[T, channels]` below the ceiling, and the gain that brings them there."""
    if not bool(audio.isfinite().all()):
        raise ValueError(f"{name}: refusing to write audio that holds NaN or infinity")
    gain = gain_below(audio, peak_ceiling)
    return (audio * gain).float().cpu().numpy().T, gain


def gain_below(audio: Tensor, peak_ceiling: float) -> float:
    """What brings the audio's peak down to the ceiling; 1 where it is below.

    >>> gain_below(torch.tensor([0.1, -2.0]), peak_ceiling=1.0)
    0.5
    """
    peak = float(audio.abs().max()) if audio.numel() else 0.0
    return min(1.0, peak_ceiling / peak) if peak else 1.0


def _store(
    target: Path | BytesIO, samples: FloatArray, sample_rate_hz: int, file_format: str, tags: Mapping[str, str]
) -> None:
    container, subtype = FORMATS[file_format]
    if file_format == "wav" and samples.size and float(np.abs(samples).max()) > 1:
        subtype = "FLOAT"
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(target, "w", sample_rate_hz, channels, subtype, format=container) as file:
        for name, text in tags.items():
            if text:  # libsndfile takes no empty one
                setattr(file, name, text)
        # In blocks: libsndfile's encoder of Vorbis overflows its stack with more.
        for start in range(0, len(samples), _BLOCK_SAMPLES // channels):
            file.write(samples[start : start + _BLOCK_SAMPLES // channels])
