"""A listening test as one page: blind, with anchors, ready to open from a disk."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.signal import firwin, oaconvolve

from foley.files import write_json, write_text
from foley.seeding import derive_seed

SCALE = {20: "Bad", 40: "Poor", 60: "Fair", 80: "Good", 100: "Excellent"}
"""The five levels of AudioCache's questionnaire (Shi et al. 2025, section IV-A)."""
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


def write_test(directory: Path, title: str, stimuli: Sequence[Stimulus], seed: int) -> Path:
    """Write the page for the listeners and `key.json`, which tells the codes apart, for the experimenter alone.

    The page refers to nothing outside itself. Returns it; raises ValueError unless every item has every system.
    """
    _check_complete(stimuli)
    codes = [stimulus.code(seed) for stimulus in stimuli]
    key = {code: {"system": s.system, "item": s.item} for code, s in zip(codes, stimuli, strict=True)}
    name = hashlib.sha256(json.dumps([title, seed, key], sort_keys=True).encode()).hexdigest()[:8]
    trials = [_trial(code, stimulus) for code, stimulus in zip(codes, stimuli, strict=True)]
    # Their order would tell the systems; the page shuffles anew for every listener.
    test = {"name": name, "title": title, "scale": SCALE, "trials": sorted(trials, key=lambda trial: trial["code"])}
    template = files("foley.reporting").joinpath("listening.html").read_text(encoding="utf-8")
    # "<" could end the script that holds the data.
    write_text(directory / PAGE_FILE, template.replace("{{test}}", json.dumps(test).replace("<", "\\u003c")))
    write_json(directory / KEY_FILE, {"test": name, "title": title, "seed": seed, "stimuli": key})
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
