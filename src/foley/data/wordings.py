"""What clips of a label may be called: further captions that training draws from, and paraphrases that it never sees.

A table of them is YAML, by label; `data/prompts/wordings.yaml`, which ships, explains itself.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from foley.data.entries import Entries

_PARTS = ("known", "captions", "held_out")


class WordingsError(ValueError):
    """A table of wordings that must be mended; the message names the file, the label and the value."""


def normal_form(text: str) -> str:
    """`text` without what two captions may differ in and still be one: case, articles, marks at the ends, spaces.

    >>> normal_form("The  rain falls.") == normal_form("a rain falls")
    True
    """
    return " ".join(word for word in text.lower().strip(" .!?").split() if word not in ("a", "an", "the"))


@dataclass(frozen=True)
class LabelWordings:
    """Of one label: `known` are true of all its clips, `captions` of those with a caption alone, `held_out` not known.

    Example:
        >>> steps = LabelWordings(captions={"a step on ice": ["someone steps on ice"]}, held_out=["ice underfoot"])
        >>> steps.beside("a step on ice"), steps.all_known
        (('someone steps on ice',), ('a step on ice', 'someone steps on ice'))
    """

    known: Collection[str] = ()
    captions: Mapping[str, Collection[str]] = field(default_factory=dict)
    held_out: Collection[str] = ()

    @property
    def all_known(self) -> tuple[str, ...]:
        """Every wording that training may draw for some clip of the label, the clips' own captions among them."""
        of_some = [text for caption, others in self.captions.items() for text in (caption, *others)]
        return tuple(dict.fromkeys([*self.known, *of_some]))

    def beside(self, caption: str) -> tuple[str, ...]:
        """The further wordings of a clip with this caption: the caption's own where it has some, else the label's."""
        found = self.captions.get(caption, self.known)
        return tuple(text for text in found if text != caption)


@dataclass(frozen=True)
class Wordings:
    """A table of wordings by label."""

    labels: Mapping[str, LabelWordings]

    @classmethod
    def read(cls, path: Path | str) -> "Wordings":
        """The table in a YAML file.

        Raises:
            WordingsError: no such file, no table, an unknown part, something that is no text, or a held-out wording
                that is a known one of any label, but for case, articles and spaces.

        >>> from foley.core.config import PROJECT_ROOT
        >>> Wordings.read(PROJECT_ROOT / "data/prompts/wordings.yaml").labels["five"].held_out[0]
        'you hear somebody say five'
        """
        path = Path(path)
        if not path.is_file():
            raise WordingsError(f"wordings={path}: there is no such file")
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise WordingsError(f"{path} is no table of labels: give `LABEL: {{known: [...], held_out: [...]}}`")
        labels = {str(label): _of_label(path, str(label), parts) for label, parts in table.items()}
        _refuse_trained(path, labels)
        return cls(labels)

    def add_to(self, entries: Entries) -> Entries:
        """`entries`, of which each has the known wordings of its label behind the captions that it had."""
        none = LabelWordings()

        def captions_of_each() -> Iterable[tuple[str, ...]]:
            for entry in entries:
                more = self.labels.get(entry.label, none).beside(entry.caption)
                yield (*entry.other_captions, *(text for text in more if text not in entry.other_captions))

        return entries.with_other_captions(captions_of_each())


def _of_label(path: Path, label: str, parts: Any) -> LabelWordings:
    if not isinstance(parts, dict) or set(parts) - set(_PARTS) or not isinstance(parts.get("captions", {}), dict):
        raise WordingsError(f"{path}: {label!r} has {parts!r}; give it some of {', '.join(_PARTS)}")

    def texts(name: str, given: Any) -> list[str]:
        wrong = [text for text in given if not isinstance(text, str)] if isinstance(given, list) else [given]
        if wrong:
            raise WordingsError(
                f"{path}: {name} of {label!r} has {wrong!r}; give a list of texts, in quotes if need be"
            )
        return [text.replace("{label}", label) for text in given]

    captions = {caption: texts(caption, others) for caption, others in parts.get("captions", {}).items()}
    return LabelWordings(texts("known", parts.get("known", [])), captions, texts("held_out", parts.get("held_out", [])))


def _refuse_trained(path: Path, labels: Mapping[str, LabelWordings]) -> None:
    known = {normal_form(text): (text, label) for label, own in labels.items() for text in own.all_known}
    for label, own in labels.items():
        for text in own.held_out:
            if (twin := known.get(normal_form(text))) is not None:
                raise WordingsError(f"{path}: {text!r}, held out of {label!r}, is {twin[0]!r}, known of {twin[1]!r}")
