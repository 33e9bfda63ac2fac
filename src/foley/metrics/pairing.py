"""Which reference recording each generated clip was made after, by their ids."""

from collections.abc import Sequence
from typing import Literal

from foley.logs import get_logger
from foley.metrics.features import ClipFeatures

log = get_logger(__name__)

Pairing = Literal["auto", "required", "none"]


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
    log.info("%s; the distances are to all of them", message)
