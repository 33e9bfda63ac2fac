"""Evaluations of sets whose scores are known in advance, and their alarms."""

import json
import logging

import pytest
import torch

from foley.metrics.evaluation import PairingError, SilentAudioError, evaluate_audio, restricted_accuracy
from foley.metrics.features import LabelledAudio
from foley.reporting.scores import to_markdown, write_report

LABELS = ["rain", "bell", "dog bark", "seven"]


def clip(label: str, sounds_like: str | None = None, name: str | None = None) -> LabelledAudio:
    audio = torch.zeros(30)
    audio[LABELS.index(sounds_like or label)] = 0.8
    return LabelledAudio(audio, label, name)


REFERENCE = [clip(label, name=f"{label}-{i}") for label in LABELS for i in range(3)]


def test_a_set_against_itself(protocol) -> None:
    result = evaluate_audio(REFERENCE, REFERENCE, protocol, pairing="required")
    values = {name: score.value for name, score in result.scores.items()}
    assert values["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert values["kl_softmax"] == values["kl_softmax_reversed"] == pytest.approx(0, abs=1e-4)
    assert values["kl_sigmoid"] == values["kl_sigmoid_reversed"] == pytest.approx(0, abs=1e-4)
    assert "kl_marginal" not in values
    assert values["inception_score"] == pytest.approx(4, rel=1e-4)
    assert {score.low for score in result.scores.values()} == {None}
    assert result.accuracy["all"].accuracy == 1
    assert (result.n_generated, result.n_reference, result.pairing) == (12, 12, "paired by id")
    assert result.protocol["extractor_hash"] == "first"
    assert result.protocol["direction"] == "KL(reference || generated)"


def test_accuracy_is_restricted_to_groups_and_split_by_class(protocol) -> None:
    samples = [clip("rain"), clip("rain", "bell"), clip("bell"), clip("seven", "rain")]
    accuracy = evaluate_audio(samples, REFERENCE, protocol).accuracy
    assert (accuracy["all"].accuracy, accuracy["all"].n, accuracy["all"].choices) == (0.5, 4, 4)
    assert (accuracy["procedural"].n, accuracy["procedural"].choices) == (3, 3)
    assert accuracy["procedural"].accuracy == pytest.approx(2 / 3)
    assert accuracy["all"].per_class == {"rain": (0.5, 2), "bell": (1.0, 1), "seven": (0.0, 1)}


def test_restriction_removes_the_other_classes_from_the_choice() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0, 9.0]])
    everything = restricted_accuracy(logits, ["rain"], LABELS, LABELS)
    procedural = restricted_accuracy(logits, ["rain"], LABELS, LABELS[:3])
    assert everything is not None
    assert procedural is not None
    assert (everything.accuracy, procedural.accuracy) == (0, 1)
    assert restricted_accuracy(logits, [None], LABELS, LABELS) is None


def test_a_missing_pair_is_refused_where_pairing_is_asked_for(protocol) -> None:
    samples = [*REFERENCE[:3], clip("rain", name="stranger")]
    with pytest.raises(PairingError, match=r"1 of 4.*stranger"):
        evaluate_audio(samples, REFERENCE, protocol, pairing="required")
    with pytest.raises(PairingError, match="repeated ids: True"):
        evaluate_audio([REFERENCE[0], REFERENCE[0]], REFERENCE, protocol, pairing="required")
    with pytest.raises(PairingError, match=r"1 of 4.*stranger"):
        evaluate_audio(samples, REFERENCE, protocol, pairing="auto")
    unpaired = evaluate_audio(samples, REFERENCE, protocol, pairing="none")
    assert unpaired.pairing == "none"
    assert "kl_softmax" not in unpaired.scores
    assert unpaired.scores["kl_marginal"].value > 0


def test_an_all_silent_set_raises_and_some_silent_clips_are_named(protocol, caplog) -> None:
    silent = LabelledAudio(torch.zeros(30), "rain", "mute")
    with pytest.raises(SilentAudioError, match=r"all 2 generated clips are silent.*mute"):
        evaluate_audio([silent, silent], REFERENCE, protocol)
    with pytest.raises(SilentAudioError, match="reference"):
        evaluate_audio(REFERENCE, [silent], protocol)
    with caplog.at_level(logging.ERROR):
        result = evaluate_audio([*REFERENCE, silent], REFERENCE, protocol)
    assert result.silent == ["mute"]
    assert "mute" in caplog.text
    assert "ALARM" in to_markdown([result])


def test_not_a_number_and_empty_sets_are_refused(protocol) -> None:
    with pytest.raises(ValueError, match="broken: audio is empty or not finite"):
        evaluate_audio([LabelledAudio(torch.full((5,), torch.nan), None, "broken")], REFERENCE, protocol)
    with pytest.raises(ValueError, match="no clips"):
        evaluate_audio([], REFERENCE, protocol)


def test_report_states_protocol_and_every_n(protocol, tmp_path) -> None:
    result = evaluate_audio(REFERENCE, REFERENCE, protocol, resamples=20)
    write_report([result], tmp_path)
    stored = json.loads((tmp_path / "evaluation.json").read_text())["embedded"]
    assert stored["protocol"]["sample_rate_hz"] == 100
    assert stored["n_generated"] == 12
    markdown = (tmp_path / "evaluation.md").read_text()
    assert "| Frechet distance | 0.0000 | 0.0000 to " in markdown
    assert " | 12 / 12 |" in markdown
    assert "| dog bark | 100.0% | 3 |" in markdown
