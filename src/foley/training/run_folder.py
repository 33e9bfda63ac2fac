"""The folder of a training run, and what to type in order to go on with it."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


def resume_command(cfg: DictConfig) -> str:
    """What to type in order to go on with the run, quoted for a shell.

    Everything that was typed is repeated, but for what to begin with: `ckpt_path=auto` takes the place of that. The
    folder is named, since a run without a name for it would get a new one.

    Args:
        cfg: the run's, composed by Hydra or by hand.
    """
    given = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    kept = [word for word in given if word.partition("=")[0].lstrip("+") not in ("ckpt_path", "overwrite")]
    words = [*_program(), *kept, "ckpt_path=auto"]
    if not any(word.startswith("paths.output_dir=") for word in kept):
        words.append(f"hydra.run.dir={_hydra_quoted(str(cfg.paths.output_dir))}")
    return shlex.join(words)


def _program() -> Sequence[str]:
    """`python train.py` where that was typed in a checkout, and else `foley train`."""
    script = Path(sys.argv[0]).absolute()
    if script.name == "train.py" and script.is_relative_to(Path.cwd()):
        return ["python", str(script.relative_to(Path.cwd()))]
    return ["foley", "train"]


def _hydra_quoted(value: str) -> str:
    """A path as a value of Hydra's grammar, which reads `=`, parentheses and other signs in its own way."""
    return value if re.fullmatch(r"[\w/.:+%@-]+", value, re.ASCII) else "'" + value.replace("'", "\\'") + "'"
