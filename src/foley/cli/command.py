"""What every script is wrapped in: Hydra with the configs that ship, free text that needs no quotes, and `--help`."""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from foley.cli.help import asks_for_help, chosen_config, help_page
from foley.core.config import CONFIG_DIR, SHIPPED_ROOT

Task = Callable[[DictConfig], Any]


def command(
    config_name: str,
    text: Sequence[str] = (),
    check: Callable[[Sequence[str]], object] = lambda arguments: None,
) -> Callable[[Task], Callable[..., Any]]:
    """Make `main(cfg)` a command: called without a config it composes one from the command line.

    Args:
        config_name: the primary config in configs/, which is also the help page (see `foley.cli.help`).
        text: options whose values are free text, such as a prompt; commas and quotes in them mean nothing to Hydra.
        check: looks at the arguments before Hydra does, and raises SystemExit with what is to be typed instead.

    >>> @command("sample", text=["prompt"])
    ... def main(cfg):
    ...     return cfg.prompt
    >>> main(DictConfig({"prompt": "a dog barks"}))
    'a dog barks'
    """

    def decorate(task: Task) -> Callable[..., Any]:
        # The folder of its own config first: Hydra looks for the groups that `+group=choice` adds beside that config.
        folder, _, name = config_name.rpartition("/")
        run = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR / folder), config_name=name)(task)

        @functools.wraps(task)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return task(cfg)
            if asks_for_help(sys.argv[1:]):
                return sys.stdout.write(
                    help_page(chosen_config(sys.argv[1:], config_name), within_checkout(sys.argv[0]))
                )
            check(sys.argv[1:])
            # In place: processes that are started for other ranks repeat these arguments.
            sys.argv = quote_overrides(sys.argv, text)
            return run()

        return main

    return decorate


def within_checkout(script: str) -> str:
    """`scripts/prepare.py` for a script of the checkout, wherever it is called from; another one as given."""
    path = Path(script).resolve()
    return str(path.relative_to(SHIPPED_ROOT)) if path.is_relative_to(SHIPPED_ROOT) else script


def quote_overrides(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Quote the values of free-text Hydra overrides, so that commas, quotes and `${` in a prompt are just text.

    >>> quote_overrides(["prompt=rain, then a dog's bark", "seed=1"], ["prompt"])
    ["prompt='rain, then a dog\\\\'s bark'", 'seed=1']
    """
    return [_quote(argument) if argument.partition("=")[0] in keys else argument for argument in arguments]


def _quote(override: str) -> str:
    key, _, value = override.partition("=")
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return override
    # Hydra reads a backslash as an escape only where it precedes a quote or an interpolation.
    escaped = re.sub(r"(\\*)('|\$\{|$)", lambda match: 2 * match[1] + ("\\" + match[2] if match[2] else ""), value)
    return f"{key}='{escaped}'"


def renamed(**names: str) -> Callable[[Sequence[str]], None]:
    """A `check` of `command` that refuses options by their former names and gives the present ones.

    >>> renamed(codec_ckpt="codec_path")(["codec_ckpt=CODEC"])
    Traceback (most recent call last):
    SystemExit: codec_ckpt=CODEC: this option is codec_path= now: give codec_path=CODEC
    """

    def refuse(arguments: Sequence[str]) -> None:
        for argument in arguments:
            name, _, value = argument.partition("=")
            if (new := names.get(name.lstrip("+"))) is not None:
                raise SystemExit(f"{argument}: this option is {new}= now: give {new}={value}")

    return refuse
