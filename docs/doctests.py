"""Examples of docstrings become code blocks of the API reference; `mkdocs.yml` names this file."""

import re

from griffe import Extension, GriffeLoader, Object

_EXAMPLE = re.compile(r"^([ \t]*)>>> .*(?:\n\1\S.*)*", re.MULTILINE)
"""A prompt, and the lines that follow it at its indent or beyond, up to an empty one."""


def fence_examples(text: str) -> str:
    """A docstring with its examples fenced."""
    return _EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


class FencedExamples(Extension):
    """Without fences, Markdown reads `>>>` as a quotation, and a printed list as a link."""

    def on_object(self, *, obj: Object, loader: GriffeLoader, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fence_examples(obj.docstring.value)
