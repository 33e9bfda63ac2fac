"""What every script is wrapped in: Hydra with the configs that ship, free text that needs no quotes, and `--help`."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from foley.cli import errors
from foley.cli.help import asks_for_help, chosen_config, help_page, read_page
from foley.cli.overrides import SWEEP_FLAGS, quote_overrides
from foley.core.config import CONFIG_DIR, SHIPPED_ROOT

Task = Callable[[DictConfig], Any]


def command(
    config_name: str,
    check: Callable[[Sequence[str]], object] = lambda arguments: None,
    synonyms: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Task], Callable[..., Any]]:
    """Make `main(cfg)` a command: called without a config it composes one from the command line.

    Args:
        config_name: the primary config in configs/, which is also the help page (see `foley.cli.help`).
        check: looks at the arguments before Hydra does, and raises SystemExit with what is to be typed instead.
        synonyms: other names of options, each with the one that the config knows.

    >>> @command("sample")
    ... def main(cfg):
    ...     return cfg.prompt
    >>> main(DictConfig({"prompt": "a dog barks"}))
    'a dog barks'
    """

    def decorate(task: Task) -> Callable[..., Any]:
        @functools.wraps(task)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return task(cfg)
            with errors.one_message(config_name):
                if asks_for_help(sys.argv[1:]):
                    page = help_page(chosen_config(sys.argv[1:], config_name), within_checkout(sys.argv[0]))
                    return sys.stdout.write(page)
                sys.argv[1:] = [_named(argument, synonyms) for argument in sys.argv[1:]]
                check(sys.argv[1:])
                refuse_incomplete(config_name, sys.argv)
                return run_with_hydra(task, config_name, quote_overrides(sys.argv))

        return main

    return decorate


def _named(argument: str, synonyms: Mapping[str, str]) -> str:
    """`argument` by the name that the config knows.

    >>> _named("teacher=ezaudio_xl", {"teacher": "system"})
    'system=ezaudio_xl'
    """
    option, equals, value = argument.partition("=")
    return f"{synonyms[option]}{equals}{value}" if equals and option in synonyms else argument


def refuse_incomplete(config_name: str, arguments: Sequence[str]) -> None:
    """Raise SystemExit with a line for each required option that was not given; Hydra's own flags need none.

    >>> refuse_incomplete("evaluate", ["evaluate.py", "samples=CLIPS"])
    Traceback (most recent call last):
    SystemExit: evaluate.py lacks
      reference=  real clips to compare with: a folder, or a manifest (.jsonl, .csv, .tsv)
    """
    script, *typed = arguments
    if any(argument.startswith("-") and argument not in SWEEP_FLAGS for argument in typed):
        return
    page, given = read_page(config_name), {argument.partition("=")[0].lstrip("+") for argument in typed}
    known = {option.name.partition(".")[0] for option in [*page.options, *page.groups]}
    lacking = [option for option in page.options if option.required and option.name not in given]
    # What is misspelt is not missing: Hydra has the better word for it.
    if lacking and {name.partition(".")[0] for name in given} <= known:
        lines = [f"  {option.name}=  {option.words}" for option in lacking]
        raise SystemExit("\n".join([f"{within_checkout(script)} lacks", *lines]))


def refuse_single_values(config_name: str, cfg: DictConfig) -> None:
    """Raise ValueError for an option that is a list in `configs/{config_name}.yaml`, and was given one value.

    >>> refuse_single_values("bench/guidance", DictConfig({"scales": 7}))
    Traceback (most recent call last):
    ValueError: scales=7: give a list, scales=[7]
    """
    own: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{config_name}.yaml"))
    for name in (name for name, value in own.items() if isinstance(value, list) and name in cfg):
        value = cfg[name]
        if value is not None and not isinstance(value, ListConfig):
            raise ValueError(f"{name}={value}: give a list, {name}=[{value}]")


def run_with_hydra(task: Task, config_name: str, quoted: list[str]) -> Any:
    """Compose the config from the arguments and run the task on it; any error of Hydra or of the task is raised."""
    typed = sys.argv

    def run(cfg: DictConfig) -> Any:
        # Processes that are started for other ranks repeat the arguments, and quote them for themselves.
        sys.argv = typed
        with errors.job(config_name):
            refuse_single_values(config_name, cfg)
            return task(cfg)

    # Hydra calls the job, and its log, by the module of the function that it runs.
    run.__module__ = Path(inspect.unwrap(task).__code__.co_filename).stem
    # The folder of its own config first: Hydra looks for the groups that `+group=choice` adds beside that config.
    folder, _, name = config_name.rpartition("/")
    # Otherwise Hydra prints errors itself, with a part of the traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra finds a sweep's flag only in front of the options, or behind them all.
    program, *rest = quoted
    sys.argv = [program, *sorted(rest, key=lambda word: word not in SWEEP_FLAGS)]
    try:
        return hydra.main(version_base="1.3", config_path=str(CONFIG_DIR / folder), config_name=name)(run)()
    finally:
        sys.argv = typed


def within_checkout(script: str) -> str:
    """`scripts/prepare.py` for a script of the checkout, wherever it is called from; another one as given."""
    path = Path(script).resolve()
    return str(path.relative_to(SHIPPED_ROOT)) if path.is_relative_to(SHIPPED_ROOT) else script


def renamed(**names: str) -> Callable[[Sequence[str]], None]:
    """A `check` of `command` that refuses options by their former names and gives the present ones.

    >>> renamed(codec_ckpt="codec_path")(["codec_ckpt=CODEC"])
    Traceback (most recent call last):
    SystemExit: codec_ckpt=CODEC: this option is codec_path= now: give codec_path=CODEC
    """

    def refuse(arguments: Sequence[str]) -> None:
        given = [(argument, *argument.lstrip("+").partition("=")[::2]) for argument in arguments]
        for new in dict.fromkeys(names.values()):
            old = [argument for argument, name, _ in given if names.get(name) == new]
            values = [value for _, name, value in given if names.get(name, name) == new]
            if old:
                only = "" if len(values) == 1 else "only one of them, such as "
                raise SystemExit(f"{', '.join(old)}: this option is {new}= now: give {only}{new}={values[0]}")

    return refuse
