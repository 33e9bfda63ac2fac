"""The folder of a training run: one run in it, one process at it, and a note of how the run stands.

Where a run lies already, training begins again only where it is told whether to go on or to overwrite.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from pytorch_lightning.utilities.exceptions import SIGTERMException

from foley.core.components import CheckpointError
from foley.core.files import write_json
from foley.core.locks import only_writer
from foley.core.logs import get_logger, process_rank
from foley.training.callbacks.checkpointing import TrainingInterrupted

_log = get_logger(__name__)

STATUS_FILE = "status.json"
"""Says "running", "finished", "interrupted" or "crashed", with the error; a killed run is left "running"."""

_SIGNS = ("checkpoints/*.ckpt", "metrics.csv")  # of a run; a start that failed earlier leaves none
_FILES = (
    *("checkpoints", "metrics.csv", "hparams.yaml", "config.yaml", STATUS_FILE),
    *("samples", "reconstructions", "tensorboard", "wandb"),
)


class RunExistsError(ValueError):
    """The folder of a new run holds an older one."""


@contextmanager
def run_folder(cfg: DictConfig) -> Iterator[None]:
    """Hold `cfg.paths.output_dir` for a run, and note there how it ends; other processes than the first do neither.

    Raises RunExistsError where it holds a run that is neither gone on with nor overwritten, ValueError where
    `overwrite` would remove what the run needs, and FolderInUseError where another process trains there.
    """
    if not is_main_process():
        yield
        return
    folder = Path(cfg.paths.output_dir)
    with only_writer(folder, "a training run"):
        _make_way(cfg, folder)
        with _status(folder, cfg):
            yield


def is_main_process() -> bool:
    """Whether this is the one process of a run that keeps its folder."""
    return process_rank() == 0 and os.environ.get("NODE_RANK", "0") == "0"


def _make_way(cfg: DictConfig, folder: Path) -> None:
    held = [sign for sign in _SIGNS if any(folder.glob(sign))]
    if cfg.overwrite:
        _require_dispensable(cfg, folder)
        for name in _FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    elif held and not _goes_on(cfg.ckpt_path, folder):
        raise RunExistsError(
            f"{folder} holds a run already ({', '.join(held)}): ckpt_path=auto goes on with it, overwrite=true removes "
            "it and begins anew, and hydra.run.dir=FOLDER names another folder"
        )


def _goes_on(ckpt_path: str | None, folder: Path) -> bool:
    return ckpt_path is not None and (ckpt_path == "auto" or _lies_in(ckpt_path, folder))


def _lies_in(path: str, folder: Path) -> bool:
    return Path(path).absolute().is_relative_to(folder.absolute())


def _require_dispensable(cfg: DictConfig, folder: Path) -> None:
    needed = {key: str(cfg[key]) for key in ("ckpt_path", "ckpt", "codec_path", "system") if cfg.get(key)}
    for key, value in needed.items():
        if value == "auto" or _lies_in(value, folder):
            raise ValueError(
                f"overwrite=true removes the run in {folder}, and {key}={value} needs it: leave out one of them"
            )


@contextmanager
def _status(folder: Path, cfg: DictConfig) -> Iterator[None]:
    note = {"resume_command": resume_command(cfg)}
    write_json(folder / STATUS_FILE, {"status": "running", **note})
    try:
        yield
    except BaseException as error:
        described = {"status": ending(error), "error": f"{type(error).__name__}: {error}".rstrip(": "), **note}
        write_json(folder / STATUS_FILE, described)
        raise
    write_json(folder / STATUS_FILE, {"status": "finished", **note})


def ending(error: BaseException | None) -> str:
    """What a run that ends in this way is: "finished", "interrupted" by a signal, or "crashed"."""
    if error is None:
        return "finished"
    if isinstance(error.__context__, KeyboardInterrupt):  # before the first step Lightning makes SystemExit of it
        return "interrupted"
    return "interrupted" if isinstance(error, TrainingInterrupted | KeyboardInterrupt | SIGTERMException) else "crashed"


def find_checkpoint(ckpt_path: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from; None begins anew.

    Raises CheckpointError where a named one is absent, and for "auto" where there are checkpoints, but `last.ckpt` is
    absent or points to one that is: to begin anew would overwrite them.
    """
    if not ckpt_path:
        return None
    path = output_dir / "checkpoints" / "last.ckpt" if ckpt_path == "auto" else Path(ckpt_path)
    if path.is_file():
        return path
    others = sorted(other.name for other in path.parent.glob("*.ckpt") if other.is_file())
    if ckpt_path != "auto" or others or path.is_symlink():
        name = str(path) if ckpt_path == "auto" else ""
        fault = f" points to {os.readlink(path)}, which does not exist" if path.is_symlink() else " does not exist"
        there = f"the checkpoints there are {', '.join(others)}" if others else "there is no checkpoint there"
        raise CheckpointError(f"ckpt_path={ckpt_path}{name and f': {name}'}{fault}; {there}; give one that exists")
    _log.info("ckpt_path=auto: no checkpoint at %s yet, starting from the beginning", path)
    return None


def resume_command(cfg: DictConfig, changes: Mapping[str, Any] | None = None) -> str:
    """What to type in order to go on with the run, quoted for a shell.

    Everything that was typed is repeated, but for what to begin with: `ckpt_path=auto` takes the place of that. The
    folder is named, since a run without a name for it would get a new one.

    Args:
        cfg: the run's, composed by Hydra or by hand.
        changes: settings, by their dotted keys, that take the place of those that were typed.
    """
    given = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    new = [f"{key}={value}" for key, value in (changes or {}).items()]
    replaced = ("ckpt_path", "overwrite", *(changes or {}))
    kept = [_as_typed(word) for word in given if word.partition("=")[0].lstrip("+") not in replaced]
    words = [*_program(), *kept, *new, "ckpt_path=auto"]
    if not any(word.startswith("paths.output_dir=") for word in kept):
        words.append(f"hydra.run.dir={cfg.paths.output_dir}")
    return shlex.join(words)


def _program() -> Sequence[str]:
    """`python train.py` where that was typed in a checkout, and else `foley train`."""
    script = Path(sys.argv[0]).absolute()
    # The verb runs the script under the script's name; the interpreter alone knows what was typed.
    typed = any(Path(word).name == "train.py" for word in sys.orig_argv[1:] if "=" not in word)
    if typed and script.name == "train.py" and script.is_relative_to(Path.cwd()):
        return ["python", str(script.relative_to(Path.cwd()))]
    return ["foley", "train"]


def _as_typed(override: str) -> str:
    """An override without the quotes that the command put around its text for Hydra, and will put there again.

    >>> _as_typed("data.splits.manifest='my clips (1).csv'"), _as_typed("seed=1")
    ('data.splits.manifest=my clips (1).csv', 'seed=1')
    """
    name, _, value = override.partition("=")
    if not value.startswith("'"):
        return override
    return f"{name}={OverridesParser.create().parse_override(override).value()}"
