"""Evaluations of sets whose scores are known in advance, and their alarms."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from foley.metrics.evaluation import SilentAudioError, evaluate_audio, restricted_accuracy
from foley.metrics.features import LabelledAudio
from foley.metrics.pairing import PairingError
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


@pytest.fixture
def noise() -> list[LabelledAudio]:
    return [LabelledAudio(torch.rand(30, generator=torch.Generator().manual_seed(n)), None, str(n)) for n in range(40)]


def test_an_extrapolation_of_too_few_clips_is_refused_with_the_reason(protocol, noise) -> None:
    result = evaluate_audio(noise[:7], noise, protocol)
    assert "frechet_distance_infinity" not in result.scores
    assert (
        "too few clips: 7 with 7 feature vectors, and the extrapolation needs 8 clips and more than the 4"
        in (result.unmeasured["frechet_distance_infinity"])
    )
    with pytest.raises(ValueError, match="no score 'frechet_distance_infinity': too few clips: 7"):
        result.value("frechet_distance_infinity")
    with pytest.raises(ValueError, match="no score 'fad': the protocol gives frechet_distance, kernel"):
        result.value("fad")
    markdown = to_markdown([result])
    assert "| Frechet distance, n to infinity | not measured * |" in markdown
    assert "- Frechet distance, n to infinity: too few clips: 7" in markdown


@pytest.mark.parametrize(("count", "doubted"), [(12, True), (19, True), (20, False)])
def test_an_extrapolation_is_marked_where_a_quarter_is_no_more_than_the_features(protocol, noise, count, doubted):
    estimate = evaluate_audio(noise[:count], noise, protocol).scores["frechet_distance_infinity"]
    assert ("the fit is sound from 20 on" in estimate.remark) == doubted
    assert (estimate.value < 0) == ("negative" in estimate.remark)


def test_a_negative_extrapolation_says_so_in_json_and_table(protocol, noise, tmp_path) -> None:
    result = evaluate_audio(noise, noise, protocol)  # a set against itself: its parts are farther than the whole
    write_report([result], tmp_path)
    stored = json.loads((tmp_path / "evaluation.json").read_text())["embedded"]["scores"]["frechet_distance_infinity"]
    assert stored["value"] < 0
    assert "negative, which no distance is: too few clips" in stored["remark"]
    assert f"| {stored['value']:.4f} * |" in (tmp_path / "evaluation.md").read_text()


def test_a_distance_of_a_singular_set_is_marked(protocol, noise) -> None:
    remark = evaluate_audio(noise[:4], noise, protocol).scores["frechet_distance"].remark
    assert "generated set has n = 4 <= 4 features" in remark
    assert "reference" not in remark


def test_sets_of_other_lengths_are_counted(protocol, caplog) -> None:
    long = [LabelledAudio(torch.rand(200), None, clip.id) for clip in REFERENCE[:5]] + REFERENCE[5:]
    paired = evaluate_audio(long, REFERENCE, protocol, pairing="required")
    assert paired.seconds == {"generated": [0.3, 0.3, 2.0], "reference": [0.3, 0.3, 0.3]}
    assert "5 of 12 pairs differ in length (generated 0.3 to 2 s, median 0.3 s; reference 0.3" in paired.notes[1]
    assert "5 of 12 pairs" in caplog.text
    unpaired = evaluate_audio(long, REFERENCE, protocol).notes
    assert "5 of 12 generated clips and 0 of 12 reference recordings differ" in unpaired[0]
    cropped = replace(protocol, crop_seconds=0.3)
    assert evaluate_audio(long, REFERENCE, cropped).notes == []


def test_accuracy_names_its_classes_and_its_extractor(protocol) -> None:
    result = evaluate_audio(REFERENCE, REFERENCE, protocol)
    assert result.accuracy["procedural"].classes == LABELS[:3]
    markdown = to_markdown([result])
    assert "| Label accuracy among all 4 classes of FirstSamplesExtractor | 100.0% |" in markdown
    assert "| Label accuracy among its 3 procedural classes of FirstSamplesExtractor | 100.0% |" in markdown
    assert "## Accuracy per class, among all 4 classes of FirstSamplesExtractor" in markdown


def test_settings_that_mean_nothing_are_refused_by_name(protocol) -> None:
    with pytest.raises(PairingError, match="pairing=requird must be one of auto, required, none"):
        evaluate_audio(REFERENCE, REFERENCE, protocol, pairing="requird")
    with pytest.raises(ValueError, match="resamples=-1: give a whole number >= 0"):
        evaluate_audio(REFERENCE, REFERENCE, protocol, resamples=-1)
