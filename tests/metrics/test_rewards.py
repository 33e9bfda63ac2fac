"""Rewards: the scores of protocols clip by clip, and what has none."""

import pytest
import torch

from foley.metrics.protocols import EvaluationProtocol, ProtocolError
from foley.metrics.rewards import CaptionSimilarity, LabelLogProbability

LABELS = ["rain", "bell", "dog bark", "seven"]  # of the fixture's extractor


def clips(*first_samples: list[float]) -> torch.Tensor:
    """`[N, 1, T]` at 100 Hz: the extractor's features are the first samples, its logits 20 times as large."""
    audio = torch.zeros(len(first_samples), 1, 200)
    for row, samples in zip(audio, first_samples, strict=True):
        row[0, : len(samples)] = torch.tensor(samples)
    return audio


def test_a_label_is_rewarded_by_its_log_probability(protocol: EvaluationProtocol) -> None:
    reward = LabelLogProbability({"embedded": [protocol]})
    audio = clips([0.1, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0])
    expected = torch.tensor([2.0, 0.0, 0.0, 0.0]).log_softmax(0)
    found = reward(audio, 100, ["water falls", "something"], ["rain", "bell"])
    torch.testing.assert_close(torch.tensor(found), expected[:2])


def test_a_prompt_without_a_label_has_the_one_that_it_names(protocol: EvaluationProtocol) -> None:
    reward = LabelLogProbability({"embedded": [protocol]})
    audio = clips([0.1, 0.0, 0.0, 0.0])
    assert reward(audio, 100, ["a distant dog bark"], [None]) == reward(audio, 100, ["x"], ["dog bark"])
    with pytest.raises(ValueError, match=r"knows no label None \(prompt 'a cat meows'\).*reward=clap"):
        reward(audio, 100, ["a cat meows"], [None])
    with pytest.raises(ValueError, match="knows no label 'cat'"):
        reward(audio, 100, ["a cat meows"], ["cat"])


def test_captions_are_rewarded_by_their_cosine(protocol: EvaluationProtocol, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(self: object, captions: list[str]) -> torch.Tensor:
        return torch.eye(4)[[LABELS.index(caption) for caption in captions]]

    monkeypatch.setattr(type(protocol.extractor), "text", text, raising=False)
    reward = CaptionSimilarity({"clap": [protocol]})
    found = reward(clips([0.6, 0.8], [0.6, 0.8]), 100, ["bell", "rain"], [None, None])
    assert found == pytest.approx([0.8, 0.6])


def test_protocols_that_cannot_reward_are_refused(
    protocol: EvaluationProtocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProtocolError, match="takes no captions; reward=embedded"):
        CaptionSimilarity({"embedded": [protocol]})
    with pytest.raises(ProtocolError, match=r"one protocol, got \['embedded', 'embedded'\]"):
        LabelLogProbability({"a": [protocol], "b": [protocol]})
    monkeypatch.setattr(protocol.extractor, "labels", [], raising=False)
    with pytest.raises(ProtocolError, match="names no labels; reward=clap"):
        LabelLogProbability({"embedded": [protocol]})


def test_identities_tell_rewards_apart(protocol: EvaluationProtocol, other_protocol: EvaluationProtocol) -> None:
    first, other = (LabelLogProbability({"embedded": [one]}).identity for one in (protocol, other_protocol))
    assert first["reward"] == other["reward"] == "label log-probability"
    assert first != other
