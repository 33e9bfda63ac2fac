"""Scripts in the process of the test: compose a command's config as its command line would, and run its `main`."""

import runpy
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from foley.core.config import CONFIG_DIR, PROJECT_ROOT


def compose_command(name: str, *overrides: str) -> DictConfig:
    """The config of `name`, such as `sample`, `script/prepare` or `bench/caching`."""
    folder, _, config = name.rpartition("/")
    with initialize_config_dir(str(CONFIG_DIR / folder), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def load_command(name: str) -> dict[str, Any]:
    """Everything that the script of a config defines: `sample.py`, `scripts/prepare.py`, `scripts/bench/caching.py`."""
    folder = PROJECT_ROOT if "/" not in name else PROJECT_ROOT / "scripts"
    return runpy.run_path(str(folder / f"{name.removeprefix('script/')}.py"), run_name=name)


def run_command(name: str, *overrides: str) -> Any:
    """Compose the config of a command and hand it to the command's `main`; returns what that returns."""
    return load_command(name)["main"](compose_command(name, *overrides))
