"""One evaluation under one protocol: pair generated clips with reference clips by their ids, and score both.

`evaluate_files` reads, `evaluate_audio` takes clips in memory, and both end in `evaluate_features`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foley.core.logs import first_few, get_logger
from foley.metrics.features import (
    MAX_FAULTY_SHARE,
    AudioLoader,
    ClipFeatures,
    ClipFile,
    LabelledAudio,
    extract_audio,
    extract_files,
    labels_by_caption,
    resolve_labels,
)
from foley.metrics.latency import RealTimeFactor
from foley.metrics.pairing import Pairing, align_ids, check_pairing, describe_pairs, pair_clips
from foley.metrics.protocols import EvaluationProtocol
from foley.metrics.scores import SCORES, Comparison, Estimate, TooFewClipsError, label_accuracy

SILENT_OUTPUT_PEAK = 1e-4  # -80 dBFS
_EQUAL_SECONDS = 0.1

_log = get_logger(__name__)


class SilentAudioError(ValueError):
    """Every clip of a set is silent: no score of it would mean anything."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over `n` labelled clips when the classifier chooses among the `classes`, `choices` of them.

    `per_class` holds the accuracy and the number of the clips of each class that was met.
    """

    accuracy: float
    n: int
    choices: int
    classes: list[str]
    per_class: dict[str, tuple[float, int]]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of generated clips under one part of a protocol, by name, and how often which class is met.

    `unmeasured` maps the scores that were refused to the reason; `seconds` holds the shortest, median and longest clip
    of each set; `notes` are sentences on what the scores suffer from, or are made of; `rtf` is the mean of the
    `n_timed` generated clips that say how fast they were made; `audit` counts what is heard of the generated clips
    (`foley.metrics.audit.Audit.summary`), where that was asked for.
    """

    protocol: dict[str, Any]
    n_generated: int
    n_reference: int
    pairing: str
    scores: dict[str, Estimate]
    unmeasured: dict[str, str]
    accuracy: dict[str, Accuracy]
    n_unlabelled: int
    silent: list[str]
    seconds: dict[str, list[float]]
    notes: list[str]
    rtf: RealTimeFactor | None = None
    n_timed: int = 0
    audit: dict[str, Any] | None = None

    def value(self, score: str) -> float:
        """A score that something is decided by; raises ValueError, which says why, where there is none."""
        if score not in self.scores:
            reason = self.unmeasured.get(score, f"the protocol gives {', '.join([*self.scores, *self.unmeasured])}")
            raise ValueError(f"there is no score {score!r}: {reason}")
        return self.scores[score].value

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _check_silence(clips: ClipFeatures, name: str) -> list[str]:
    silent = [id for id, peak in zip(clips.ids, clips.peaks.tolist(), strict=True) if peak < SILENT_OUTPUT_PEAK]
    if len(silent) == len(clips):
        raise SilentAudioError(
            f"all {len(clips)} {name} clips are silent (peak below {SILENT_OUTPUT_PEAK:g}): {', '.join(silent[:10])}; "
            "check the decoder and the sampling settings that made them"
        )
    if silent:
        _log.error("SILENT OUTPUT: %d of %d %s clips: %s", len(silent), len(clips), name, ", ".join(silent))
    return silent


def restricted_accuracy(
    logits: Tensor, labels: Sequence[str | None], all_labels: Sequence[str], choices: Sequence[str]
) -> Accuracy | None:
    """Accuracy of `logits [N, K]` over the clips labelled with one of `choices`, choosing among `choices` only.

    None where no clip carries such a label.
    """
    place, wanted = ({label: number for number, label in enumerate(names)} for names in (all_labels, choices))
    rows = [index for index, label in enumerate(labels) if label in wanted]
    if not rows:
        return None
    columns = torch.tensor([place[choice] for choice in choices])
    chosen = logits[rows][:, columns]
    targets = torch.tensor([wanted[str(labels[row])] for row in rows])
    per_class = {
        choices[int(target)]: (label_accuracy(chosen[targets == target], targets[targets == target]), int(count))
        for target, count in zip(*targets.unique(return_counts=True), strict=True)
    }
    return Accuracy(label_accuracy(chosen, targets), len(rows), len(choices), list(choices), per_class)


def _accuracies(generated: ClipFeatures, protocol: EvaluationProtocol) -> dict[str, Accuracy]:
    labels = protocol.extractor.labels
    groups = {"all": labels, **protocol.extractor.label_groups}
    found = {
        name: restricted_accuracy(generated.logits, generated.labels, labels, group) for name, group in groups.items()
    }
    return {name: accuracy for name, accuracy in found.items() if accuracy is not None}


def evaluate_features(
    generated: ClipFeatures,
    reference: ClipFeatures,
    protocol: EvaluationProtocol,
    pairing: Pairing = "auto",
    resamples: int = 0,
) -> Evaluation:
    """All scores of a protocol from extracted features.

    Args:
        reference: of a recording with several captions each has an id to pair with, and distances take it once.
        pairing: see `pair_clips`.
        resamples: sets of clips drawn for each confidence interval; 0 leaves intervals out.
    Raises SilentAudioError where a whole set is silent.
    """
    if pairing != "none":
        # What was generated for a recording that cannot be used has lost its pair by no fault of its own.
        kept = [row for row, id in enumerate(generated.ids) if id not in reference.faulty]
        generated = generated if len(kept) == len(generated) else generated.rows(kept)
    silent = _check_silence(generated, "generated")
    _check_silence(reference, "reference")
    recordings, pairs = pair_clips(generated, reference, pairing)
    notes = _describe_sets(generated, recordings, pairs, pairing)
    labels = set(protocol.extractor.labels)
    unlabelled = sum(label not in labels for label in generated.labels) if labels else 0
    if unlabelled:
        _log.warning("%d of %d generated clips carry no label of the extractor", unlabelled, len(generated))
    sets = Comparison(generated, recordings, pairs, protocol.extractor, protocol.inception_splits, resamples)
    scores, unmeasured = _measure(sets, protocol.scores)
    return Evaluation(
        protocol=protocol.describe(),
        n_generated=len(generated),
        n_reference=len(recordings),
        pairing="none" if pairs is None else "paired by id",
        scores=scores,
        unmeasured=unmeasured,
        accuracy=_accuracies(generated, protocol),
        n_unlabelled=unlabelled,
        silent=silent,
        seconds={"generated": _spread(generated.seconds), "reference": _spread(recordings.seconds)},
        notes=notes,
    )


def _measure(sets: Comparison, names: Sequence[str]) -> tuple[dict[str, Estimate], dict[str, str]]:
    """The scores of those names, and the reasons for those that were refused."""
    scores: dict[str, Estimate] = {}
    unmeasured: dict[str, str] = {}
    for name in names:
        try:
            scores |= SCORES[name](sets)
        except TooFewClipsError as error:
            _log.warning("%s", error)
            unmeasured[error.score] = error.reason
    return scores, unmeasured


def _describe_sets(
    generated: ClipFeatures, recordings: ClipFeatures, pairs: Sequence[int] | None, pairing: Pairing
) -> list[str]:
    """What is to be said of the sets themselves; all of it is in the log too."""
    notes = [
        describe_pairs(generated, recordings, pairs, pairing),
        _describe_faulty(generated, "generated"),
        _describe_faulty(recordings, "reference"),
        describe_lengths(generated.seconds, recordings.seconds, pairs),
    ]
    for note in filter(None, notes):
        _log.warning("%s", note) if note is not notes[0] or pairs is None else _log.info("%s", note)
    return [note for note in notes if note]


def _describe_faulty(clips: ClipFeatures, name: str) -> str:
    if not clips.faulty:
        return ""
    return f"{len(clips.faulty)} {name} clips cannot be used and are left out: {first_few(list(clips.faulty))}"


def _spread(seconds: Tensor) -> list[float]:
    return [round(float(value), 3) for value in (seconds.min(), seconds.median(), seconds.max())]


def describe_lengths(generated: Tensor, reference: Tensor, pairs: Sequence[int] | None) -> str:
    """How many clips of `[M]` seconds are of other lengths than their references `[N]`, as a sentence; empty for none.

    Without pairs, a clip is compared with the median of the other set.

    >>> describe_lengths(torch.tensor([5.0, 5.0]), torch.tensor([5.0, 5.05]), [0, 1])
    ''
    """
    if pairs is not None:
        count = _count_differing(generated, reference[list(pairs)])
        found = f"{count} of {len(generated)} pairs differ in length"
    else:
        counts = [_count_differing(generated, reference.median()), _count_differing(reference, generated.median())]
        count = sum(counts)
        found = (
            f"{counts[0]} of {len(generated)} generated clips and {counts[1]} of {len(reference)} reference "
            "recordings differ in length from the other set's median"
        )
    if count == 0:
        return ""
    spans = [
        f"{name} {low:g} to {high:g} s, median {median:g} s"
        for name, (low, median, high) in (("generated", _spread(generated)), ("reference", _spread(reference)))
    ]
    return f"{found} ({'; '.join(spans)}): the scores compare lengths too; crop both with crop_seconds="


def _count_differing(seconds: Tensor, other: Tensor) -> int:
    return int(((seconds - other).abs() > _EQUAL_SECONDS).sum())


def evaluate_audio(
    samples: Sequence[LabelledAudio],
    reference: Sequence[LabelledAudio] | ClipFeatures,
    protocol: EvaluationProtocol,
    pairing: Pairing = "none",
    resamples: int = 0,
) -> Evaluation:
    """Scores of clips in memory, at the protocol's rate; extract a reference that is used often once, and pass that.

    >>> from foley.core.config import PROJECT_ROOT
    >>> from foley.metrics.protocols import load_protocol
    >>> protocol = load_protocol("embedded", PROJECT_ROOT / "data" / "extractor")
    >>> clips = [LabelledAudio(0.1 * torch.randn(48000)) for _ in range(8)]
    >>> evaluation = evaluate_audio(clips, clips, protocol)
    >>> evaluation.n_generated, round(evaluation.scores["frechet_distance"].value, 3)
    (8, 0.0)
    """
    known = reference if isinstance(reference, ClipFeatures) else extract_audio(reference, protocol)
    return evaluate_features(extract_audio(samples, protocol), known, protocol, pairing, resamples)


def evaluate_files(
    samples: Sequence[ClipFile],
    reference: Sequence[ClipFile],
    protocol: EvaluationProtocol,
    load: AudioLoader,
    pairing: Pairing = "auto",
    cache_directory: Path | None = None,
    captions: Iterable[tuple[str, str]] = (),
    named_labels: Sequence[str] = (),
    resamples: int = 0,
    max_faulty_share: float = MAX_FAULTY_SHARE,
) -> Evaluation:
    """Scores of audio files.

    Args:
        load: reads a file; the protocol's preprocessing does the rest.
        captions: known (caption, label) pairs, beside those of the reference; a clip without label of its own takes
            that of its prompt (see `resolve_labels`).
        named_labels: labels that a prompt may name in words; leave out those that mean other things too ("wood").
        resamples: as in `evaluate_features`.
        max_faulty_share: of the files of either set that cannot be used, see `extract_files`.
    """
    check_pairing(pairing)  # before minutes of extracting
    aligned, rule = (list(samples), "id") if pairing == "none" else align_ids(samples, reference)
    known = labels_by_caption([*captions, *((clip.caption, clip.label) for clip in reference)])
    labels = resolve_labels(aligned, known, named_labels)
    labelled = [replace(clip, label=label) for clip, label in zip(aligned, labels, strict=True)]
    generated = extract_files(labelled, protocol, load, cache_directory, max_faulty_share)
    known_features = extract_files(reference, protocol, load, cache_directory, max_faulty_share)
    evaluation = evaluate_features(generated, known_features, protocol, pairing, resamples)
    timed = [clip.rtf for clip in samples if clip.rtf is not None]
    pairing_rule = evaluation.pairing.replace("by id", f"by {rule}")
    return replace(evaluation, pairing=pairing_rule, rtf=RealTimeFactor.mean(timed), n_timed=len(timed))
