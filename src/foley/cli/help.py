"""Help pages, read from the configs themselves: a primary config's comments are its manual.

The convention: the comment block at the top of the file is the description and its example commands. The comment at
the end of a key's line (or the lines directly above it) says what the option does. In `defaults`, an entry with such a
comment is a group that the user may choose from; the choices are the files of the group's folder. Options that several
commands have lie in configs/options, and are on the page of each that takes them in.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import yaml

from foley.core.config import CONFIG_DIR

_WIDTH = 120
_WIDEST_NAME = 30
_REQUIRED = "required"  # in the place of a default
_HYDRAS_OWN = ("defaults", "hydra")  # keys that are no options of ours


@dataclass(frozen=True)
class Option:
    """One line of a page: a key or a group, what it does, and what it is where nothing is given.

    Args:
        choices: of a group, the names of its files.
    """

    name: str
    words: str
    default: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return self.default == _REQUIRED


@dataclass(frozen=True)
class Page:
    """What a primary config says about itself."""

    description: list[str]
    groups: list[Option]
    options: list[Option]


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether Hydra would show the application's help."""
    return any(argument in ("--help", "-h") for argument in arguments)


def chosen_config(arguments: Sequence[str], default: str) -> str:
    """The primary config; `--config-name NAME` or `--config-name=NAME` names another one of the same folder."""
    words = [part for argument in arguments for part in argument.split("=", 1)]
    names = [name for flag, name in pairwise(words) if flag in ("--config-name", "-cn")]
    return str(PurePosixPath(default).with_name(names[-1])) if names else default


def read_page(config_name: str) -> Page:
    """Description, groups and options of `configs/{config_name}.yaml`, in the order of the file.

    >>> [option.name for option in read_page("script/export_system").options][:2]
    ['ckpt', 'codec_path']
    """
    source = _Source((CONFIG_DIR / f"{config_name}.yaml").read_text(encoding="utf-8"))
    entries = {key.value: (key, value) for key, value in _pairs(source.root)}
    folder = (CONFIG_DIR / config_name).parent
    groups = list(_groups(source, entries["defaults"][1], folder)) if "defaults" in entries else []
    ours = [pair for name, pair in entries.items() if name not in _HYDRAS_OWN]
    options = [option for key, value in ours for option in _options(source, key.value, key, value)]
    if "defaults" in entries:
        options += _shared(entries["defaults"][1])
    explained = {group.name for group in groups}
    return Page(source.description, groups, [o for o in options if o.words or o.name not in explained])


def help_page(config_name: str, script: str, programs: Mapping[str, str] = MappingProxyType({})) -> str:
    """The page as text.

    Args:
        script: as seen from the root of the checkout, such as `scripts/prepare.py`.
        programs: script to what the user calls it; the configs' own examples say `python SCRIPT`.
    """
    page, program = read_page(config_name), programs.get(script, f"python {script}")
    width = min(_WIDEST_NAME, max((len(option.name) for option in [*page.groups, *page.options]), default=0))
    sections = ["\n".join(page.description)]
    for called, name in programs.items():
        sections[0] = sections[0].replace(f"python {called}", name)
    for title, options in (("Groups (group=choice):", page.groups), ("Options (key=value):", page.options)):
        if options:
            sections.append("\n".join([title, *(_lines(option, width) for option in options)]))
    sections.append(
        f"{program} --cfg job [key=value ...] shows the composed config; --hydra-help, the flags of Hydra.\n"
        "FOLEY_DEBUG=1 before it shows the traceback of an error, which otherwise only the log has."
    )
    return "\n\n".join(sections) + "\n"


def undocumented(config_name: str) -> list[str]:
    """Keys of a config that no words explain: neither their own, nor those of every key inside them."""
    return [option.name for option in read_page(config_name).options if not option.words]


class _Source:
    """A YAML text with its nodes, and the comments beside and above them."""

    def __init__(self, text: str):
        self.text, self.lines, self.root = text, text.splitlines(), yaml.compose(text)
        self.head = next((i for i, line in enumerate(self.lines) if not line.startswith("#")), len(self.lines))

    @property
    def description(self) -> list[str]:
        """The leading comment block, without Hydra's directive."""
        lines = [line.removeprefix("#").removeprefix(" ") for line in self.lines[: self.head]]
        return [line for line in lines if not line.startswith("@package")]

    def words(self, key: yaml.Node, value: yaml.Node) -> str:
        """The comment lines directly above a key, and the comment that ends its line."""
        above: list[str] = []
        for line in reversed(self.lines[self.head : key.start_mark.line]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().removeprefix("#").strip())
        # A value of several lines has its comment beside its key; inside it, they are of other things.
        end = value.end_mark if value.end_mark.line == key.end_mark.line else key.end_mark
        beside = self.lines[end.line][end.column :].partition(" #")[2].strip()
        return " ".join(filter(None, [*above, beside]))

    def default(self, value: yaml.Node) -> str | None:
        """A value as the file writes it; None for null and for what is taken from elsewhere."""
        written = " ".join(self.text[value.start_mark.index : value.end_mark.index].split())
        if written == "???":
            return _REQUIRED
        return None if written in ("", "null") or "${" in written else written


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    """Key and value nodes of a mapping that is written out line by line; none of another node."""
    return node.value if isinstance(node, yaml.MappingNode) and not node.flow_style else []


def _options(source: _Source, name: str, key: yaml.Node, value: yaml.Node) -> Iterator[Option]:
    """A key; and where keys inside it are explained, those too, by their dotted names."""
    words = source.words(key, value)
    inside = [o for k, v in _pairs(value) for o in _options(source, f"{name}.{k.value}", k, v)]
    explained = [option for option in inside if option.words]
    if words or not explained:
        yield Option(name, words, None if _pairs(value) else source.default(value))
    # Without words of its own, a key needs them for everything inside it.
    yield from explained if words else inside if explained else ()


def _groups(source: _Source, defaults: yaml.Node, folder: Path) -> Iterator[Option]:
    """The entries of a defaults list that carry words; a group without a slash may lie beside the config."""
    for key, value in (pair for entry in defaults.value for pair in _pairs(entry)):
        if words := source.words(key, value):
            named = key.value.removeprefix("optional ").removeprefix("override ")
            name = named.lstrip("/")
            beside = CONFIG_DIR if named != name else folder
            yield Option(name, words, source.default(value), choices_of(name.partition("@")[0], beside))


def _shared(defaults: yaml.Node) -> Iterator[Option]:
    """The options that a config takes in from configs/options, under the names that they have there."""
    for key, value in (pair for entry in defaults.value for pair in _pairs(entry)):
        group, _, package = key.value.partition("@")
        if group == "/options":
            prefix = "" if package == "_global_" else f"{package}."
            for file in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                for option in read_page(f"options/{file.value}").options:
                    yield replace(option, name=prefix + option.name)


def choices_of(group: str, beside: Path = CONFIG_DIR) -> tuple[str, ...]:
    """The names that a config group offers, those of folders inside it included: of `beside` where it has the group.

    >>> choices_of("debug")
    ('fdr', 'overfit', 'profiler')
    """
    folder = beside / group if (beside / group).is_dir() else CONFIG_DIR / group
    return tuple(sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")))


def _lines(option: Option, width: int) -> str:
    """An option's name, and beside it its words, default and choices, folded to the width of the page."""
    default = option.default or ""
    if default and not default.startswith("["):
        default = f"[{default}]"
    indent = " " * (width + 4)
    name = f"  {option.name.ljust(width)}  " if len(option.name) <= width else f"  {option.name}\n{indent}"
    paragraphs = (f"{option.words} {default}".strip(), ", ".join(option.choices))
    texts = [
        textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        for text in paragraphs
        if text
    ]
    return name + "\n".join(texts).removeprefix(indent)
