"""An extractor whose answers are known: a clip's label is the loudest of its first K samples."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from foley.metrics.extractors import ExtractorOutput
from foley.metrics.preprocessing import Preprocessing, pad_to
from foley.metrics.protocols import EvaluationProtocol

LABELS = ("rain", "bell", "dog bark", "seven")


class FirstSamplesExtractor:
    """Features and logits are the first samples of the clip."""

    sample_rate_hz = 100
    feature_dim = len(LABELS)
    labels: Sequence[str] = LABELS
    label_groups: Mapping[str, Sequence[str]] = {"procedural": LABELS[:3]}

    def __init__(self) -> None:
        self.clips_seen = 0

    def __call__(self, audio: torch.Tensor) -> ExtractorOutput:
        self.clips_seen += audio.shape[0]
        return ExtractorOutput(audio[:, : self.feature_dim], 20 * audio[:, : self.feature_dim])


class FirstSamplesPreprocessing(Preprocessing):
    sample_rate_hz = 100
    resampler = "none"
    length = "zeros to 2 s"

    def frame(self, audio: torch.Tensor) -> torch.Tensor:
        return pad_to(audio[0], 200)


def protocol_with(extractor_hash: str) -> EvaluationProtocol:
    return EvaluationProtocol(
        name="embedded",
        version=1,
        preprocessing=FirstSamplesPreprocessing(),
        extractor=FirstSamplesExtractor(),
        extractor_hash=extractor_hash,
        scores=("frechet", "frechet_infinity", "kad", "kl", "inception"),
    )


@pytest.fixture
def protocol() -> EvaluationProtocol:
    return protocol_with("first")


@pytest.fixture
def other_protocol() -> EvaluationProtocol:
    """As `protocol`, with another extractor behind it."""
    return protocol_with("second")
