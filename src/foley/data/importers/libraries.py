"""Data sets from sound and music libraries, with a licence for each clip: Clotho, WavCaps, Song Describer."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from foley.core.reading import DamagedFileError, read_json
from foley.core.remote import local_file
from foley.data.importers.annotations import AnnotationFile, absent, read_rows, single_spaced, split_files
from foley.data.tables import Row, TableError, csv_rows

_CAPTIONS_PER_CLIP = 5
_CLOTHO_NAMES = ("{folder}/{stem}", "{stem}")


def clotho(
    annotations: Mapping[str, str], metadata: Mapping[str, str], folders: Mapping[str, str], license: str
) -> Iterator[AnnotationFile]:
    """Clotho (Drossos et al. 2020), five rows for a clip: file_name,caption_1,...,caption_5.

    Args:
        metadata: by split, file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license, whose
            licence and author each row carries.
        folders: by split, where its files are looked for first; splits have names in common, so ids have the folder.
        license: of the captions, and of sounds without metadata.
    """
    for split, path in split_files(annotations):
        if not path.is_file():
            yield absent(path)
            continue
        facts = _clotho_metadata(Path(metadata[split]))
        yield AnnotationFile(path, _clotho_rows(path, split, folders[split], facts, license))


def _clotho_rows(
    path: Path, split: str, folder: str, facts: Mapping[str, Mapping[str, str]], license: str
) -> Iterator[Row]:
    columns = [f"caption_{number}" for number in range(1, _CAPTIONS_PER_CLIP + 1)]
    for line, cells in csv_rows(path, ("file_name", *columns)):
        if isinstance(cells, str):
            yield line, cells
            continue
        name = cells["file_name"]
        known = facts.get(name.strip(), {})
        source = f"Clotho: {known['manufacturer']}, {known['sound_link']}" if known else "Clotho"
        about = {"split": split, "source": single_spaced(source), "license": known.get("license") or license}
        names = [pattern.format(folder=folder, stem=PurePosixPath(name).stem) for pattern in _CLOTHO_NAMES]
        for number, column in enumerate(columns, start=1):
            row = {"id": f"{folder}/{name.strip()}#{number}", "caption": single_spaced(cells[column])}
            yield line, {**row, "names": names, **about}


def _clotho_metadata(path: Path) -> dict[str, dict[str, str]]:
    """By file name; a row that cannot be read leaves its clip without metadata, never without captions."""
    path = local_file(path)
    if not path.is_file():
        return {}
    columns = ("file_name", "sound_link", "manufacturer", "license")
    rows = (cells for _, cells in csv_rows(path, columns, encoding=_encoding(path)) if not isinstance(cells, str))
    return {cells["file_name"].strip(): cells for cells in rows}


def _encoding(path: Path) -> str | None:
    """Of a table whose authors' names are Windows-1252 in some releases; None is the usual one."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return None


def wavcaps(annotations: Mapping[str, str], licenses: Mapping[str, str]) -> Iterator[AnnotationFile]:
    """WavCaps (Mei et al. 2023): JSON files of `{"num_captions_per_audio": 1, "data": [{id, caption, ...}, ...]}`.

    Args:
        annotations: by collection (AudioSet_SL, BBC_Sound_Effects, FreeSound, SoundBible).
        licenses: by collection.

    The line of a row is its place in `data`, from 1 on.
    """
    for collection, text in annotations.items():
        path = Path(text)
        rows = _wavcaps_rows(path, collection, licenses[collection])
        yield AnnotationFile(path, rows) if path.is_file() else absent(path)


def _wavcaps_rows(path: Path, collection: str, license: str) -> Iterator[Row]:
    try:
        content = read_json(path, "JSON")
    except DamagedFileError as error:
        raise TableError(f"{path}: not valid UTF-8 JSON ({error.reason})") from error
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise TableError(f"{path}: expected an object with a list `data`, as WavCaps publishes it")
    for place, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
            yield place, f"entry {place} has no `id`"
            continue
        yield place, _wavcaps_row(entry, collection, license)


def _wavcaps_row(entry: Mapping[str, Any], collection: str, license: str) -> dict[str, Any]:
    stem = str(entry["id"]).removesuffix(".wav")
    caption = entry.get("caption")
    origin = entry.get("href") or entry.get("download_link") or ""
    author = entry.get("author") or ""
    source = ", ".join(str(part) for part in (f"WavCaps ({collection})", author, origin) if part)
    return {
        "id": f"{collection}/{stem}",
        "caption": single_spaced(caption) if isinstance(caption, str) else caption,
        "names": [f"{collection}/{stem}", f"{collection}_flac/{stem}", stem],
        "source": single_spaced(source),
        "license": license,
        "split": "train",
    }


def song_describer(
    annotations: Mapping[str, str], audio_licenses: str, license: str, only_valid: bool
) -> Iterator[AnnotationFile]:
    """song_describer.csv: caption_id,track_id,caption,is_valid_subset,...,path,...; files end in `.2min.mp3`.

    Args:
        audio_licenses: audio_licenses.txt, where each track's licence and author are.
        license: of the captions, and of tracks that the file lacks.
        only_valid: leave out captions outside the validated subset; they go to the ledger.
    """
    tracks = read_licenses(Path(audio_licenses))

    def build(split: str, cells: Mapping[str, str]) -> dict[str, Any]:
        if only_valid and cells["is_valid_subset"].strip().lower() != "true":
            raise ValueError("is not in the validated subset (only_valid=true)")
        track = PurePosixPath(cells["path"])
        title, track_license = tracks.get(str(track), ("", license))
        return {
            "id": cells["caption_id"],
            "caption": single_spaced(cells["caption"]),
            "names": [f"{track.parent.name}/{track.stem}.2min", f"{track.stem}.2min", track.stem],
            "source": f"Song Describer: {title}" if title else "Song Describer",
            "license": track_license,
            "split": split,
        }

    for split, path in split_files(annotations):
        yield read_rows(path, ("caption_id", "caption", "is_valid_subset", "path"), partial(build, split))


def read_licenses(path: Path) -> dict[str, tuple[str, str]]:
    """Title with author, and licence, by track; blocks of three lines (path, title, licence) between empty ones."""
    path = local_file(path)
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
    blocks = (block.strip().split("\n") for block in text.split("\n\n"))
    return {lines[0].strip(): (single_spaced(lines[1]), single_spaced(lines[2])) for lines in blocks if len(lines) >= 3}
