"""What a command shows where it fails: one message. The traceback goes into the log of the run.

The library raises; only here is an error turned into words on the screen and an exit code.
"""

import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from foley.cli.help import read_page
from foley.core.logs import process_rank

DEBUG_VARIABLE = "FOLEY_DEBUG"
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ends: 128 + SIGINT

_OF_THE_USER = (ValueError, OSError, ImportError, MemoryError, HydraException, OmegaConfBaseException)
# Errors that these packages define are in words, whatever they derive from.
_IN_WORDS = (
    "foley.",
    "torch",
    "pytorch_lightning.",
    "lightning_fabric.",
    "huggingface_hub.",
    "safetensors",
    "soundfile",
)
_SHOWN = "_foley_shown"


@contextmanager
def one_message(config_name: str) -> Iterator[None]:
    """Around a command: any error ends it with one message on stderr and exit code 1, Ctrl-C with exit code 130.

    Args:
        config_name: the command's primary config, whose options a misspelt one is compared with.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("foley: stopped by Ctrl-C\n")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001 -- the boundary
        if not getattr(error, _SHOWN, False):
            show(error, config_name)
        raise SystemExit(1) from None


@contextmanager
def job(config_name: str) -> Iterator[None]:
    """Around the task inside Hydra, where the run has a log: shows an error at once, and ends a single run by it.

    A job of a sweep raises it again, so that the launcher and the sweeper know of it.
    """
    try:
        yield
    except Exception as error:
        show(error, config_name)
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            raise SystemExit(1) from None
        setattr(error, _SHOWN, True)
        raise


def show(error: Exception, config_name: str) -> None:
    """Write the message to stderr; the traceback into the run's log, or to stderr for who debugs."""
    lines = [f"{_who()}: {describe(error, config_name)}"]
    log = write_traceback(error)
    if _debugs():
        lines.insert(0, "".join(traceback.format_exception(error)).rstrip())
    elif log is not None:
        lines.append(f"The traceback is in {log}")
    elif is_fault(error):
        lines.append(f"{DEBUG_VARIABLE}=1 shows the traceback")
    sys.stderr.write("\n".join(lines) + "\n")


def describe(error: BaseException, config_name: str | None = None) -> str:
    """An error in words: what was wrong, where it was given, and what mends it.

    >>> describe(FileNotFoundError(2, "No such file or directory", "sounds.csv"))
    'sounds.csv: No such file or directory'
    """
    match error:
        case InstantiationException():
            return _of_instantiation(error, config_name)
        case MissingConfigException() if error.missing_cfg_file:
            group, _, choice = error.missing_cfg_file.rpartition("/")
            if choice.startswith("submitit_"):
                return f"launcher={choice.removeprefix('submitit_')} wants pip install 'foley[cluster]'"
            what = f"{group}={choice}" if group else f"--config-name={choice}"
            return f"{what}: there is no such choice" + (f"; there are {', '.join(error.options or ())}" * bool(group))
        case OverrideParseException():
            return f"{error.override}: options are key=value, such as prompt='a dog barks'"
        case ConfigCompositionException():
            return _of_composition(error, config_name)
        case MissingMandatoryValue():
            return f"{error.full_key or 'a value'}= is required; --help says what it is"
        case OmegaConfBaseException():
            text = str(error).partition("\n")[0]
            return f"{error.full_key}: {text}" if error.full_key else text
        case ValueError() if config_name and str(error).startswith("Config group override must be"):
            return _of_group(config_name, sys.argv[1:]) or str(error)
        case OSError() if error.strerror:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = _without_traceback(str(error).strip(), type(error)) or type(error).__name__
    if not is_fault(error):
        return text
    if nulls := _typed_nulls():
        return f"{', '.join(nulls)}: give a value, or leave it out; it ends in {type(error).__name__}: {text}"
    return f"{type(error).__name__}: {text}\nThis is a fault of foley, not of the command"


def _without_traceback(text: str, kind: type[BaseException]) -> str:
    """The message of an error that PyTorch has brought from a loader process or another thread, with their traceback.

    >>> text = "Caught ValueError in DataLoader worker process 0.\\nOriginal Traceback (most recent call last):\\n  ..."
    >>> _without_traceback(text + "\\nValueError: a.wav: is empty\\n  and 2 more", ValueError)
    'a.wav: is empty\\n  and 2 more'
    """
    if not (text.startswith("Caught ") and "\nOriginal Traceback" in text):
        return text
    return re.split(rf"^(?:[\w.]+\.)?{kind.__name__}: ", text, flags=re.MULTILINE)[-1].strip()


def is_fault(error: BaseException) -> bool:
    """Whether it is none of the errors by which the code refuses what it was given.

    >>> is_fault(ValueError("steps=0: give 1 or more")), is_fault(AttributeError("'NoneType' has no attribute 'shape'"))
    (False, True)
    """
    return not (isinstance(error, _OF_THE_USER) or type(error).__module__.startswith(_IN_WORDS))


def _typed_nulls() -> list[str]:
    """The options that were given null: what works without a value says so, and anything else may fail anywhere."""
    if not HydraConfig.initialized():
        return []
    return [override for override in HydraConfig.get().overrides.task if override.endswith("=null")]


def write_traceback(error: BaseException) -> Path | None:
    """Append the traceback to the log of the run, on disk only; returns the file, None before Hydra has opened one."""
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, "failed", None, None)
    record.exc_info = (type(error), error, error.__traceback__)
    for handler in files:
        handler.handle(record)
    return Path(files[0].baseFilename) if files else None


def _of_group(config_name: str, arguments: Sequence[str]) -> str | None:
    """Of the first group that was given a number, or true or false, which choose none of its files."""
    groups = {group.name: group for group in read_page(config_name).groups}
    for name, _, value in (argument.lstrip("+").partition("=") for argument in arguments):
        if name in groups and isinstance(yaml.safe_load(value), bool | int | float):
            return f"{name}={value}: there is no such choice; there are {', '.join(groups[name].choices)}"
    return None


def _of_composition(error: ConfigCompositionException, config_name: str | None) -> str:
    """Hydra's words for an option that there is not are about its own syntax; these are about the command."""
    if several := re.match(r"Ambiguous value for argument '(.*)'\n", str(error)):
        name, _, values = several[1].partition("=")
        return f"{several[1]}: add -m to sweep over these values, or give a list: {name}=[{values}]"
    if merged := re.match(r"Error merging override (.*)", str(error)):
        why = str(error.__cause__).partition("\n")[0]  # such as: a mapping in the place of a list
        return f"{merged[1]}: this option takes a value of another kind ({why}); --help says which"
    missing = re.match(r"Could not override '([^']*)'", str(error))
    if missing is None:
        return " ".join(str(error).split())
    name = missing[1]
    page = read_page(config_name) if config_name else None
    near = difflib.get_close_matches(name, [o.name for o in [*page.options, *page.groups]] if page else (), n=1)
    hint = f"did you mean {near[0]}=?" if near else "--help lists the options"
    return f"{name}=: there is no such option; {hint}"


def _of_instantiation(error: InstantiationException, config_name: str | None) -> str:
    """The cause, behind the key of the config whose object could not be made."""
    found, cause = re.search(r"^full_key: (.+)$", str(error), re.MULTILINE), error.__cause__
    if cause is None:
        words = str(error).partition("\n")[0]
    elif isinstance(cause, TypeError) and cause.__traceback__ and cause.__traceback__.tb_next is None:
        words = str(cause)  # the call itself: an argument that the config gives and the object does not take
    else:
        words = describe(cause, config_name)
    return words if found is None or words.startswith(found[1]) else f"{found[1]}: {words}"


def _who() -> str:
    rank = process_rank()
    return f"foley (rank {rank})" if rank else "foley"


def _debugs() -> bool:
    """The variable FOLEY_DEBUG, `hydra.verbose=true`, or a config of `debug=`."""
    if os.environ.get(DEBUG_VARIABLE, "0") != "0":
        return True
    if not HydraConfig.initialized():
        return False
    settings = HydraConfig.get()
    return settings.verbose is not False or settings.runtime.choices.get("debug") is not None
