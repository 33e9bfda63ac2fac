"""Listening tests: the page for listeners, the key, and mean opinion scores."""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from matplotlib.figure import Figure
from scipy.signal import firwin, oaconvolve
from scipy.stats import t as student_t

from foley.core.files import write_json, write_text
from foley.core.reading import read_json, reading
from foley.core.seeding import derive_seed, numpy_generator
from foley.reporting.pages import read_asset
from foley.reporting.plots import save_figure

_WORDS = ("Bad", "Poor", "Fair", "Good", "Excellent")


@dataclass(frozen=True)
class MosProtocol:
    """How a paper asks its listeners: means of one protocol are no others', though all have five levels.

    Args:
        step: of the scale, whose levels are 1 to 5 times this.
        titles: of the questions after the quality and after the match with the text.
    """

    name: str
    step: int
    titles: tuple[str, str]

    @property
    def scale(self) -> dict[int, str]:
        """Level to word, the worst first."""
        return {self.step * place: word for place, word in enumerate(_WORDS, start=1)}

    @property
    def questions(self) -> dict[str, str]:
        """Column of a listener's file to the question's title."""
        return dict(zip(QUESTIONS, self.titles, strict=True))


QUESTIONS = ("mos_q", "mos_f")
_AUDIOCACHE = MosProtocol("audiocache", 20, ("MOS-Q, audio quality", "MOS-F, text fidelity"))
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # Hai et al. 2024, section III-E: 30 prompts, 12 listeners.
        MosProtocol("ezaudio", 1, ("OVL, overall quality", "REL, relevance to the text")),
        # Liu et al. 2024, section 4.1 and appendix C.2.
        MosProtocol("audiolcm", 20, ("MOS-Q, audio quality", "MOS-F, text-audio alignment faithfulness")),
        # Shi et al. 2025, section IV-A: a Likert scale of five levels from 20 to 100, 20 listeners.
        _AUDIOCACHE,
    )
}
CONFIDENCE = 0.95
REFERENCE, ANCHOR = "reference", "low_pass_anchor"
PAGE_FILE, KEY_FILE = "listening_test.html", "key.json"
_LOW_PASS_TAPS = 1025


@dataclass(frozen=True)
class Stimulus:
    """One clip that listeners rate: `samples` `[T, channels]`; `item` is what the clips of one prompt share."""

    system: str
    item: str
    caption: str
    samples: np.ndarray
    sample_rate_hz: int

    def code(self, seed: int) -> str:
        """What the page calls it: nothing that a listener could read anything from."""
        return f"{derive_seed('listening', seed, self.system, self.item):016x}"[-10:]


def low_pass(reference: Stimulus, cutoff_hz: float) -> Stimulus:
    """The anchor: a recording without what lies above `cutoff_hz` (3,500 Hz in ITU-R BS.1534, section 5.1).

    Raises ValueError where the recording has nothing above it.
    """
    if not 0 < cutoff_hz < reference.sample_rate_hz / 2:
        raise ValueError(
            f"anchor_hz={cutoff_hz:g} must lie below {reference.sample_rate_hz / 2:g} Hz, half the rate of the "
            f"reference of {reference.item}"
        )
    taps = firwin(_LOW_PASS_TAPS, cutoff_hz, fs=reference.sample_rate_hz)[:, None]
    samples = oaconvolve(reference.samples, taps, mode="same", axes=0)
    return Stimulus(ANCHOR, reference.item, reference.caption, samples, reference.sample_rate_hz)


def mos_protocol(name: str) -> MosProtocol:
    """The protocol of that name; raises ValueError for another.

    >>> list(mos_protocol("ezaudio").scale), list(mos_protocol("audiocache").scale)
    ([1, 2, 3, 4, 5], [20, 40, 60, 80, 100])
    """
    if name not in PROTOCOLS:
        raise ValueError(f"mos_protocol={name} must be one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def write_test(
    directory: Path, title: str, stimuli: Sequence[Stimulus], seed: int, protocol: MosProtocol = _AUDIOCACHE
) -> Path:
    """Write the page for the listeners and `key.json`, which tells the codes apart, for the experimenter alone.

    The page refers to nothing outside itself. Returns it; raises ValueError unless every item has every system.
    """
    _check_complete(stimuli)
    codes = [stimulus.code(seed) for stimulus in stimuli]
    key = {code: {"system": s.system, "item": s.item} for code, s in zip(codes, stimuli, strict=True)}
    name = hashlib.sha256(json.dumps([title, seed, protocol.name, key], sort_keys=True).encode()).hexdigest()[:8]
    trials = [_trial(code, stimulus) for code, stimulus in zip(codes, stimuli, strict=True)]
    # Their order would tell the systems; the page shuffles anew for every listener.
    test = {
        "name": name,
        "title": title,
        "scale": protocol.scale,
        "trials": sorted(trials, key=lambda trial: trial["code"]),
    }
    template = read_asset("listening.html").replace("{{style}}", read_asset("page.css"))
    # "<" could end the script that holds the data.
    write_text(directory / PAGE_FILE, template.replace("{{test}}", json.dumps(test).replace("<", "\\u003c")))
    facts = {"test": name, "title": title, "protocol": protocol.name, "seed": seed}
    write_json(directory / KEY_FILE, {**facts, "stimuli": key})
    return directory / PAGE_FILE


def _trial(code: str, stimulus: Stimulus) -> dict[str, Any]:
    buffer = io.BytesIO()
    # Not FLAC: Chromium cannot play a short file of it after it has read the length.
    soundfile.write(buffer, stimulus.samples, stimulus.sample_rate_hz, format="WAV", subtype="PCM_16")
    audio = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"code": code, "caption": stimulus.caption, "audio": f"data:audio/wav;base64,{audio}"}


def _check_complete(stimuli: Sequence[Stimulus]) -> None:
    systems: Mapping[str, None] = dict.fromkeys(s.system for s in stimuli)
    found = [(s.system, s.item) for s in stimuli]
    absent = [(system, item) for item in dict.fromkeys(s.item for s in stimuli) for system in systems]
    if missing := sorted(set(absent) - set(found)):
        raise ValueError(f"{len(missing)} clips are missing, such as {missing[:3]}: each system must have each item")
    if len(found) != len(set(found)):
        raise ValueError("a system has two clips of one item: give each clip an id of its own")


@dataclass(frozen=True)
class Ratings:
    """`values[question][listener, item, system]`; NaN where a listener gave none."""

    listeners: list[str]
    items: list[str]
    systems: list[str]
    values: dict[str, np.ndarray]
    protocol: MosProtocol = _AUDIOCACHE

    def only(self, listeners: Sequence[str]) -> "Ratings":
        """Of some of the listeners."""
        rows = [self.listeners.index(listener) for listener in listeners]
        return replace(self, listeners=list(listeners), values={name: v[rows] for name, v in self.values.items()})


@dataclass(frozen=True)
class Score:
    """A mean and its 95 % interval; `n` ratings."""

    mean: float
    low: float
    high: float
    n: int


Interval = Callable[[np.ndarray, int], list[Score]]
"""From one question's ratings `[listener, item, system]` and a seed to a score per system."""


def read_ratings(results: Sequence[Path], key_file: Path) -> Ratings:
    """Join the listeners' files with the key of their test.

    Raises DamagedFileError for a file that is something else, and ValueError, naming the file and its line, for another
    test's results, an unknown stimulus, a rating off the scale, or a second rating of one stimulus by one listener.
    """
    key = read_json(key_file, "the key of a listening test", "take the one that was written with the page")
    with reading(key_file, "the key of a listening test", "take the one that was written with the page"):
        stimuli, test = dict(key["stimuli"]), key["test"]
        protocol = mos_protocol(key.get("protocol", _AUDIOCACHE.name))  # that of keys which name none
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for place, row in chain.from_iterable(map(_read_rows, results)):
        cell = (row["listener"], row["stimulus"])
        if row["test"] != test or row["stimulus"] not in stimuli:
            raise ValueError(f"{place}: not of the test {test} that {key_file} describes: {row}")
        if any(row[question] not in map(str, protocol.scale) for question in QUESTIONS):
            raise ValueError(f"{place}: ratings must be of {list(protocol.scale)} ({protocol.name}), got {row}")
        if cell in found:
            raise ValueError(f"{place}: {cell[0]} has rated {cell[1]} before; give each file once")
        found[cell] = row
    return replace(_arrange(found, stimuli), protocol=protocol)


def _read_rows(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Every rating of a listener's file, and where it stands."""
    columns = ("test", "listener", "stimulus", *QUESTIONS)
    with (
        reading(file, "results of a listening test", "ask the listener for the file as it was saved"),
        file.open(encoding="utf-8-sig", newline="") as stream,
    ):
        reader = csv.DictReader(stream)
        return [(f"{file}, line {reader.line_num}", {name: row[name] for name in columns}) for row in reader]


def _arrange(found: Mapping[tuple[str, str], Mapping[str, Any]], stimuli: Mapping[str, Mapping[str, str]]) -> Ratings:
    listeners = sorted({listener for listener, _ in found})
    items, systems = (sorted({stimulus[axis] for stimulus in stimuli.values()}) for axis in ("item", "system"))
    values = {name: np.full((len(listeners), len(items), len(systems)), np.nan) for name in QUESTIONS}
    for (listener, code), row in found.items():
        stimulus = stimuli[code]
        place = (listeners.index(listener), items.index(stimulus["item"]), systems.index(stimulus["system"]))
        for name, array in values.items():
            array[place] = float(row[name])
    return Ratings(listeners, items, systems, values)


def bootstrap(values: np.ndarray, seed: int, resamples: int = 2000) -> list[Score]:
    """Listeners and items are drawn anew together, for both are samples of larger populations (Owen 2007)."""
    draw = numpy_generator("listening bootstrap", seed)
    listeners, items, _ = values.shape
    means = np.empty((resamples, values.shape[2]))
    for index in range(resamples):
        rows, columns = draw.integers(listeners, size=listeners), draw.integers(items, size=items)
        means[index] = np.nanmean(values[np.ix_(rows, columns)], axis=(0, 1))
    low, high = np.nanquantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return _scores(values, low, high)


def t_interval(values: np.ndarray, seed: int = 0) -> list[Score]:
    """Student's t over the listeners' means: for the population of listeners, and these items."""
    means = np.nanmean(values, axis=1)
    count = len(means)
    half = student_t.ppf((1 + CONFIDENCE) / 2, count - 1) * means.std(axis=0, ddof=1) / np.sqrt(count)
    centre = means.mean(axis=0)
    return _scores(values, centre - half, centre + half)


INTERVALS: dict[str, Interval] = {"bootstrap": bootstrap, "t": t_interval}


def _scores(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[Score]:
    means, counts = np.nanmean(values, axis=(0, 1)), (~np.isnan(values)).sum(axis=(0, 1))
    rows = zip(means.tolist(), low.tolist(), high.tolist(), counts.tolist(), strict=True)
    return [Score(*row) for row in rows]


def unreliable_listeners(ratings: Ratings) -> list[str]:
    """Those who rate the anchors' quality on average no lower than that of the recordings themselves."""
    if not {REFERENCE, ANCHOR} <= set(ratings.systems):
        return []
    quality = np.nanmean(ratings.values["mos_q"], axis=1)
    reference, anchor = (quality[:, ratings.systems.index(name)] for name in (REFERENCE, ANCHOR))
    return [name for name, unsure in zip(ratings.listeners, anchor >= reference, strict=True) if unsure]


def score_systems(ratings: Ratings, interval: str = "bootstrap", seed: int = 0) -> dict[str, dict[str, Score]]:
    """Scores by system and question, the best quality first; ValueError for another interval or one listener."""
    if interval not in INTERVALS:
        raise ValueError(f"interval={interval} must be one of {', '.join(INTERVALS)}")
    if len(ratings.listeners) < 2:
        raise ValueError(f"an interval needs two listeners or more, got {ratings.listeners}")
    scores = {name: INTERVALS[interval](values, seed) for name, values in ratings.values.items()}
    rows = {s: {name: scores[name][i] for name in QUESTIONS} for i, s in enumerate(ratings.systems)}
    return dict(sorted(rows.items(), key=lambda row: -row[1]["mos_q"].mean))


def plot_scores(scores: Mapping[str, Mapping[str, Score]], path: Path, protocol: MosProtocol = _AUDIOCACHE) -> None:
    """A panel per question: means with their intervals on the whole scale."""
    levels, margin = list(protocol.scale), protocol.step / 10
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(scores)), layout="constrained")
    systems = list(scores)[::-1]
    for axes, (name, title) in zip(
        figure.subplots(1, len(QUESTIONS), sharey=True), protocol.questions.items(), strict=True
    ):
        chosen = [scores[system][name] for system in systems]
        means = np.array([score.mean for score in chosen])
        spread = np.abs(np.array([[score.low, score.high] for score in chosen]).T - means)
        axes.errorbar(means, systems, xerr=spread, fmt="o", capsize=3)
        axes.set(title=title, xticks=levels, xlim=(levels[0] - margin, levels[-1] + margin))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
