"""`Generation`: the clips that came out, and the folder of WAV, JSON, spectrograms and a page that they become."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foley.accel.cost import tmacs
from foley.core.devices import synchronise
from foley.core.files import sample_stem, write_json, write_text
from foley.core.logs import get_logger
from foley.data.audio import PEAK_CEILING, encode_audio, gain_below, write_wav
from foley.data.dataset import gain_to_decibels
from foley.generation.marking import origin_tags
from foley.generation.prompts import Clip
from foley.metrics.latency import RealTimeFactor, real_time_factor
from foley.metrics.loudness import Levelling, level_to
from foley.reporting.plots import draw_sheet
from foley.reporting.samples import MAX_SHEET_CLIPS, PAGE_FILE, SHEET_FILE, Card, count_sounds, draw_card, render_page

_log = get_logger(__name__)


@dataclass
class Timings:
    """Wall-clock seconds spent in each stage of a generation, all clips together."""

    encode_seconds: float = 0.0
    text_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        return self.encode_seconds + self.text_seconds + self.denoise_seconds + self.decode_seconds

    @contextmanager
    def measured(self, field: str, device: torch.device) -> Iterator[None]:
        """Add the block's duration to `field`; waits for the GPU so that stages are told apart."""
        start = time.perf_counter()
        yield
        synchronise(device)
        setattr(self, field, getattr(self, field) + time.perf_counter() - start)


@dataclass(frozen=True)
class Generation:
    """What came out: a row of `audio` for each clip, and all it takes to make it again.

    Args:
        clips: as asked for; their notes also say where a prompt lies outside the training of the system.
        audio: `[N, channels, T]` on the CPU. RuntimeError where it is not finite.
        settings: what the JSON of each clip says of how it was made.
        peak_ceiling: as `foley.data.audio.write_wav` takes it.
        generated_gains: `[N]`, by which what was generated has been attenuated already, beside kept audio; None, and 1,
            where it has not.
        machine: what computed it, see `foley.core.devices.machine_name`.
        batch_size: the most clips that were denoised together.

    Clips beyond full scale are warned of as they are written. In memory they stay as they are; written, they are
    attenuated, or brought to the `loudness_lufs` of the settings, and an edit, whose kept samples stay as they were,
    becomes a file of 32-bit floats.
    """

    clips: Sequence[Clip]
    audio: Tensor
    sample_rate_hz: int
    settings: Mapping[str, Any]
    timings: Timings
    peak_ceiling: float = PEAK_CEILING
    generated_gains: Tensor | None = None
    machine: str = ""
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not bool(self.audio.isfinite().all()):
            solver, num_steps, scale = (self.settings[key] for key in ("solver", "num_steps", "guidance_scale"))
            raise RuntimeError(
                f"solver {solver!r} with {num_steps} steps and guidance scale {scale} gave audio that is not finite; "
                "lower the guidance scale, or take more steps"
            )

    @property
    def real_time_factor(self) -> float:
        """RTF: seconds of computing for a second of audio, all clips together; below 1 is faster than it sounds."""
        audio_seconds = len(self.clips) * self.audio.shape[-1] / self.sample_rate_hz
        return real_time_factor(self.timings.total_seconds, audio_seconds)

    @property
    def rtf(self) -> RealTimeFactor:
        """The same, with the machine and the batch that it is of."""
        return RealTimeFactor(self.real_time_factor, self.machine, self.batch_size)

    @property
    def tmacs(self) -> float | None:
        """Of the denoising of all clips together; None where nothing was counted, as without any accelerator."""
        macs = self.settings.get("macs")  # of one clip
        return None if macs is None else tmacs(len(self.clips) * macs)

    def write(self, directory: str | Path, title: str | None = None) -> tuple[Path, list[Card]]:
        """Write WAV, JSON and spectrogram of each clip, a sheet and the page; returns the page and the cards on it."""
        directory = Path(directory)
        self.warn_of_levels()
        facts = {"timings_of_all_samples": asdict(self.timings), "num_samples": len(self.clips)}
        cards = []
        for row, clip in enumerate(self.clips):
            stem = self.write_clip(directory, row, row, facts)
            cards.append(draw_card(directory, stem, clip.prompt, clip.seed, self._levelled(row), self.sample_rate_hz))
        shown = range(0, len(self.clips), ceil(len(self.clips) / MAX_SHEET_CLIPS))
        waves, prompts = [self._waveform(row) for row in shown], [self.clips[row].prompt for row in shown]
        draw_sheet(directory / SHEET_FILE, waves, prompts, self.sample_rate_hz)
        page = directory / PAGE_FILE
        write_text(page, render_page(title or count_sounds(len(self.clips)), self.settings, cards, rtf=self.rtf))
        return page, cards

    def part(self, first: int, last: int) -> "Generation":
        """The clips `[first, last)`, with their share of the time."""
        share = (last - first) / len(self.clips)
        timings = Timings(**{name: share * seconds for name, seconds in asdict(self.timings).items()})
        gains = None if self.generated_gains is None else self.generated_gains[first:last]
        # A copy, that the others are not kept for as long as these.
        audio = self.audio[first:last].clone()
        return replace(self, timings=timings, clips=self.clips[first:last], audio=audio, generated_gains=gains)

    def write_clip(
        self,
        directory: Path,
        row: int,
        index: int,
        facts: Mapping[str, Any] | None = None,
    ) -> str:
        """Write the WAV of a row and then its JSON: where there is a JSON, the clip is whole. Returns their stem.

        Audio louder than `peak_ceiling` is attenuated to it; the JSON states the gain, and the peak before. Where the
        settings have `loudness_lufs`, the gain is that to it, and the JSON states the loudness before too.

        Args:
            index: of the clip in the folder.
            facts: what else the JSON is to say.
        """
        stem = sample_stem(self.clips[row].prompt, index, self.clips[row].seed)
        write_wav(directory / f"{stem}.wav", *self._audio(row))
        write_json(directory / f"{stem}.json", self.describe(row, index, facts))
        return stem

    def describe(self, row: int, index: int, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the JSON of a clip says; arguments are those of `write_clip`."""
        clip, levelled = self.clips[row], self._levelled(row)
        gain = gain_below(levelled, self.peak_ceiling) * self._levellings[row].gain
        levels = {"gain_db": gain_to_decibels(gain), **self._levels(row), **self._loudness(row)}
        described = {"prompt": clip.prompt, "seed": clip.seed, **levels, **clip.notes}
        return {**described, "index": index, **self.rtf.to_json(), "settings": dict(self.settings), **(facts or {})}

    def encode(self, row: int, file_format: str = "wav") -> bytes:
        """The file of a clip, as `write_clip` writes it or in another format; raises as `encode_audio` does."""
        audio, rate, ceiling, tags = self._audio(row)
        return encode_audio(audio, rate, file_format, ceiling, tags)

    def _audio(self, row: int) -> tuple[Tensor, int, float, Mapping[str, str]]:
        """What is written of a clip, and with which tags."""
        tags = origin_tags(self.clips[row].prompt, self.clips[row].seed, self.settings)
        return self._levelled(row), self.sample_rate_hz, self.peak_ceiling, tags

    @property
    def _target_lufs(self) -> float | None:
        return self.settings.get("loudness_lufs")

    @cached_property
    def _levellings(self) -> list[Levelling]:
        """Of each clip, what brings it to the loudness of the settings; a gain of 1 where they name none."""
        target = self._target_lufs
        if target is None:
            return [Levelling(1.0, None)] * len(self.clips)
        clips = self.audio.float().transpose(1, 2).numpy()  # [N, T, channels]
        return [level_to(clip, self.sample_rate_hz, target, self.peak_ceiling) for clip in clips]

    def _levelled(self, row: int) -> Tensor:
        """As `_waveform`, at the loudness of its file."""
        gain = self._levellings[row].gain
        return self._waveform(row) if gain == 1.0 else gain * self._waveform(row)

    def _loudness(self, row: int) -> dict[str, Any]:
        """What the JSON says of a loudness that was asked for."""
        target = self._target_lufs
        return {} if target is None else {"loudness": self._levellings[row].to_json(target)}

    def _levels(self, row: int) -> dict[str, float]:
        """What the JSON says of the clip's level as it was generated."""
        magnitude = self.audio[row].abs()
        gain = 1.0 if self.generated_gains is None else float(self.generated_gains[row])
        return {
            "generated_gain_db": gain_to_decibels(gain),
            "peak": round(float(magnitude.max()), 6),
            "samples_over_full_scale": int((magnitude > 1).sum()),
        }

    def warn_of_levels(self) -> None:
        """Of clips beyond full scale, and of what was attenuated beside kept audio; of the loudest by name."""
        levels = [self._levels(row) for row in range(len(self.clips))]
        # At a loudness of its own a clip does not keep its level, unless it was left as it is.
        kept = [self._target_lufs is None or bool(levelling.left) for levelling in self._levellings]
        over = [row for row, level in enumerate(levels) if level["samples_over_full_scale"] and kept[row]]
        attenuated = [row for row, level in enumerate(levels) if level["generated_gain_db"] < 0]
        if over:
            loudest = max(over, key=lambda row: levels[row]["peak"])
            fate = "a file is attenuated" if isfinite(self.peak_ceiling) else "a file holds 32-bit floats"
            _log.warning(
                "%d of %d clips exceed full scale (%s): %r with seed %d peaks at %.2f, %d samples beyond it",
                *(len(over), len(levels), fate, self.clips[loudest].prompt, self.clips[loudest].seed),
                *(levels[loudest]["peak"], levels[loudest]["samples_over_full_scale"]),
            )
        if attenuated:
            most = min(attenuated, key=lambda row: levels[row]["generated_gain_db"])
            _log.warning(
                "what was generated in %d of %d edits is attenuated, to fit beside what is kept: %r by %.1f dB",
                *(len(attenuated), len(levels), self.clips[most].prompt, -levels[most]["generated_gain_db"]),
            )

        self._warn_of_loudness()

    def _warn_of_loudness(self) -> None:
        """Of clips that are not as loud as was asked for, and why."""
        target, count = self._target_lufs, len(self.clips)
        for reason in dict.fromkeys(levelling.left for levelling in self._levellings if levelling.left):
            kept = sum(levelling.left == reason for levelling in self._levellings)
            _log.warning("loudness_lufs=%g: %d of %d clips are left as they are: %s", target, kept, count, reason)
        if limited := sum(levelling.limited for levelling in self._levellings):
            _log.warning(
                "loudness_lufs=%g: %d of %d clips stay below it, with their true peak at the ceiling of %.1f dBTP",
                *(target, limited, count, gain_to_decibels(self.peak_ceiling)),
            )

    def _waveform(self, row: int) -> Tensor:
        """`[channels, T]`, a mono one `[T]`."""
        return self.audio[row, 0] if self.audio.shape[1] == 1 else self.audio[row]
