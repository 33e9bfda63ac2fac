"""Begins a run from an earlier run's weights, and says exactly what was and was not taken over."""

from dataclasses import dataclass
from pathlib import Path

from foley.core.components import CheckpointError, compare_states
from foley.core.logs import get_logger
from foley.system.checkpoint import FOLEY_KEY, read_training_checkpoint
from foley.training.base import FoleyModule

_log = get_logger(__name__)


@dataclass(frozen=True)
class WarmStartReport:
    """Keys taken over, keys only this run has (they keep their initial values), and keys only the old run has."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


def warm_start(module: FoleyModule, path: Path) -> WarmStartReport:
    """Load the (averaged) weights of `path`, a .ckpt or a run's folder, into `module` where the names agree.

    The rest is logged. The optimizer starts afresh, the latent normaliser is the earlier run's.
    Raises CheckpointError where no name agrees, a shape differs, or the latents come from another codec.
    """
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    checkpoint = read_training_checkpoint(path)
    saved = checkpoint["state_dict"]
    _check_codec(path, checkpoint[FOLEY_KEY].get("codec_hash"), module.checkpoint_metadata.get("codec_hash"))
    states = compare_states(saved, module.saved_state(module.state_dict()))
    if states.reshaped or not states.common:
        raise CheckpointError(
            f"ckpt={path} cannot start this run: "
            + ("; ".join(states.reshaped) or "no parameter has the same name")
            + ". Choose the model config of the earlier run."
        )
    module.load_state_dict({key: saved[key] for key in states.common}, strict=False)  # the rest is reported below
    report = WarmStartReport(tuple(states.common), tuple(states.missing), tuple(states.unexpected))
    _log.info("warm start from %s: %d tensors loaded", path, len(report.loaded))
    for kind, keys in (("new (initial values kept)", report.new), ("dropped", report.dropped)):
        if keys:
            _log.warning("warm start: %d tensors %s: %s", len(keys), kind, ", ".join(keys))
    return report


def _check_codec(path: Path, saved: str | None, own: str | None) -> None:
    if saved and own and saved != own:
        raise CheckpointError(
            f"ckpt={path} was trained on latents of codec {saved}, this run's latents are of codec {own}; "
            "encode the data with the earlier codec, or train from the beginning"
        )
