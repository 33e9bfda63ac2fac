"""Which generated clip was made for which reference recording: by their ids, their file names, or their captions."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from foley.core.logs import get_logger
from foley.metrics.features import ClipFeatures, ClipFile

Pairing = Literal["auto", "required", "none"]

_MOST_NAMED = 5
_RULES: dict[str, Callable[[ClipFile], str]] = {
    "file name": lambda clip: clip.path.stem,
    "caption": lambda clip: " ".join((clip.caption or "").split()),
}

_log = get_logger(__name__)


class PairingError(ValueError):
    """Pairing was asked for and a clip has no counterpart, or an id occurs twice."""


def check_pairing(pairing: str) -> None:
    """Raises PairingError for a word that is no `Pairing`."""
    if pairing not in get_args(Pairing):
        raise PairingError(f"pairing={pairing} must be one of {', '.join(get_args(Pairing))}")


def align_ids(samples: Sequence[ClipFile], reference: Sequence[ClipFile]) -> tuple[list[ClipFile], str]:
    """The samples, each under the id of its reference, and what told it: "id", "file name" or "caption".

    Where no id is common, as where a manifest's ids are paths and a clip is called after its prompt, every sample must
    have one counterpart of its own by its file's name, or else by its caption; samples stay as they are otherwise.
    """
    known = {clip.id for clip in reference}
    if not any(clip.id in known for clip in samples):
        for rule, key in _RULES.items():
            if (ids := _counterparts(samples, reference, key)) is not None:
                return [replace(clip, id=id) for clip, id in zip(samples, ids, strict=True)], rule
    return list(samples), "id"


def _counterparts(
    samples: Sequence[ClipFile], reference: Sequence[ClipFile], key: Callable[[ClipFile], str]
) -> list[str] | None:
    """The id of each sample's reference; None unless each has exactly one, and no other sample has the same."""
    by_key: dict[str, dict[object, str]] = {}
    for clip in reference:
        by_key.setdefault(key(clip), {}).setdefault(clip.path, clip.id)  # a recording under several captions is one
    keys = [key(clip) for clip in samples]
    if len(set(keys)) < len(keys) or not all(name and len(by_key.get(name, {})) == 1 for name in keys):
        return None
    return [next(iter(by_key[name].values())) for name in keys]


def pair_clips(
    generated: ClipFeatures, reference: ClipFeatures, pairing: Pairing
) -> tuple[ClipFeatures, list[int] | None]:
    """The reference's recordings, each once, and the place there of each generated clip's, or None for unpaired sets.

    Args:
        pairing: "required" raises PairingError for a clip of either set without counterpart, "none" compares the sets
            only, "auto" pairs where every generated clip has a reference. PairingError for another word.
    """
    check_pairing(pairing)
    recordings, places = reference.distinct()
    matches = _match(generated, reference, pairing)
    if matches is None:
        return recordings, None
    pairs = [places[match] for match in matches]
    _check_recordings(generated, recordings, pairs, pairing)
    return recordings, pairs


def _match(generated: ClipFeatures, reference: ClipFeatures, pairing: Pairing) -> list[int] | None:
    """Index of each generated clip's reference."""
    if pairing == "none":
        return None
    position = {id: index for index, id in enumerate(reference.ids)}
    missing = [id for id in generated.ids if id not in position]
    repeated = _repeated(generated.ids) + _repeated(reference.ids)
    if not missing and not repeated:
        return [position[id] for id in generated.ids]
    # Some ids that match and some that do not are a mistake, not two unrelated sets.
    if pairing == "required" or 0 < len(missing) < len(generated):
        twice = f": {repeated[:_MOST_NAMED]}" if repeated else ""
        raise PairingError(
            f"{len(missing)} of {len(generated)} generated clips have no reference (first: {missing[:_MOST_NAMED]}; "
            f"references are called {reference.ids[:_MOST_NAMED]}; repeated ids: {bool(repeated)}{twice}); give each "
            "clip its reference's id, or set pairing=none"
        )
    return None


def _repeated(ids: Sequence[str]) -> list[str]:
    return [id for id, count in Counter(ids).items() if count > 1]


def _check_recordings(
    generated: ClipFeatures, recordings: ClipFeatures, pairs: Sequence[int], pairing: Pairing
) -> None:
    """A recording that nothing was generated for is an error where pairs are required."""
    without = sorted(set(range(len(recordings))) - set(pairs))
    lacking = [recordings.ids[index] for index in without if recordings.ids[index] not in generated.faulty]
    if not lacking:
        return
    first = f"(first: {lacking[:_MOST_NAMED]})"
    message = f"{len(lacking)} of {len(recordings)} reference recordings have no generated clip {first}"
    if pairing == "required":
        raise PairingError(f"{message}; generate the rest, or set pairing=auto")
    _log.info("%s; the distances are to all of them", message)


def describe_pairs(
    generated: ClipFeatures, recordings: ClipFeatures, pairs: Sequence[int] | None, pairing: Pairing
) -> str:
    """How many clips pair, as a sentence for a report; empty where no pairs were asked for."""
    if pairing == "none":
        return ""
    if pairs is None:
        return (
            f"no pairs: none of the {len(generated)} generated clips (such as {generated.ids[0]!r}) has the id, file "
            f"name or caption of one of the {len(recordings)} reference recordings (such as {recordings.ids[0]!r}) "
            "alone; scores of pairs are left out"
        )
    met = len(set(pairs))
    return f"all {len(generated)} generated clips pair with {met} of {len(recordings)} reference recordings"
