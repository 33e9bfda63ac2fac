"""One evaluation under one protocol: pair generated clips with reference clips by their ids, and score both.

`evaluate_files` reads, `evaluate_audio` takes clips in memory, and both end in `evaluate_features`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from foley.core.logs import get_logger
from foley.metrics.features import (
    AudioLoader,
    ClipFeatures,
    ClipFile,
    LabelledAudio,
    extract_audio,
    extract_files,
    labels_by_caption,
    resolve_labels,
)
from foley.metrics.protocols import EvaluationProtocol
from foley.metrics.scores import SCORES, Comparison, Estimate, label_accuracy

SILENCE_PEAK = 1e-4  # -80 dBFS

Pairing = Literal["auto", "required", "none"]

_log = get_logger(__name__)


class PairingError(ValueError):
    """Pairing was asked for and a clip has no counterpart, or an id occurs twice."""


def pair_clips(
    generated: ClipFeatures, reference: ClipFeatures, pairing: Pairing
) -> tuple[ClipFeatures, list[int] | None]:
    """The reference's recordings, each once, and the place there of each generated clip's, or None for unpaired sets.

    Args:
        pairing: "required" raises PairingError for a clip of either set without counterpart, "none" compares the sets
            only, "auto" pairs where every generated clip has a reference.
    """
    recordings, places = reference.distinct()
    matches = _match(generated, reference, pairing)
    if matches is None:
        return recordings, None
    pairs = [places[match] for match in matches]
    _check_recordings(recordings, pairs, pairing)
    return recordings, pairs


def _match(generated: ClipFeatures, reference: ClipFeatures, pairing: Pairing) -> list[int] | None:
    """Index of each generated clip's reference."""
    if pairing == "none":
        return None
    position = {id: index for index, id in enumerate(reference.ids)}
    missing = [id for id in generated.ids if id not in position]
    repeated = len(position) < len(reference) or len(set(generated.ids)) < len(generated)
    if not missing and not repeated:
        return [position[id] for id in generated.ids]
    # Some ids that match and some that do not are a mistake, not two unrelated sets.
    if pairing == "required" or 0 < len(missing) < len(generated):
        raise PairingError(
            f"{len(missing)} of {len(generated)} generated clips have no reference (first: {missing[:5]}; repeated "
            f"ids: {repeated}); give each clip its reference's id, or set pairing=none"
        )
    return None


def _check_recordings(recordings: ClipFeatures, pairs: Sequence[int], pairing: Pairing) -> None:
    """A recording that nothing was generated for is an error where pairs are required."""
    lacking = [recordings.ids[index] for index in sorted(set(range(len(recordings))) - set(pairs))]
    if not lacking:
        return
    message = f"{len(lacking)} of {len(recordings)} reference recordings have no generated clip (first: {lacking[:5]})"
    if pairing == "required":
        raise PairingError(f"{message}; generate the rest, or set pairing=auto")
    _log.info("%s; the distances are to all of them", message)


class SilentAudioError(ValueError):
    """Every clip of a set is silent: no score of it would mean anything."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over `n` labelled clips when the classifier chooses among `choices` classes, and per class."""

    accuracy: float
    n: int
    choices: int
    per_class: dict[str, tuple[float, int]]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of generated clips under one part of a protocol, by name, and how often which class is met."""

    protocol: dict[str, Any]
    n_generated: int
    n_reference: int
    pairing: str
    scores: dict[str, Estimate]
    accuracy: dict[str, Accuracy]
    n_unlabelled: int
    silent: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _check_silence(clips: ClipFeatures, name: str) -> list[str]:
    silent = [id for id, peak in zip(clips.ids, clips.peaks.tolist(), strict=True) if peak < SILENCE_PEAK]
    if len(silent) == len(clips):
        raise SilentAudioError(
            f"all {len(clips)} {name} clips are silent (peak below {SILENCE_PEAK:g}): {', '.join(silent[:10])}; check "
            "the decoder and the sampling settings that made them"
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
    rows = [index for index, label in enumerate(labels) if label in choices]
    if not rows:
        return None
    columns = torch.tensor([all_labels.index(choice) for choice in choices])
    chosen = logits[rows][:, columns]
    targets = torch.tensor([list(choices).index(str(labels[row])) for row in rows])
    per_class = {
        choices[int(target)]: (label_accuracy(chosen[targets == target], targets[targets == target]), int(count))
        for target, count in zip(*targets.unique(return_counts=True), strict=True)
    }
    return Accuracy(label_accuracy(chosen, targets), len(rows), len(choices), per_class)


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
    silent = _check_silence(generated, "generated")
    _check_silence(reference, "reference")
    recordings, pairs = pair_clips(generated, reference, pairing)
    labels = protocol.extractor.labels
    unlabelled = sum(label not in labels for label in generated.labels) if labels else 0
    if unlabelled:
        _log.warning("%d of %d generated clips carry no label of the extractor", unlabelled, len(generated))
    sets = Comparison(generated, recordings, pairs, protocol.extractor, protocol.inception_splits, resamples)
    scores: dict[str, Estimate] = {}
    for name in protocol.scores:
        scores |= SCORES[name](sets)
    return Evaluation(
        protocol=protocol.describe(),
        n_generated=len(generated),
        n_reference=len(recordings),
        pairing="none" if pairs is None else "paired by id",
        scores=scores,
        accuracy=_accuracies(generated, protocol),
        n_unlabelled=unlabelled,
        silent=silent,
    )


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
) -> Evaluation:
    """Scores of audio files.

    Args:
        load: reads a file; the protocol's preprocessing does the rest.
        captions: known (caption, label) pairs, beside those of the reference; a clip without label of its own takes
            that of its prompt (see `resolve_labels`).
        named_labels: labels that a prompt may name in words; leave out those that mean other things too ("wood").
        resamples: as in `evaluate_features`.
    """
    known = labels_by_caption([*captions, *((clip.caption, clip.label) for clip in reference)])
    labels = resolve_labels(samples, known, named_labels)
    generated = extract_files(samples, protocol, load, cache_directory).with_labels(labels)
    known_features = extract_files(reference, protocol, load, cache_directory)
    return evaluate_features(generated, known_features, protocol, pairing, resamples)
