"""Settings in words: what a reader of a page wants to know of them, rounded and with units."""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

_NAMES = {
    "ckpt": "system",
    "model": "system",
    "num_steps": "steps",
    "macs": "multiply-accumulates",
    "macs_uncached": "multiply-accumulates without acceleration",
    "mac_speedup": "speed-up in multiply-accumulates",
}
_UNITS = {"seconds": "s", "hz": "Hz", "db": "dB", "gigabytes": "GB", "percent": "%"}
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_HASH = re.compile(r"[0-9a-f]{32,128}")
_SHORT_HASH = 12
_FOR_MACHINES = {"request"}  # by which a folder knows its own clips
MARKS = {"provenance": "origin in the tags of each file", "watermark": "inaudible watermark"}
"""Settings of which it is said that they are off, too, in words: what a listener may want to rely on."""


class Fact(NamedTuple):
    """A setting in words; `whole` is what `text` is short for, where someone may want to copy it."""

    name: str
    text: str
    whole: str = ""


def describe_settings(settings: Mapping[str, Any]) -> list[Fact]:
    """What is set, in the order of the settings; what is off, empty or absent is left out, but for `MARKS`.

    >>> facts = describe_settings({"duration_seconds": 5.0, "mac_speedup": 4.415783759499831, "compile": False})
    >>> [(fact.name, fact.text) for fact in facts]
    [('duration', '5 s'), ('speed-up in multiply-accumulates', '4.42x')]
    """
    return list(_describe(settings))


def _describe(settings: Mapping[str, Any]) -> Iterator[Fact]:
    for key, value in settings.items():
        if key in MARKS:
            yield Fact(MARKS[key], _in_words(value, ""))
            continue
        if value is None or value is False or value == "" or value == {} or value == []:
            continue
        if key in _FOR_MACHINES or _is_off(value) or (key.startswith("mac") and settings.get("mac_speedup") == 1):
            continue
        name, unit = _split_unit(key)
        if isinstance(value, str) and _HASH.fullmatch(value):
            yield Fact(name, f"{value[:_SHORT_HASH]}…", value)
        else:
            yield Fact(name, _in_words(value, unit))


def _is_off(value: Any) -> bool:
    """An accelerator that is none."""
    return isinstance(value, Mapping) and str(value.get("_target_", "")).endswith(".NoAcceleration")


def _split_unit(key: str) -> tuple[str, str]:
    """A setting's name without its unit, and the unit: `("duration", "s")` of `duration_seconds`."""
    stem, _, last = key.rpartition("_")
    if key in _NAMES:
        return _NAMES[key], "x" if key.endswith("speedup") else ""
    if stem and last in _UNITS:
        return stem.replace("_", " "), _UNITS[last]
    return key.replace("_", " "), "x" if last == "speedup" else ""


def _in_words(value: Any, unit: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(float(value), unit)
    if isinstance(value, Mapping):
        return _describe_choice(value)
    if isinstance(value, str):
        return PurePath(value).name or value if value.startswith(("/", "~")) else value
    return ", ".join(_in_words(part, unit) for part in value)


def _number(value: float, unit: str) -> str:
    """Three digits, with a prefix where the number is large; times are never thousands of seconds in prefixes."""
    factor, prefix = next(((f, p) for f, p in _PREFIXES if abs(value) >= f), (1.0, ""))
    if unit in ("s", "x", "%") or (not unit and abs(value) < 1e6):
        factor, prefix = 1.0, ""
    text = f"{value / factor:.3g}" if abs(value / factor) < 1000 else f"{value / factor:,.0f}"
    separator = "" if unit in ("x", "%") or not prefix + unit else " "
    return f"{text}{separator}{prefix}{unit}"


def _describe_choice(choice: Mapping[str, Any]) -> str:
    """A class and its plain arguments: "AudioCache, threshold 0.3"; places and parts of its own are left out."""
    named = str(choice.get("_target_", "")).rpartition(".")[2]
    plain = {key: value for key, value in choice.items() if key != "_target_" and not isinstance(value, Mapping)}
    facts = [f"{fact.name} {fact.text}" for fact in _describe(plain) if not fact.whole]
    return ", ".join([*([named] if named else []), *facts])
