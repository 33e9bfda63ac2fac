"""Audio to files."""

from pathlib import Path

import soundfile
from torch import Tensor

from foley.files import atomic_write

PEAK_CEILING = 10 ** (-1 / 20)
"""-1 dBFS: louder audio is attenuated to this peak, quieter audio is never made louder."""


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
