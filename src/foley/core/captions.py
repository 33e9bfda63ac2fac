"""A caption and, behind it, its structured form: which sounds there are, and when in the clip (Make-An-Audio 2).

    a man speaks, then people laugh <man speaking& start>@<laughter& end>

One text holds both, so that manifests, prompts, and stores of embeddings carry what the encoder of two captions wants
(`foley.models.text.ClapT5Conditioner`). Whoever wants the caption alone asks `plain_caption`. A time is `all`, `start`,
`mid` or `end` (Huang et al. 2023, arXiv:2305.18474, section 3.2).
"""

import re

TIMES = ("all", "start", "mid", "end")
_PAIR = rf"<[^<>&@]+&\s*(?:{'|'.join(TIMES)})\s*>"
_PAIRS = re.compile(rf"{_PAIR}(?:\s*@\s*{_PAIR})*", re.IGNORECASE)
_AT_END = re.compile(rf"{_PAIRS.pattern}\s*\Z", re.IGNORECASE)  # what stands before it may hold any mark
_PARTS = re.compile(r"<([^<>&@]+)&([^<>]+)>")


def read_structured(text: str) -> str | None:
    """A structured caption as it is published, whatever its spaces and capitals; None where `text` is none.

    >>> read_structured(" <Man speaking & start>@<laughter& END> ")
    '<Man speaking& start>@<laughter& end>'
    >>> read_structured("<laughter>") is None
    True
    """
    if not _PAIRS.fullmatch(text.strip()):
        return None
    return "@".join(f"<{sound.strip()}& {time.strip().lower()}>" for sound, time in _PARTS.findall(text))


def split_caption(text: str) -> tuple[str, str]:
    """Caption and structured caption of `text`; without one of its own, the whole clip is heard as the caption says.

    >>> split_caption("a man speaks, then people laugh <man speaking& start>@<laughter& end>")
    ('a man speaks, then people laugh', '<man speaking& start>@<laughter& end>')
    >>> split_caption("rain falls")  # as published for data without structured captions
    ('rain falls', '<rain falls& all>')
    >>> split_caption("<rain& all>@<thunder& end>"), split_caption("")
    (('rain, thunder', '<rain& all>@<thunder& end>'), ('', ''))
    """
    found = _AT_END.search(text)
    structured = read_structured(found[0]) if found else None
    if found is None or structured is None:
        return text, f"<{text}& all>" if text.strip() else ""
    caption = text[: found.start()]
    sounds = ", ".join(sound for sound, _ in _PARTS.findall(structured))
    return caption.strip() or sounds, structured


def plain_caption(text: str) -> str:
    """The caption alone, as a person would write it.

    >>> plain_caption("rain <rain& all>"), plain_caption("a <b> c")
    ('rain', 'a <b> c')
    """
    return split_caption(text)[0]


def with_structured(caption: str, structured: str) -> str:
    """Both as one text, in the place of whatever structured form `caption` had; the caption where that cannot be read.

    >>> with_structured("rain <drops& end>", "<rain& all>")
    'rain <rain& all>'
    >>> with_structured("rock & roll", "<rock & roll& all>")  # which `split_caption` says of the caption alone, too
    'rock & roll'
    """
    plain = plain_caption(caption)
    return plain if read_structured(structured) is None else f"{plain} {structured}"
