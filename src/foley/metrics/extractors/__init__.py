"""Networks that turn audio into features and class logits, and the form that they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class ExtractorOutput:
    """`features [B, D]`, or `[B, F, D]` of F windows each, and `logits [B, K]` of a batch of clips; K may be 0."""

    features: Tensor
    logits: Tensor


class Extractor(Protocol):
    """What a protocol needs of an extractor.

    `labels` name the logits where they are classes of our clips; `label_groups` names subsets to report apart.
    """

    sample_rate_hz: int
    feature_dim: int
    labels: Sequence[str]
    label_groups: Mapping[str, Sequence[str]]

    def __call__(self, audio: Tensor) -> ExtractorOutput:
        """`audio [B, ...]`: clips of one length as the protocol's preprocessing gives them."""
        ...


@runtime_checkable
class CaptionExtractor(Extractor, Protocol):
    """An extractor that puts captions into the space of its features."""

    def text(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings `[B, D]`."""
        ...
