"""What one hears, measured by itself: a row of measurements and findings for each clip of a folder or a manifest."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from foley.core.channels import mix_down
from foley.core.config import CONFIG_DIR
from foley.core.files import AUDIO_SUFFIXES
from foley.core.numbers import COUNT, NOT_NEGATIVE, SHARE, NumberRange
from foley.core.rates import FloatArray
from foley.data.audio import AudioError, NotFiniteError, read_channels
from foley.metrics.features import find_sounds
from foley.metrics.loudness import decibels, integrated_loudness, true_peak
from foley.metrics.repeats import LONGEST_SECONDS, Repeat, Spectrum, band_spectrum, find_repeats, loop_seconds
from foley.metrics.waveform import (
    clipped_runs,
    compare_channels,
    dc_offset,
    find_bandwidth,
    find_clicks,
    find_silence,
)

FINDINGS = {
    "unreadable": "cannot be decoded, is empty or truncated",
    "not_finite": "holds NaN or infinity",
    "silent": "no sample rises above the level of silence",
    "clipping": "samples in a row at full scale, or flat tops below it",
    "click_start": "begins with a jump from zero",
    "click_end": "ends with a jump to zero",
    "click_inside": "a jump inside that nothing around it explains",
    "dc_offset": "a channel's mean is not zero",
    "true_peak": "exceeds full scale between samples",
    "antiphase": "channels cancel out in mono",
    "silent_channel": "a channel of several is silent",
    "band_limited": "nothing above half of a lower rate, as in upsampled and lossy files",
    "repeat": "another clip, up to gain and shift",
    "loop": "repeats itself to the sample",
    "leading_silence": "long silence before the sound",
    "trailing_silence": "long silence behind the sound",
    "mostly_silent": "silence for most of its length",
    "mono_as_stereo": "several channels that hold one sound",
    "too_quiet": "hardly heard",
    "too_loud": "louder than loud masters",
}
"""What a clip can have, the worst first, in words."""

_DECIBELS = NumberRange(least=-200, most=60)
_CORRELATION = NumberRange(least=-1, most=1)
_RANGES = {
    "clipping_run_samples": NumberRange(least=2, whole=True),
    "flat_tops": COUNT,
    **dict.fromkeys(("dc_offset", "least_jump", "silent_share", "cutoff_share"), SHARE),
    **dict.fromkeys(("repeat_similarity", "loop_similarity"), SHARE),
    **dict.fromkeys(("mono_correlation", "antiphase_correlation"), _CORRELATION),
    **dict.fromkeys(("silence_dbfs", "silent_dbfs", "quiet_lufs", "loud_lufs", "true_peak_dbtp"), _DECIBELS),
}


@dataclass(frozen=True)
class AuditLimits:
    """From where on a measurement is a finding; the numbers, and why, are in configs/options/audit.yaml.

    Raises ValueError, which names the limit, for a number that it cannot be.
    """

    clipping_run_samples: int
    flat_tops: int
    dc_offset: float
    ends_ratio: float
    inside_ratio: float
    least_jump: float
    silence_dbfs: float
    silent_dbfs: float
    leading_silence_seconds: float
    trailing_silence_seconds: float
    silent_share: float
    quiet_lufs: float
    loud_lufs: float
    true_peak_dbtp: float
    cutoff_share: float
    cutoff_drop_db: float
    mono_correlation: float
    antiphase_correlation: float
    repeat_similarity: float
    loop_similarity: float
    loop_seconds: float

    def __post_init__(self) -> None:
        for limit in fields(self):
            _RANGES.get(limit.name, NOT_NEGATIVE).check(f"limits.{limit.name}", getattr(self, limit.name))

    @classmethod
    def shipped(cls) -> "AuditLimits":
        """Those of the config."""
        limits: AuditLimits = instantiate(OmegaConf.load(CONFIG_DIR / "options/audit.yaml"))
        return limits


@dataclass(frozen=True)
class AuditedClip:
    """A clip's name, its findings out of `FINDINGS`, what was measured, and its `spectrum` to find repeats by."""

    name: str
    findings: tuple[str, ...]
    measured: Mapping[str, Any] = field(default_factory=dict)
    spectrum: Spectrum | None = None

    def to_json(self) -> dict[str, Any]:
        """A row of the report."""
        return {"clip": self.name, "findings": list(self.findings), **self.measured}


def measure(samples: FloatArray, sample_rate_hz: int, limits: AuditLimits, whole: bool = True) -> dict[str, Any]:
    """All that is measured of samples `[T, channels]`, rounded; None stands for what a clip does not have.

    Args:
        whole: false where they are the beginning of a longer clip, whose end is not known.

    >>> tone = 0.5 * np.sin(2 * np.pi * 997 * np.arange(48000) / 48000).astype(np.float32)
    >>> row = measure(tone[:, None], 48000, AuditLimits.shipped())
    >>> row["peak_dbfs"], row["loudness_lufs"], row["click_start"]
    (-6.02, -9.07, False)
    """
    full, flat = clipped_runs(samples, limits.clipping_run_samples)
    clicks = find_clicks(samples, sample_rate_hz, limits.ends_ratio, limits.inside_ratio, limits.least_jump)
    silence = find_silence(samples, sample_rate_hz, 10 ** (limits.silence_dbfs / 20))
    loudest = mix_down(samples, "loudest")
    band, channels = find_bandwidth(loudest, sample_rate_hz, limits.cutoff_share), compare_channels(samples)
    loudness, beginning = integrated_loudness(samples, sample_rate_hz), _beginning(loudest, sample_rate_hz)
    loop = loop_seconds(beginning, sample_rate_hz, limits.loop_similarity, limits.loop_seconds)
    return {
        "duration_seconds": round(len(samples) / sample_rate_hz, 4),
        "sample_rate_hz": sample_rate_hz,
        "channels": samples.shape[1],
        **({} if whole else {"heard": "its beginning"}),
        "peak_dbfs": decibels(float(np.abs(samples).max())),
        "true_peak_dbtp": decibels(true_peak(samples, sample_rate_hz)),
        "loudness_lufs": None if loudness is None else round(loudness, 2),
        "clipped_runs": full,
        "flat_tops": flat,
        "dc_offset": round(dc_offset(samples), 5),
        "click_start": clicks.start,
        "click_end": clicks.end and whole,
        "clicks_inside": clicks.inside,
        "start_jump_db": decibels(clicks.start_jump),
        "end_jump_db": decibels(clicks.end_jump) if whole else None,
        "silent_share": round(silence.share, 4),
        "leading_silence_seconds": round(silence.leading_seconds, 4),
        "trailing_silence_seconds": round(silence.trailing_seconds, 4),
        "bandwidth_hz": round(band.bandwidth_hz, 1),
        "cutoff_hz": None if band.cutoff_hz is None else round(band.cutoff_hz, 1),
        "cutoff_drop_db": None if band.cutoff_drop_db is None else round(band.cutoff_drop_db, 1),
        "silent_channels": channels.silent,
        "correlation": None if channels.correlation is None else round(channels.correlation, 4),
        "loop_seconds": None if loop is None else round(loop, 4),
    }


def findings(row: Mapping[str, Any], limits: AuditLimits) -> tuple[str, ...]:
    """What is wrong with a clip by what `measure` says of it, the worst first; a silent one has nothing else."""
    if row["peak_dbfs"] is None or row["peak_dbfs"] < limits.silent_dbfs:
        return ("silent",)
    loudness, correlation = row["loudness_lufs"], row["correlation"]
    holds = {
        "clipping": row["clipped_runs"] > 0 or row["flat_tops"] >= limits.flat_tops,
        "click_start": row["click_start"],
        "click_end": row["click_end"],
        "click_inside": row["clicks_inside"] > 0,
        "dc_offset": abs(row["dc_offset"]) > limits.dc_offset,
        "true_peak": row["true_peak_dbtp"] > limits.true_peak_dbtp,
        "antiphase": correlation is not None and correlation < limits.antiphase_correlation,
        "silent_channel": row["silent_channels"] > 0,
        "band_limited": row["cutoff_hz"] is not None and row["cutoff_drop_db"] > limits.cutoff_drop_db,
        "loop": row["loop_seconds"] is not None,
        "leading_silence": row["leading_silence_seconds"] > limits.leading_silence_seconds,
        "trailing_silence": row["trailing_silence_seconds"] > limits.trailing_silence_seconds,
        "mostly_silent": row["silent_share"] > limits.silent_share,
        "mono_as_stereo": correlation is not None and correlation >= limits.mono_correlation,
        "too_quiet": loudness is not None and loudness < limits.quiet_lufs,
        "too_loud": loudness is not None and loudness > limits.loud_lufs,
    }
    return tuple(name for name, holds_it in holds.items() if holds_it)


def _beginning(channel: FloatArray, sample_rate_hz: int) -> FloatArray:
    return channel[: round(LONGEST_SECONDS * sample_rate_hz)]


class ClipsToAudit:
    """Files as a loader's processes read and measure them: `clips[i]` is an `AuditedClip`.

    Args:
        names: of the clips, by which the report calls them.
        longest_seconds: of a file; of a longer one the beginning is measured.
    """

    def __init__(
        self, files: Sequence[Path], names: Sequence[str], limits: AuditLimits, longest_seconds: float
    ) -> None:
        self.files, self.names, self.limits, self.longest_seconds = files, names, limits, longest_seconds

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> AuditedClip:
        name = self.names[index]
        try:
            samples, rate = read_channels(self.files[index], self.longest_seconds)
        except NotFiniteError as error:
            return AuditedClip(name, ("not_finite",), {"reason": error.reason})
        except AudioError as error:
            return AuditedClip(name, ("unreadable",), {"reason": error.reason})
        whole = len(samples) < self.longest_seconds * rate
        row = measure(samples, rate, self.limits, whole)
        return AuditedClip(name, findings(row, self.limits), row, band_spectrum(_loudest(samples, rate), rate))


def _loudest(samples: FloatArray, sample_rate_hz: int) -> FloatArray:
    return _beginning(mix_down(samples, "loudest"), sample_rate_hz)


@dataclass(frozen=True)
class Audit:
    """The clips of a folder with their findings, in its order."""

    clips: Sequence[AuditedClip]

    @property
    def counts(self) -> dict[str, int]:
        """Of clips with each finding that is met, the worst first."""
        met = Counter(name for clip in self.clips for name in clip.findings)
        return {name: met[name] for name in FINDINGS if met[name]}

    @property
    def num_found(self) -> int:
        """Clips with any finding."""
        return sum(bool(clip.findings) for clip in self.clips)

    @property
    def num_without_loudness(self) -> int:
        """Clips that are read and heard, and too short to have a loudness."""
        heard = [clip for clip in self.clips if clip.measured.get("peak_dbfs") is not None]
        return sum(clip.measured["loudness_lufs"] is None for clip in heard)

    def worst(self, most: int) -> list[AuditedClip]:
        """Clips with findings: those with the worst finding first, and of these the ones with the most."""
        rank = {name: place for place, name in enumerate(FINDINGS)}
        found = [clip for clip in self.clips if clip.findings]
        return sorted(found, key=lambda clip: (rank[clip.findings[0]], -len(clip.findings)))[:most]

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "clips": len(self.clips),
            "clips_with_findings": self.num_found,
            "clips_without_loudness": self.num_without_loudness,
            "counts": self.counts,
        }


def in_words(summary: Mapping[str, Any]) -> str:
    """What `Audit.summary` says, as a sentence.

    >>> in_words({"clips": 8, "clips_with_findings": 2, "counts": {"clipping": 1, "loop": 2}})
    'audit: 2 of 8 clips have findings (1 clipping, 2 loop)'
    """
    if not summary["counts"]:
        return f"audit: nothing found in {summary['clips']} clips"
    counted = ", ".join(f"{count} {name}" for name, count in summary["counts"].items())
    return f"audit: {summary['clips_with_findings']} of {summary['clips']} clips have findings ({counted})"


def sound_files(folder: Path) -> list[Path]:
    """Every sound below a folder, in order, those in formats that are not decoded among them; hidden files are not.

    Raises FileNotFoundError where there is no folder, or no sound in it.
    """
    sounds, _ = find_sounds(folder)
    if not sounds:
        raise FileNotFoundError(f"{folder} holds no sound ({', '.join(sorted(AUDIO_SUFFIXES))}); check the path")
    return sounds


def audit_files(
    files: Sequence[Path],
    limits: AuditLimits,
    root: Path | None = None,
    num_workers: int = 0,
    longest_seconds: float = 600.0,
) -> Audit:
    """Read and measure every file, and find clips that repeat another; few are in memory at a time.

    Args:
        root: what is left out of the clips' names.
        num_workers: processes that read and measure; 0 does it in this one. The report is the same with any number.
        longest_seconds: of a file, which bounds the memory of a process; of longer ones the beginning is heard.
    """
    names = [str(file.relative_to(root)) if root and file.is_relative_to(root) else str(file) for file in files]
    clips = list(_audited(ClipsToAudit(files, names, limits, longest_seconds), num_workers))

    @lru_cache(maxsize=8)
    def beginning(index: int) -> tuple[FloatArray, int]:
        samples, rate = read_channels(files[index], LONGEST_SECONDS)
        return _loudest(samples, rate), rate

    repeats = find_repeats([clip.spectrum for clip in clips], beginning, limits.repeat_similarity)
    return Audit([_with_repeat(clip, repeats.get(place), names) for place, clip in enumerate(clips)])


def _audited(clips: ClipsToAudit, num_workers: int) -> Iterator[AuditedClip]:
    loader: Any = DataLoader(clips, batch_size=None, num_workers=num_workers)  # type: ignore[arg-type]
    columns = (TextColumn("listening"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]}")) as progress:
        task = progress.add_task("", total=len(clips), rate="")
        for clip in loader:
            yield clip
            speed = progress.tasks[task].speed
            progress.update(task, advance=1, rate="" if speed is None else f"{speed:.3g} clips/s")


def _with_repeat(clip: AuditedClip, repeat: Repeat | None, names: Sequence[str]) -> AuditedClip:
    if repeat is None:
        return clip
    facts = {**asdict(repeat), "of": names[repeat.of], "similarity": round(repeat.similarity, 4)}
    found = {*clip.findings, "repeat"}
    return AuditedClip(clip.name, tuple(name for name in FINDINGS if name in found), {**clip.measured, "repeat": facts})
