"""`Clip`, and the clips that a prompt file or the command line asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from foley.core.numbers import SEED, NumberRange
from foley.core.remote import is_file
from foley.core.seeding import derive_seed
from foley.data.ordering import evenly_spaced
from foley.data.tables import captions_in, refuse_lines, split_name, table_rows
from foley.generation.options import MAX_CLIPS, check_prompt_length

COLUMN = "caption"
CAPTIONS = ("all", "first", "random")
_IDS = ("id", "audiocap_id")
_PATHS = ("path", "audio_path", "file")
_CLIPS = ("youtube_id", "file_name", "audio_path", "path")


@dataclass(frozen=True)
class PromptColumns:
    """Names of a prompt file's columns.

    Args:
        id: of the clip to generate, by which it is paired with its reference; None is `id`, AudioCaps' own, or the
            path of a manifest, which is its id.
        clip: what the captions of one recording share; None is a name that AudioCaps, Clotho or a manifest uses.
        split: which part of a data set a row belongs to.
    """

    caption: str = COLUMN
    id: str | None = None
    clip: str | None = None
    split: str = "split"


@dataclass(frozen=True)
class Clip:
    """One clip: the object that travels from the command line to the WAV and the JSON beside it.

    Args:
        prompt: the caption; the empty one asks for an unconditional sample. ValueError for an absurdly long one.
        seed: of all that is random in it, from 0 to 2^63 - 1; ValueError outside.
        notes: what its JSON is to say besides, such as the label and the id that a prompt file gives.

    >>> Clip("a dog barks", seed=3).notes
    {}
    """

    prompt: str
    seed: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prompt_length(self.prompt)
        SEED.check("seed", self.seed)


def as_clips(prompts: Sequence[str | Clip], seeds: Sequence[int] | None = None) -> list[Clip]:
    """Plain prompts with `seeds`, by default 0, 1, 2, ...; what is a `Clip` already has its own.

    Raises ValueError where there is no prompt, one is too long, or there are more or fewer seeds.

    >>> [clip.seed for clip in as_clips(["rain", Clip("wind", seed=7), "surf"])]
    [0, 7, 2]
    """
    if not prompts:
        raise ValueError("no prompts given; the empty string asks for an unconditional sample")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed per prompt")
    pairs = zip(prompts, seeds, strict=True)
    return [prompt if isinstance(prompt, Clip) else Clip(prompt, seed) for prompt, seed in pairs]


def read_prompts(path: Path) -> list[str]:
    """The captions of `read_prompt_rows`."""
    return [row[COLUMN] for row in read_prompt_rows(path)]


def read_prompt_rows(path: Path, columns: PromptColumns = PromptColumns()) -> list[dict[str, Any]]:
    """Rows with a `caption` out of a CSV, TSV or JSON Lines file, or else one caption on each non-empty line.

    A list of captions is a row for each. Raises ValueError as a manifest is refused: every wrong line is named, an id
    on two lines too; a byte-order mark is read.
    """
    if not is_file(path):
        raise ValueError(f"prompts={path}: there is no such file")
    prompts: list[dict[str, Any]] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    table = table_rows(path, (columns.caption,), columns.caption, read_mark=True, hint="set caption_column=")
    for line, row in table:
        try:
            prompts += _prompts_of(row, columns)
            _refuse_known(line, row, columns, first_line)
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        refuse_lines(path, problems)
    if not prompts:
        raise ValueError(f"prompts={path}: the file holds no prompt")
    return prompts


def _prompts_of(row: Mapping[str, Any] | str, columns: PromptColumns) -> list[dict[str, Any]]:
    """A row for each caption of `row`; ids are numbered from the second on."""
    if isinstance(row, str):
        raise ValueError(row)
    if columns.caption not in row:
        raise ValueError(f"no {columns.caption!r}, only {list(row)}; set caption_column=")
    rows = []
    for number, caption in enumerate(captions_in(row, [columns.caption]), start=1):
        check_prompt_length(caption)
        ids = {name: f"{row[name]}#{number}" for name in _id_columns(columns) if number > 1 and row.get(name)}
        rows.append({**row, COLUMN: caption, **ids})
    return rows


def _refuse_known(line: int, row: Any, columns: PromptColumns, first_line: dict[str, int]) -> None:
    """Raise ValueError where the row has the id of an earlier one: an id pairs one clip with its reference."""
    clip_id = next((str(row[name]) for name in _id_columns(columns) if row.get(name)), None)
    if clip_id is not None and first_line.setdefault(clip_id, line) != line:
        raise ValueError(f"duplicate id {clip_id!r}, first used on line {first_line[clip_id]}")


def _id_columns(columns: PromptColumns) -> Sequence[str]:
    return (columns.id,) if columns.id else _IDS


def select_split(rows: Sequence[dict[str, Any]], split: str | None, column: str) -> list[dict[str, Any]]:
    """The rows of a split, by any of its names; None takes all; raises ValueError where there are none.

    >>> select_split([{"caption": "rain", "of": "train"}, {"caption": "wind", "of": "evaluation"}], "test", "of")
    [{'caption': 'wind', 'of': 'evaluation'}]
    """
    if split is None:
        return list(rows)
    if absent := [row for row in rows if column not in row]:
        raise ValueError(
            f"split={split}: no column {column!r} tells of which split a prompt is; the file has {list(absent[0])}: "
            "set split_column=, or split=null for all of it"
        )
    wanted = split_name(split)
    found = [row for row in rows if split_name(str(row[column] or "")) == wanted]
    if not found:
        raise ValueError(f"split={split}: the file has none of it, only {sorted({str(row[column]) for row in rows})}")
    return found


def select_captions(
    rows: Sequence[dict[str, Any]], captions: str, clip_column: str | None, seed: int
) -> list[dict[str, Any]]:
    """All rows, or of each recording's the "first" or a "random" one, in the order of the file.

    A random choice depends on the seed and the recording alone. Raises ValueError for another word, and where no
    column tells the recordings apart.
    """
    if captions not in CAPTIONS:
        raise ValueError(f"captions={captions} must be one of {', '.join(CAPTIONS)}")
    if captions == "all":
        return list(rows)
    column = clip_column or next((name for name in _CLIPS if name in rows[0]), None)
    if column is None or any(column not in row for row in rows):
        raise ValueError(
            f"captions={captions}: no column {column or ' or '.join(_CLIPS)} tells which captions belong to one "
            f"recording; the file has {list(rows[0])}: set clip_column="
        )
    clips: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        clips.setdefault(str(row[column]), []).append(row)
    if captions == "first":
        return [same[0] for same in clips.values()]
    return [same[derive_seed("caption", seed, clip) % len(same)] for clip, same in clips.items()]


def request_clips(
    prompt: str | None,
    file: str | None,
    first_seed: int,
    num: int,
    columns: PromptColumns = PromptColumns(),
    captions: str = "all",
    caption_seed: int = 0,
    split: str | None = None,
) -> list[Clip]:
    """Every clip asked for: `num` clips of each prompt, with seeds that count up from `first_seed`.

    Args:
        captions, caption_seed: which captions of each recording in `file`, as `select_captions` takes them.
        split: of a manifest, as `select_split` takes it.

    Raises ValueError unless exactly one of `prompt` and `file` is given and `num` is at least 1.
    """
    if prompt is not None and file is not None:
        raise ValueError(f"prompt={prompt[:40]!r} and prompts={file} are both given: give one of them")
    if prompt is None and file is None:
        raise ValueError('give either prompt="a dog barks" or prompts=FILE')
    NumberRange(least=1, most=MAX_CLIPS, whole=True).check("num", num)
    rows = read_prompt_rows(Path(file), columns) if file is not None else [{COLUMN: str(prompt)}]
    if file is not None:
        rows = select_split(rows, split, columns.split)
    chosen = select_captions(rows, captions, columns.clip, caption_seed)
    if len(chosen) * num > MAX_CLIPS:
        raise ValueError(f"num={num} of {len(chosen)} prompts are {len(chosen) * num} clips; at most {MAX_CLIPS}")
    repeated = [row for row in chosen for _ in range(num)]
    # An id names one clip: it pairs a generated clip with its reference.
    ids = _pairing_columns(chosen, columns) if num == 1 else ()
    return [Clip(row[COLUMN], seed, _notes(row, ids)) for seed, row in enumerate(repeated, start=first_seed)]


def _pairing_columns(rows: Sequence[Mapping[str, Any]], columns: PromptColumns) -> Sequence[str]:
    """The columns of the id, the first first: by default a manifest's path too, where no two rows share it."""
    path = next((name for name in _PATHS if all(row.get(name) for row in rows)), None)
    if columns.id is not None or path is None or len({str(row[path]) for row in rows}) < len(rows):
        return _id_columns(columns)
    return (*_IDS, path)


class LabelledPrompts(NamedTuple):
    """Prompts, and what the clips made from them are expected to be; None where that is not known."""

    captions: list[str]
    labels: list[str | None]

    @classmethod
    def read(cls, path: Path, count: int | None = None) -> "LabelledPrompts":
        """At most `count` of the file, spread evenly; raises ValueError as `read_prompt_rows` does."""
        rows = read_prompt_rows(path)
        chosen = [rows[index] for index in evenly_spaced(len(rows), count or len(rows))]
        return cls([row[COLUMN] for row in chosen], [row.get("label") for row in chosen])


def _notes(row: Mapping[str, Any], ids: Sequence[str]) -> dict[str, str]:
    """The label and the first id that the row has."""
    named = {"label": row.get("label"), "id": next((row[name] for name in ids if row.get(name)), None)}
    return {name: value for name, value in named.items() if value}
