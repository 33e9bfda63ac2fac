"""The catalogue of classes, and captioned synthetic sounds drawn from seeds when asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from foley.core.seeding import numpy_generator
from foley.data.dataset import AudioItem
from foley.data.procedural import events, noise, tonal
from foley.data.procedural.captions import MIXTURE, SEQUENCE, caption, combine
from foley.data.procedural.synthesis import Signal, Timeline


@dataclass(frozen=True)
class Parameter:
    """A log-uniform range; a value in its lowest or highest third earns one of the words, for captions.

    Attributes:
        low, high: bounds, in the unit that the parameter's name ends with.
        low_words, high_words: adjectives for the lowest and for the highest third.
    """

    low: float
    high: float
    low_words: tuple[str, ...]
    high_words: tuple[str, ...]

    def value(self, position: float) -> float:
        """The value at `position` in [0, 1] of the range."""
        return self.low * (self.high / self.low) ** position

    def words(self, position: float) -> tuple[str, ...]:
        """Adjectives that are true at `position`; none in the middle third."""
        if position < 1 / 3:
            return self.low_words
        return self.high_words if position > 2 / 3 else ()


@dataclass(frozen=True)
class SoundClass:
    """One kind of sound: `render(timeline, **parameter values)` draws it."""

    render: Callable[..., Signal]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def draw(self, timeline: Timeline) -> tuple[Signal, dict[str, tuple[str, ...]]]:
        """A signal `[T]` with random parameters, and the true adjectives per caption slot (`pitch`, `rate`, ...)."""
        positions = {name: float(timeline.rng.random()) for name in self.parameters}
        values = {name: self.parameters[name].value(position) for name, position in positions.items()}
        slots = {name.removesuffix("_hz"): self.parameters[name].words(at) for name, at in positions.items()}
        return np.asarray(self.render(timeline, **values), dtype=np.float64), slots


def _pitch(low_hz: float, high_hz: float) -> Parameter:
    return Parameter(low_hz, high_hz, ("low", "low-pitched", "deep"), ("high", "high-pitched"))


def _rate(low_hz: float, high_hz: float) -> Parameter:
    return Parameter(low_hz, high_hz, ("slow", "unhurried"), ("fast", "rapid", "quick"))


def _density(low_hz: float, high_hz: float) -> Parameter:
    return Parameter(low_hz, high_hz, ("light", "gentle"), ("heavy", "intense"))


CLASSES: dict[str, SoundClass] = {
    "pure tone": SoundClass(tonal.pure_tone, {"pitch_hz": _pitch(300, 1500)}),
    "chord": SoundClass(tonal.chord, {"pitch_hz": _pitch(150, 350)}),
    "rising sweep": SoundClass(tonal.rising_sweep, {"rate_hz": _rate(0.6, 1.2)}),
    "falling sweep": SoundClass(tonal.falling_sweep, {"rate_hz": _rate(0.6, 1.2)}),
    "siren": SoundClass(tonal.siren, {"rate_hz": _rate(0.7, 1.6)}),
    "alarm": SoundClass(tonal.alarm, {"pitch_hz": _pitch(1800, 3000), "rate_hz": _rate(3.0, 6.0)}),
    "telephone": SoundClass(tonal.telephone, {"pitch_hz": _pitch(800, 1200)}),
    "whistle": SoundClass(tonal.whistle, {"pitch_hz": _pitch(1100, 2200)}),
    "hum": SoundClass(tonal.electric_hum, {"pitch_hz": _pitch(95, 125)}),
    "laser": SoundClass(tonal.laser, {"rate_hz": _rate(3.0, 6.0)}),
    "bell": SoundClass(tonal.bell, {"pitch_hz": _pitch(350, 700), "rate_hz": _rate(0.8, 1.6)}),
    "white noise": SoundClass(noise.white_noise),
    "pink noise": SoundClass(noise.pink_noise),
    "brown noise": SoundClass(noise.brown_noise),
    "rain": SoundClass(noise.rain, {"density_hz": _density(90, 220)}),
    "wind": SoundClass(noise.wind, {"pitch_hz": _pitch(400, 700)}),
    "ocean": SoundClass(noise.ocean_waves, {"rate_hz": _rate(0.5, 0.8)}),
    "thunder": SoundClass(noise.thunder, {"rate_hz": _rate(0.5, 0.8)}),
    "explosion": SoundClass(noise.explosion),
    "fire": SoundClass(noise.fire, {"density_hz": _density(9, 20)}),
    "engine": SoundClass(noise.engine, {"rate_hz": _rate(22, 40)}),
    "helicopter": SoundClass(noise.helicopter, {"rate_hz": _rate(8, 12)}),
    "metronome": SoundClass(events.metronome, {"rate_hz": _rate(2.0, 4.5)}),
    "clock": SoundClass(events.clock, {"rate_hz": _rate(3.0, 5.0)}),
    "heartbeat": SoundClass(events.heartbeat, {"rate_hz": _rate(1.0, 2.0)}),
    "drum": SoundClass(events.drum, {"rate_hz": _rate(2.5, 4.0)}),
    "footsteps": SoundClass(events.footsteps, {"rate_hz": _rate(1.4, 2.6)}),
    "water drops": SoundClass(events.water_drops, {"rate_hz": _rate(2.5, 5.5)}),
    "crickets": SoundClass(events.crickets, {"pitch_hz": _pitch(4000, 5200), "rate_hz": _rate(1.5, 3.0)}),
    "birds": SoundClass(events.birds, {"pitch_hz": _pitch(2600, 4200), "rate_hz": _rate(4.0, 6.5)}),
    "dog bark": SoundClass(events.dog_bark, {"pitch_hz": _pitch(280, 600), "rate_hz": _rate(1.8, 3.2)}),
    "glass": SoundClass(events.glass_break, {"rate_hz": _rate(0.5, 1.0)}),
}

CLASS_NAMES: tuple[str, ...] = tuple(CLASSES)


LABEL_SEPARATOR = "+"
MIN_SAMPLE_RATE_HZ = 16_000
_QUIETEST, _LOUDEST = 0.3, 0.9
_EDGE_SECONDS = 0.005
_SHORTEST_DRAWN_SECONDS = 1.0


def components_of(label: str) -> tuple[str, ...]:
    """The classes in a label: ("bell", "rain") for "bell+rain"."""
    return tuple(label.split(LABEL_SEPARATOR))


def _fade(signal: Signal, sample_rate_hz: int) -> Signal:
    """Ramps at both ends, in place, so that neither cutting nor joining clicks."""
    edge = min(signal.size // 2, round(_EDGE_SECONDS * sample_rate_hz))
    if edge:
        ramp = (np.arange(edge) + 0.5) / edge
        signal[:edge] *= ramp
        signal[-edge:] *= ramp[::-1]
    return signal


def _window(signal: Signal, samples: int) -> Signal:
    """`samples` of a signal around its peak: a short clip must not fall into a pause of the sound."""
    start = int(np.abs(signal).argmax()) - samples // 2
    start = min(max(start, 0), signal.size - samples)
    return signal[start : start + samples].copy()


def _scale_to(signal: Signal, peak: float) -> Signal:
    return signal * (peak / max(float(np.abs(signal).max()), 1e-9))


class ProceduralDataset:
    """Item `index` is a function of (seed, epoch if `fresh_each_epoch`, index); classes alternate with the index.

    Args:
        size: number of items.
        seed: names the collection; another seed gives other clips of the same classes.
        duration_seconds: length of every clip.
        sample_rate_hz: at least 16 kHz, so that every class keeps what tells it apart.
        classes: subset of `CLASS_NAMES`; all by default.
        combination_probability: share of clips that hold a second class, after the first or mixed with it.
        fresh_each_epoch: draw new clips in each epoch instead of repeating the same ones.
        channels: 1; or 2, between which each clip lies somewhere.

    Raises:
        ValueError: for an unknown class, an empty clip or a low sample rate.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        duration_seconds: float,
        sample_rate_hz: int = 24_000,
        classes: Sequence[str] | None = None,
        combination_probability: float = 0.0,
        fresh_each_epoch: bool = False,
        channels: int = 1,
    ) -> None:
        self.classes = tuple(classes) if classes is not None else CLASS_NAMES
        unknown = sorted(set(self.classes) - set(CLASS_NAMES))
        if unknown or not self.classes:
            raise ValueError(f"`classes` got {list(self.classes)}, unknown {unknown}; choose among {list(CLASS_NAMES)}")
        if sample_rate_hz < MIN_SAMPLE_RATE_HZ:
            raise ValueError(f"`sample_rate_hz` must be at least {MIN_SAMPLE_RATE_HZ}, got {sample_rate_hz}")
        if duration_seconds * sample_rate_hz < 1:
            raise ValueError(f"`duration_seconds` must be positive, got {duration_seconds}")
        if not 0 <= combination_probability <= 1:
            raise ValueError(f"`combination_probability` must lie in [0, 1], got {combination_probability}")
        if channels not in (1, 2):
            raise ValueError(f"`channels` must be 1 or 2 for synthesised clips, got {channels}")
        self.size, self.audio_channels = size, channels
        self.seed = seed
        self.duration_seconds = duration_seconds
        self.sample_rate_hz = sample_rate_hz
        self.combination_probability = combination_probability
        self.fresh_each_epoch = fresh_each_epoch

    def __len__(self) -> int:
        return self.size

    def clip_name(self, index: int, epoch: int = 0) -> str:
        """Its id."""
        return f"procedural-{self.seed}-{epoch}-{index}"

    def render(self, index: int, epoch: int = 0) -> AudioItem:
        """Clip `index`: float32 `[T]`, or `[2, T]`, with peak below 1; raises IndexError outside the collection."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} lies outside a procedural data set of {self.size} items")
        epoch = epoch if self.fresh_each_epoch else 0
        rng = numpy_generator("procedural", self.seed, epoch, index)
        first = self.classes[index % len(self.classes)]
        timeline = Timeline(round(self.duration_seconds * self.sample_rate_hz), self.sample_rate_hz, rng)
        if len(self.classes) > 1 and rng.random() < self.combination_probability:
            second = str(rng.choice([name for name in self.classes if name != first]))
            signal, text, label = _combination(timeline, first, second)
        else:
            (signal, text), label = _single(timeline, first), first
        if self.audio_channels == 2:
            signal = _panned(signal, float(numpy_generator("pan", self.seed, epoch, index).random()))
        audio = torch.from_numpy(signal.astype(np.float32))
        return AudioItem(audio=audio, caption=text, label=label, id=self.clip_name(index, epoch))


def _panned(signal: Signal, place: float) -> Signal:
    """A signal `[T]` in stereo `[2, T]`, at `place` from 0, left, to 1, right; its power is the same everywhere."""
    angle = place * np.pi / 2
    return np.stack([np.cos(angle) * signal, np.sin(angle) * signal])


def _single(timeline: Timeline, class_name: str) -> tuple[Signal, str]:
    """A clip of one class at a random loudness, and its caption."""
    signal, slots = CLASSES[class_name].draw(timeline.part(max(timeline.duration_seconds, _SHORTEST_DRAWN_SECONDS)))
    signal = _window(signal, timeline.samples)
    level = float(timeline.rng.random())
    signal = _scale_to(_fade(signal, timeline.sample_rate_hz), _QUIETEST * (_LOUDEST / _QUIETEST) ** level)
    return signal, caption(class_name, slots, level, timeline.rng)


def _combination(timeline: Timeline, first: str, second: str) -> tuple[Signal, str, str]:
    """Two classes, one after the other or both at once: signal, caption and label."""
    in_sequence = bool(timeline.rng.random() < 0.5)
    half = timeline.part(timeline.duration_seconds / 2) if in_sequence else timeline
    (a, text_a), (b, text_b) = _single(half, first), _single(half, second)
    text = combine((text_a, text_b), SEQUENCE if in_sequence else MIXTURE, timeline.rng)
    signal = np.resize(np.concatenate([a, b]), timeline.samples) if in_sequence else a + b
    return _scale_to(signal, min(float(np.abs(signal).max()), _LOUDEST)), text, f"{first}{LABEL_SEPARATOR}{second}"
