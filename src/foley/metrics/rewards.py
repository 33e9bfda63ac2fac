"""Rewards of single clips: what a set of generated sounds is ranked by, for preference tuning.

A reward is built by its `_target_` (`configs/reward`). Those here are scores of evaluation protocols, clip by clip:
what raises them should raise the protocol's score, which says nothing of other protocols'.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from foley.core.captions import plain_caption
from foley.metrics.extractors import CaptionExtractor
from foley.metrics.features import ClipFeatures, LabelledAudio, extract_audio, label_from_text
from foley.metrics.protocols import EvaluationProtocol, ProtocolError

Protocols = Mapping[str, Sequence[EvaluationProtocol]]
"""By name, as `configs/protocol` gives them."""


class Reward(Protocol):
    """Scores clips by what they were made from; more is better.

    `identity` is all that a score depends on besides the clip, so that scores of two rewards never mix.
    """

    identity: Mapping[str, Any]

    def __call__(
        self, audio: Tensor, sample_rate_hz: int, captions: Sequence[str], labels: Sequence[str | None]
    ) -> list[float]:
        """Of `audio [N, channels, T]` at any rate; `labels` where they are known."""
        ...


class LabelLogProbability:
    """`log p(label | sound)` in nats, of the extractor's posterior over all labels that it knows: 0 at most.

    A prompt without a label has the one that it names.

    Args:
        protocol: the one protocol whose extractor names labels.

    Raises ProtocolError for a protocol of several parts, or without labels; when called ValueError for prompts of
    which the extractor knows no label.

    >>> from foley.core.config import PROJECT_ROOT
    >>> from foley.metrics.protocols import embedded
    >>> reward = LabelLogProbability({"embedded": embedded(PROJECT_ROOT / "data" / "extractor")})
    >>> hiss = 0.1 * torch.randn(2, 1, 48000)
    >>> hit, miss = reward(hiss, 24000, ["a hiss", "a bell rings"], ["white noise", None])
    >>> hit > miss
    True
    """

    def __init__(self, protocol: Protocols) -> None:
        self.protocol = _only(protocol)
        if not self.protocol.extractor.labels:
            raise ProtocolError(
                f"reward: protocol {self.protocol.name!r} names no labels; reward=clap ranks by the prompt itself"
            )
        self.identity = _identity(self.protocol, "label log-probability")

    def __call__(
        self, audio: Tensor, sample_rate_hz: int, captions: Sequence[str], labels: Sequence[str | None]
    ) -> list[float]:
        """As `Reward`."""
        known = list(self.protocol.extractor.labels)
        named = [label or label_from_text(text, known) for text, label in zip(captions, labels, strict=True)]
        for text, label in zip(captions, named, strict=True):
            if label not in known:
                raise ValueError(
                    f"reward: the extractor of protocol {self.protocol.name!r} knows no label {label!r} (prompt "
                    f"{text!r}); give prompts one of its labels, or rank by reward=clap"
                )
        logits = _features(self.protocol, audio, sample_rate_hz, captions).logits.double()
        places = torch.tensor([known.index(str(label)) for label in named])
        return logits.log_softmax(dim=-1)[torch.arange(len(places)), places].tolist()  # type: ignore[no-any-return]


class CaptionSimilarity:
    """Cosine of sound and prompt in CLAP's space, in [-1, 1]: the reward of CRPO.

    Args:
        protocol: the one protocol whose extractor takes captions.

    Raises ProtocolError for a protocol of several parts, or without captions.
    """

    def __init__(self, protocol: Protocols) -> None:
        self.protocol = _only(protocol)
        if not isinstance(self.protocol.extractor, CaptionExtractor):
            raise ProtocolError(
                f"reward: protocol {self.protocol.name!r} takes no captions; reward=embedded ranks by the label"
            )
        self._extractor = self.protocol.extractor
        self.identity = _identity(self.protocol, "caption similarity")

    def __call__(
        self, audio: Tensor, sample_rate_hz: int, captions: Sequence[str], labels: Sequence[str | None]
    ) -> list[float]:
        """As `Reward`; labels make no difference."""
        sounds = _features(self.protocol, audio, sample_rate_hz, captions).features
        texts = self._extractor.text([plain_caption(text) for text in captions])
        return (sounds * texts).sum(dim=-1).tolist()  # type: ignore[no-any-return]


def _only(protocol: Protocols) -> EvaluationProtocol:
    parts = [part for parts in protocol.values() for part in parts]
    if len(parts) != 1:
        raise ProtocolError(f"reward.protocol: a reward is of one protocol, got {[part.name for part in parts]}")
    return parts[0]


def _identity(protocol: EvaluationProtocol, of: str) -> dict[str, str]:
    return {"reward": of, "protocol": protocol.name, "protocol_sha256": protocol.identity}


def _features(protocol: EvaluationProtocol, audio: Tensor, rate_hz: int, captions: Sequence[str]) -> ClipFeatures:
    clips = [LabelledAudio(clip, caption=text) for clip, text in zip(audio, captions, strict=True)]
    return extract_audio(clips, protocol, rate_hz)
