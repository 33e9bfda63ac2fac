"""File names for generated things: safe on every file system, unique, and still readable."""

import re
import unicodedata

_MAX_SLUG_CHARACTERS = 48


def slug(text: str) -> str:
    """Lower-case ASCII letters, digits and single hyphens out of `text`; "sound" where nothing is left."""
    ascii_text = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text)[:_MAX_SLUG_CHARACTERS].strip("-") or "sound"


def sample_stem(prompt: str, index: int, seed: int) -> str:
    """The name, without extension, of item `index` of a run; unique because the index is."""
    return f"{index:03d}_{slug(prompt)}_seed{seed}"


def one_line(text: str) -> str:
    """`text` with every run of white space and unprintable characters as one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
