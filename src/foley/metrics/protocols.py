"""Named, versioned evaluation protocols: numbers are comparable only under the same name, version and extractor."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foley.checkpoint import WEIGHTS_FILE, load_component
from foley.hashing import hash_file, hash_module
from foley.metrics.extractors import Extractor


class ProtocolError(ValueError):
    """A protocol that does not exist, or whose extractor is absent or not the expected one."""


@dataclass(frozen=True)
class EvaluationProtocol:
    """How clips become features and features become scores.

    Clips are zero-padded on the right to a whole number of `pad_seconds`, at least `minimum_seconds`, so that a
    clip's features never depend on the clips that share its batch.
    """

    name: str
    version: int
    extractor: Extractor
    extractor_hash: str
    channels: int
    pad_seconds: float
    minimum_seconds: float
    inception_splits: int
    direction: str = "KL(reference || generated)"

    @property
    def sample_rate_hz(self) -> int:
        return self.extractor.sample_rate_hz

    def pad(self, audio: Tensor) -> Tensor:
        """`audio [T]`, zero-padded on the right as the protocol states."""
        block = round(self.pad_seconds * self.sample_rate_hz)
        length = max(-(-audio.numel() // block) * block, round(self.minimum_seconds * self.sample_rate_hz))
        return nn.functional.pad(audio, (0, length - audio.numel()))

    def describe(self) -> dict[str, Any]:
        """What a report states beside every number."""
        return {
            "protocol": self.name,
            "version": self.version,
            "sample_rate_hz": self.sample_rate_hz,
            "channels": self.channels,
            "padding": f"zeros at the end to a multiple of {self.pad_seconds:g} s, at least {self.minimum_seconds:g} s",
            "extractor": type(self.extractor).__name__,
            "extractor_hash": self.extractor_hash,
            "feature_dim": self.extractor.feature_dim,
            "inception_splits": self.inception_splits,
            "direction": self.direction,
        }

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the description and the labels: what cached features belong to."""
        content = json.dumps([self.describe(), list(self.extractor.labels)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def embedded(directory: Path, expected_sha256: str | None = None) -> EvaluationProtocol:
    """The small extractor that ships: 24 kHz mono. Its numbers are its own, never those of a published protocol."""
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        raise ProtocolError(
            f"protocol 'embedded': {weights} does not exist (expected SHA-256 {expected_sha256 or 'not pinned'}); it "
            "ships with foley in data/extractor and is made by `python scripts/train_extractor.py`"
        )
    if expected_sha256 is not None and (found := hash_file(weights)) != expected_sha256:
        raise ProtocolError(
            f"protocol 'embedded': {weights} has SHA-256 {found}, expected {expected_sha256}; restore the shipped "
            "file, or set the expected hash to that of the extractor that you trained"
        )
    extractor = load_component(directory)
    return EvaluationProtocol(
        name="embedded",
        version=1,
        extractor=extractor,
        extractor_hash=hash_module(extractor),
        channels=1,
        pad_seconds=1.0,
        minimum_seconds=2.0,
        inception_splits=1,
    )


PROTOCOLS: dict[str, Callable[[Path, str | None], EvaluationProtocol]] = {"embedded": embedded}


def load_protocol(name: str, extractor_directory: Path, expected_sha256: str | None = None) -> EvaluationProtocol:
    """Protocol `name` with the extractor in `extractor_directory`; raises ProtocolError, never falls back."""
    if name not in PROTOCOLS:
        raise ProtocolError(f"unknown protocol {name!r}; available: {', '.join(sorted(PROTOCOLS))}")
    return PROTOCOLS[name](extractor_directory, expected_sha256)
