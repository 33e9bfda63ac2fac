"""Arguments as a user types them to overrides as Hydra's grammar has them: prompts and paths need no quotes.

Text is what an option of text or of a path is given (`is_text`), and what Hydra cannot read otherwise. Anything else
keeps Hydra's meaning: numbers, lists, choices of groups, the values of a sweep.
"""

import os
import re
from collections.abc import Sequence
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from foley.core.config import CONFIG_DIR

SWEEP_FLAGS = ("-m", "--multirun")
"""By which Hydra is asked for a sweep."""

_OPTION = re.compile(r"\+{0,2}[\w./@][\w./@:-]*")
_CAPTIONS = "prompt|negative_prompt|title|more"
# By the last word of their names, wherever they lie ...
_ENDINGS = (
    r"(?:.*[._])?(?:path|dirpath|dir|folder|directory|file|manifest|ckpt|checkpoint|url|column|out|output|reference)"
)
# ... and by their whole names.
_PATHS = "prompts|edit|init|control|features|system|teacher|samples|latents|share_with|key|results|run|page|template"
_PATHS += "|mel_vae|vocoder|config|dac_weights"
# It goes with every accelerator, and with none, whose options `accel.` names.
_OTHER_NAME = re.compile(r"^\+{0,2}accel\.(quantise)=")
_IS_CAPTION = re.compile(_CAPTIONS)
_IS_PATH = re.compile(rf"(?:.*[._])?(?:{_ENDINGS})|{_PATHS}")


def is_text(option: str) -> bool:
    """Whether what it is given is always text, also where it looks like a number, a list or an interpolation.

    >>> is_text("prompt"), is_text("data.splits.manifest"), is_text("seed")
    (True, True, False)
    """
    return bool(_IS_CAPTION.fullmatch(option) or _IS_PATH.fullmatch(option))


def quote_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments with every value that is text quoted for Hydra; flags, and what has no "=", as they are.

    `null` is no path, and `~/` in a path is the home folder. In a sweep (`-m`) commas separate paths. A group of
    configs that is given `null` is left out.

    >>> quote_overrides(["prompt=rain, then a dog's bark", "seed=1", "logger=null"])
    ["prompt='rain, then a dog\\\\'s bark'", 'seed=1', '~logger']
    """
    sweeps = any(argument in SWEEP_FLAGS for argument in arguments)
    renamed = (_OTHER_NAME.sub(r"\1=", argument) for argument in arguments)
    return [_quoted(argument, sweeps) for argument in map(_left_out, renamed) if argument is not None]


def _left_out(argument: str) -> str | None:
    """A group that is given `null`, which Hydra refuses, by the choice `none` where it has one, or left out."""
    group, _, value = argument.partition("=")
    folder = CONFIG_DIR / group.partition("@")[0]
    if value != "null" or not folder.is_dir():
        return argument
    if group == "experiment":  # none is the default, of which the folder of a run is called
        return None
    return f"{group}=none" if (folder / "none.yaml").is_file() else f"~{group}"


def _quoted(argument: str, sweeps: bool) -> str:
    option, equals, value = argument.partition("=")
    if not equals or not _OPTION.fullmatch(option):
        return argument
    name = option.lstrip("+")
    if name.startswith("hydra."):
        # Lightning repeats the folder of a run between quotes; and folders of runs may name what Hydra knows of them.
        value = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    if not _is_text_here(name, value, sweeps, _parse(f"{option}={value}")):
        return f"{option}={value}"
    if _IS_PATH.fullmatch(name) and value.startswith("~/"):
        value = os.path.expanduser(value)
    # OmegaConf takes the bare string for a missing value, the result of a resolver for what it is.
    return f"{option}={'${text:???}' if value == '???' else quote(value)}"


def _is_text_here(name: str, value: str, sweeps: bool, parsed: Override | None) -> bool:
    if parsed is None or _IS_CAPTION.fullmatch(name):
        return True
    as_hydra_has_it = value == "null" or (sweeps and parsed.is_sweep_override())
    # Runs of a sweep need folders of their own, which only what each of them is given can tell apart.
    as_hydra_has_it |= (sweeps or name.startswith("hydra.")) and "${" in value
    return bool(_IS_PATH.fullmatch(name)) and not as_hydra_has_it


def quote(value: str) -> str:
    r"""A text as Hydra's grammar has it.

    >>> quote("a dog's ${bark}")
    "'a dog\\'s \\${bark}'"
    """
    # Hydra reads a backslash as an escape only where it precedes a quote or an interpolation.
    escaped = re.sub(r"(\\*)('|\$\{|\Z)", lambda match: 2 * match[1] + ("\\" + match[2] if match[2] else ""), value)
    return f"'{escaped}'"


def _parse(override: str) -> Override | None:
    """The override as Hydra reads it; None where it cannot."""
    try:
        return _parser().parse_overrides([override])[0]
    except OverrideParseException:
        return None


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
