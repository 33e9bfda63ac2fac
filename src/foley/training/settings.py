"""What of a run's config may change where the run goes on, and what makes weights unfit to begin another run with.

A resumed run takes over weights, moments, averages and the place in the data. So of its config some settings can change
("applied": the learning rate, the length, what is logged), and others would be ignored or would break what is taken
over ("refused"). None is ignored: `is_applied` classes every key, and what it does not know is refused.
"""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from foley.core.components import CheckpointError, current_config, read_pickle, written_out
from foley.core.config import locate, relative_to_checkout
from foley.core.hashing import hash_file
from foley.core.logs import get_logger
from foley.system.checkpoint import FOLEY_KEY

_log = get_logger(__name__)

SETTINGS_KEY = "settings"
"""Entry of a checkpoint's description: the config of the run, as plain values."""
FILES_KEY = "file_hashes"
"""Entry of a checkpoint's description: what the files held that its components were built from."""

_OF_BATCHES = ("memory_gib", "length_multiple")  # of a text encoder

RULES: tuple[tuple[str, bool], ...] = (
    # What the optimizer is belongs to its moments; its rate, decay and the like are set anew.
    ("optimizer._target_", False),
    ("optimizer._partial_", False),
    ("optimizer.*", True),
    ("lr_schedule.*", True),
    ("task.optimizer._target_", False),
    ("task.optimizer.*", True),
    ("task.lr_schedule.*", True),
    ("task.gradient_clip_norm", True),
    ("task.discriminator_optimizer._target_", False),
    ("task.discriminator_optimizer.*", True),
    # How many batches of an epoch count; how many make a step does not, for data.batch_size is that of a step.
    ("trainer.limit_train_batches", False),
    ("trainer.overfit_batches", False),
    ("trainer.*", True),
    ("ddp_strategy*", True),
    ("compile", True),
    ("task.compile", True),
    ("float32_matmul_precision", True),
    # Averages that were never taken cannot be resumed, and taken ones must not be lost.
    ("callbacks.ema", False),
    ("callbacks.ema._target_", False),
    ("callbacks.*", True),
    ("logger*", True),
    ("name", True),
    ("optimized_metric", True),
    # What refers to these is compared itself.
    ("stages*", True),
    ("hydra*", True),
    ("experiment", True),
    ("debug", True),
    # Where things lie. Codec, teacher and latents are bound by their hashes.
    ("paths.*", True),
    ("codec_path", True),
    ("system", True),
    ("task.teacher.path", True),
    ("data.cache_dir", True),
    ("data.text_dir", True),  # embeddings are the same, made now or before
    ("task.teacher.text_dir", True),
    ("task.base.path", True),
    ("task.base.text_dir", True),
    ("task.codec.source", True),
    ("data.num_workers", True),
    ("data.pin_memory", True),
    ("*.gradient_checkpointing", True),
    *((f"*text.{option}", True) for option in ("device", "download", "cache_dir", "dtype", *_OF_BATCHES)),
    # What this command does, rather than what the run is.
    ("ckpt_path", True),
    ("ckpt_allow*", True),
    ("overwrite", True),
    ("slice_minutes", True),
)
"""Pattern of dotted keys to whether a resumed run applies a change of them; the first that fits, others refuse."""

_PLACES = ("cache_dir", "directory", "path", "source", "text_dir")
NEUTRAL = ("device", "download", *_PLACES, "dtype", *_OF_BATCHES, "gradient_checkpointing")
"""Options of components that say where or how they compute, not what."""

_ABSENT = "(absent)"
# How often a timestep is trained on, and what weights begin with: options that do not change what they mean.
_OF_TRAINING = ("logit_normal", "xavier_output")
# Options that add a part, which begins at zero.
_PARTS = ("denoiser.context_dim", "denoiser.guidance_embedding", "denoiser.length_embedding")


def is_applied(key: str) -> bool:
    """Whether a resumed run applies a changed setting, rather than refusing it.

    >>> is_applied("optimizer.lr"), is_applied("seed"), is_applied("callbacks.ema.decay"), is_applied("callbacks.ema")
    (True, False, True, False)
    """
    return next((applied for pattern, applied in RULES if fnmatchcase(key, pattern)), False)


def portable(config: Any) -> Any:
    """Plain settings whose paths inside the checkout are named from there, so that they hold where it moved."""
    if isinstance(config, Mapping):
        return {str(key): portable(value) for key, value in config.items()}
    return [portable(value) for value in config] if isinstance(config, list | tuple) else relative_to_checkout(config)


def changes(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """`(dotted key, before, now)` of every setting that differs; one that appears or goes away counts as a whole.

    >>> list(changes({"ema": {"decay": 0.9}, "seed": 0}, {"ema": None, "seed": 0}))
    [('ema', {'decay': 0.9}, None)]
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in [*before, *(name for name in now if name not in before)]:
            yield from changes(before.get(name, _ABSENT), now.get(name, _ABSENT), f"{key}.{name}".lstrip("."))
    elif before != now and {str(before), str(now)} != {"None", _ABSENT}:
        yield key, before, now


def stored_settings(path: Path) -> dict[str, Any] | None:
    """The config of the run that wrote a checkpoint: the checkpoint's own, or of older ones the run folder's.

    None where neither holds one.
    """
    checkpoint = read_pickle(path, mmap=True)
    settings = checkpoint.get(FOLEY_KEY, {}).get(SETTINGS_KEY)
    snapshot = path.resolve().parent.parent / "config.yaml"
    if settings is None and snapshot.is_file():
        settings = portable(OmegaConf.to_container(OmegaConf.load(snapshot)))
    return None if settings is None else current_config(settings)


def require_resumable(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError with every setting that the run of checkpoint `path` cannot go on with; log the others."""
    before = stored_settings(path)
    if before is None:
        _log.warning("%s says nothing of the settings it was trained with: this run's are not compared with them", path)
        return
    changed = [change for change in changes(before, settings) if not _asks_nothing(change)]
    if refused := [_line(change) for change in changed if not is_applied(change[0])]:
        raise CheckpointError(
            f"a run that goes on from {path} cannot change these settings:\n  "
            + "\n  ".join(refused)
            + "\nLeave them as they were, or start a new run from its weights: ckpt= in the place of ckpt_path=, and "
            "another folder."
        )
    for change in changed:
        if not change[0].startswith(("paths.", "hydra", "ckpt_path", "overwrite", "task.")):
            _log.info("goes on with another setting: %s", _line(change))


def _asks_nothing(change: tuple[str, Any, Any]) -> bool:
    """A run that goes on needs no weights to begin with: to leave `ckpt=` out is no wish for other ones."""
    key, _, now = change
    return key == "ckpt" and now is None


def _line(change: tuple[str, Any, Any]) -> str:
    key, before, now = change
    return f"{key}: {before} in the checkpoint, {now} in this run"


def unlike(before: Mapping[str, Any], now: Mapping[str, Any], common: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """`(key, before, now)` of what makes weights of one description mean another thing in a module of another.

    Shapes may well agree: epsilon in the place of v, other words under the same token numbers, other heads.

    Args:
        before, now: what checkpoints say of themselves, see `FoleyModule`.
        common: names of the weights that are taken over.

    The text encoder, the process and the normaliser are compared, and every component that weights are taken over of.
    A part that only one side has (cross-attention after pre-training without text) is no difference in meaning.
    """
    names = {"text", "process", "normaliser"} | {name.partition(".")[0] for name in common}
    old, new = _components(before), _components(now)
    return [
        change
        for name in sorted(names & set(old) & set(new))
        for change in changes(old[name], new[name], name)
        if change[0].rpartition(".")[-1] not in (*NEUTRAL, *_OF_TRAINING) and not _is_a_part(*change)
    ]


def _components(described: Mapping[str, Any]) -> dict[str, Any]:
    """Configs of the components, written out, with files by their content: the same words may lie in two places."""
    given = {name: config for name, config in described["components"].items() if config}
    configs = {name: portable(written_out(config)) for name, config in given.items()}
    # Weights of a system's folder, or of an older run, come without hashes: their files are what lies there now.
    hashes = described[FILES_KEY] if FILES_KEY in described else file_hashes(given)
    for key, digest in hashes.items():
        name, _, option = key.partition(".")
        configs[name][option] = f"a file of SHA-256 {digest[:12]}"
    return configs


def _is_a_part(key: str, before: Any, now: Any) -> bool:
    return key in _PARTS and (not before or not now or _ABSENT in (before, now))


def file_hashes(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The content of files that components are built from, such as a tokenizer: `component.option` to SHA-256."""
    return {
        f"{name}.{option}": hash_file(locate(value))
        for name, config in configs.items()
        for option, value in config.items()
        if isinstance(value, str) and value and locate(value).is_file()
    }


def normaliser_gap(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> float:
    """How far apart two sets of latent statistics are: in standard deviations, or in e-folds of these.

    Args:
        before, now: state dicts with `normaliser.mean` and `normaliser.std`, each `[C]`.

    >>> import torch
    >>> state = {"normaliser.mean": torch.zeros(2), "normaliser.std": torch.ones(2)}
    >>> normaliser_gap(state, {**state, "normaliser.mean": torch.full((2,), 3.0)})
    3.0
    """
    if "normaliser.mean" not in before or "normaliser.mean" not in now:
        return 0.0
    mean, std = before["normaliser.mean"], before["normaliser.std"]
    shift = (now["normaliser.mean"].to(mean) - mean).abs() / std
    stretch = (now["normaliser.std"].to(std) / std).log().abs()
    return float(torch.maximum(shift.mean(), stretch.mean()))
