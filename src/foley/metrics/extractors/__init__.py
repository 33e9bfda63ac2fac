"""Networks that turn audio into features and class logits, and the form that they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ExtractorOutput:
    """`features [B, D]` and `logits [B, K]` of a batch of clips."""

    features: Tensor
    logits: Tensor


class Extractor(Protocol):
    """What a protocol needs of an extractor; `label_groups` names subsets of `labels` to report apart."""

    sample_rate_hz: int
    feature_dim: int
    labels: Sequence[str]
    label_groups: Mapping[str, Sequence[str]]

    def __call__(self, audio: Tensor) -> ExtractorOutput:
        """`audio [B, T]` float mono at `sample_rate_hz`."""
        ...
