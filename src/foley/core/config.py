"""Where things lie, in a checkout and in an installed package, and the OmegaConf resolvers that the configs use.

PyTorch is imported where it is asked, so that the command's help and completion answer at once.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = (_PACKAGE / "shipped").is_dir()  # hatch_build.py puts it into the wheel; a checkout has none

SHIPPED_ROOT = _PACKAGE / "shipped" if _INSTALLED else _PACKAGE.parents[1]
"""Holds what travels with the package: configs/, scripts/, data/ and the root scripts, laid out as in the checkout."""

PROJECT_ROOT = Path.cwd() if _INSTALLED else SHIPPED_ROOT
"""Where outputs go and relative paths start: the checkout, or with an installed package the current folder."""

CONFIG_DIR = SHIPPED_ROOT / "configs"


def shipped(name: str) -> Path:
    """What ships under this name in data/: `demo`, `extractor`, `prompts/demo.jsonl`, ...; it may not exist.

    >>> (shipped("demo") / "system.json").is_file()
    True
    """
    return SHIPPED_ROOT / "data" / name


def default_cache_dir() -> str:
    """Where converted weights and downloads are kept: the variable FOLEY_CACHE, or else `~/.cache/foley`."""
    return os.environ.get("FOLEY_CACHE", "~/.cache/foley")


def default_hub_dir() -> Path | None:
    """A folder laid out as the hub is, in its place: the variable FOLEY_HUB_DIR; None is the hub itself."""
    folder = os.environ.get("FOLEY_HUB_DIR")
    return Path(folder).expanduser() if folder else None


def published_name(system: str | Path | None) -> str | None:
    """`system` where it names a published one, `configs/published/<name>.yaml`; None for any path.

    >>> published_name("ezaudio_xl"), published_name("./ezaudio_xl"), published_name(Path("ezaudio_xl"))
    ('ezaudio_xl', None, None)
    """
    if not isinstance(system, str) or not system.isidentifier():
        return None
    return system if (CONFIG_DIR / "published" / f"{system}.yaml").is_file() else None


PIPELINE_INDEX = "model_index.json"
"""Of the folder of a pipeline of diffusers."""
SYSTEM_FILE = "system.json"
"""Of the folder of a system of ours."""
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_composing = RLock()


def is_repository(name: str) -> bool:
    """Whether it reads as OWNER/NAME."""
    return _REPOSITORY.fullmatch(name) is not None


def hub_name(system: str | Path | None) -> str | None:
    """`system` where it reads as OWNER/NAME and nothing lies at that path; None for all else.

    >>> hub_name("cvssp/audioldm2"), hub_name("a/b/c"), hub_name("run/last.ckpt"), hub_name("demo")
    ('cvssp/audioldm2', None, None, None)
    """
    if not isinstance(system, str) or not is_repository(system):
        return None
    return None if Path(system).suffix == ".ckpt" or Path(system).exists() else system


def is_pipeline(system: str | Path | None) -> bool:
    """Whether `system` is a folder of diffusers, or may be a repository of the hub."""
    return system is not None and (
        hub_name(system) is not None or (Path(system).expanduser() / PIPELINE_INDEX).is_file()
    )


def published_config(name: str, overrides: Mapping[str, Any] | None = None) -> DictConfig:
    """What `configs/published/<name>.yaml` says: `published` builds the loader, `sampling` has the defaults.

    Args:
        overrides: merged into it, such as `{"published": {"dtype": "float16"}}`.
    """
    merged = OmegaConf.merge(_compose_published(name), overrides or {})
    assert isinstance(merged, DictConfig)
    return merged


@lru_cache
def _compose_published(name: str) -> DictConfig:
    return compose_aside(f"published/{name}")


def compose_aside(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of this name in configs/, also where the command's own application of Hydra is running."""
    # Hydra composes one application at a time: the one that this may be inside of is set aside, and threads take turns.
    with _composing:
        around = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
                return compose(config_name, list(overrides))
        finally:
            GlobalHydra.instance().hydra = around  # the context manager leaves another instance


def published_default(key: str, otherwise: Any, _root_: DictConfig) -> Any:
    """What the published system or pipeline that the option `system` names says of sampling; else `otherwise`."""
    system = OmegaConf.select(_root_, "system")
    if published_name(system) is None and not is_pipeline(system):
        return otherwise
    from foley.core.pipelines import known_config

    described = known_config(system, _root_.get("system_overrides"), _root_.get("hub_dir"))
    return otherwise if described is None else described.sampling.get(key, otherwise)


def published_codec(_root_: DictConfig) -> str | None:
    """The codec of a run that begins with published weights (`ckpt`) or distils them (`system`): what came with them.

    Of a system's folder, too; None where they bring none.
    """
    for source in (OmegaConf.select(_root_, option, default=None) for option in ("system", "ckpt")):
        if source and (published_name(source) or (Path(source).expanduser() / SYSTEM_FILE).is_file()):
            return str(source)
    return None


def relative_to_checkout(value: Any) -> Any:
    """A path inside the checkout as seen from its root, so that it holds where the checkout moved; others as given.

    What ships with an installed package is named as it is in a checkout; `locate` finds it again.
    """
    if not isinstance(value, str):
        return value
    return value.removeprefix(f"{SHIPPED_ROOT}/").removeprefix(f"{PROJECT_ROOT}/")


def locate(stored: str) -> Path:
    """The file or folder of a path that `relative_to_checkout` gave: in the project, or else among what ships."""
    path = PROJECT_ROOT / stored
    return path if path.exists() or not (SHIPPED_ROOT / stored).exists() else SHIPPED_ROOT / stored


def cpu_precision() -> str:
    """Lightning's name for the fastest precision of this processor: bfloat16 only where it computes in it."""
    import torch

    # PyTorch offers no public query for this instruction set.
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def run_id(folder: str) -> str:
    """An id that follows from the output folder alone: by it a restarted run's loggers find its earlier lives."""
    return hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:12]


def run_folder(kind: str) -> str:
    """The folder of a new run below outputs/, such as outputs/train/tiny/2026-11-28_12-30-05_9f3c2a1b.

    No two runs get the same one, also of those that begin in one second; the processes of one run, which a cluster
    starts apart, do: there the name says the job in the place of a random number.
    """
    return str(PROJECT_ROOT / "outputs" / kind / "_".join(_run_stamp()))


def log_folder(output: str, kind: str) -> str:
    """Where the log of a command lies: in its output folder, or in one of a new run where that is a URL.

    >>> log_folder("data/qwen", "caption")
    'data/qwen'
    """
    return run_folder(kind) if "://" in str(output) else str(output)


def _run_stamp() -> tuple[str, ...]:
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job and step and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        start = float(os.environ.get("SLURM_JOB_START_TIME", "0"))  # of the job: processes read their clocks apart
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        return (*((_readable(datetime.fromtimestamp(start)),) if start else ()), f"job{job}-{step}-{restarts}")
    if (launch := os.environ.get("TORCHELASTIC_RUN_ID")) is not None:
        return (f"launch{_own_name(launch)}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",)
    return _readable(datetime.now()), secrets.token_hex(4)


def _own_name(launch: str) -> str:
    """The name of a launch of torchrun, by which its processes know each other; of one node it may have none.

    Raises ValueError where several nodes were given none.
    """
    if launch != "none":
        return launch
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "processes of several nodes need one folder: give torchrun --rdzv-id=NAME, or hydra.run.dir=FOLDER"
        )
    # torchrun keeps a folder for each launch, in which processes report errors: FOLDER/attempt_0/RANK/error.json.
    return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[2].name.removeprefix("none_")


def _readable(time: datetime) -> str:
    return f"{time:%Y-%m-%d_%H-%M-%S}"


def fused_optimizer(accelerator: str, precision: str | int) -> bool | None:
    """True for one fused kernel: on GPUs, but not with loss scaling, whose gradients are clipped outside.

    None elsewhere, which leaves AdamW its own choice; False would also rule out its next best implementation.
    """
    return True if on_gpu(accelerator) and not str(precision).startswith("16") else None


def on_gpu(accelerator: str | None) -> bool:
    """Whether a trainer with this accelerator computes on CUDA; None is a command that has no trainer."""
    import torch

    return torch.cuda.is_available() and accelerator in ("gpu", "cuda", "auto")


def loader_workers(accelerator: str | None, on_each_gpu: int) -> int:
    """Loader processes for each device: they read while a GPU computes; a CPU would share its cores with them."""
    return on_each_gpu if on_gpu(accelerator) else 0


def register_resolvers() -> None:
    """`${project_root:}` is `PROJECT_ROOT`, wherever the command runs; the others are the functions above.

    `${text:VALUE}` is VALUE, also where OmegaConf has a meaning for it, such as `???`.
    """
    OmegaConf.register_new_resolver("text", str, replace=True)
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("shipped", lambda name: str(shipped(name)), replace=True)
    OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)
    # Cached: a config names one folder, wherever it says so.
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("log_folder", log_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("fused_optimizer", fused_optimizer, replace=True)
    OmegaConf.register_new_resolver("on_gpu", on_gpu, replace=True)
    OmegaConf.register_new_resolver("loader_workers", loader_workers, replace=True)
    OmegaConf.register_new_resolver("run_id", run_id, replace=True)
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)
    OmegaConf.register_new_resolver("published", published_default, replace=True)
    OmegaConf.register_new_resolver("published_codec", published_codec, replace=True)


class GroupsForAll(SearchPathPlugin):
    """Lets the configs of scripts, which lie in configs/script and configs/bench, choose from the groups in configs.

    Before Hydra's own configs: `hydra/output` is one of ours.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend("foley", f"file://{CONFIG_DIR}")


register_resolvers()
Plugins.instance().register(GroupsForAll)
