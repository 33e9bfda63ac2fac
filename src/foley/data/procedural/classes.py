"""The catalogue: which renderer draws a class, and the range of each of its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from foley.data.procedural import events, noise, tonal
from foley.data.procedural.synthesis import Canvas, Signal


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
    """One kind of sound: `render(canvas, **parameter values)` draws it."""

    render: Callable[..., Signal]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def draw(self, canvas: Canvas) -> tuple[Signal, dict[str, tuple[str, ...]]]:
        """A signal `[T]` with random parameters, and the true adjectives per caption slot (`pitch`, `rate`, ...)."""
        positions = {name: float(canvas.rng.random()) for name in self.parameters}
        values = {name: self.parameters[name].value(position) for name, position in positions.items()}
        slots = {name.removesuffix("_hz"): self.parameters[name].words(at) for name, at in positions.items()}
        return np.asarray(self.render(canvas, **values), dtype=np.float64), slots


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
