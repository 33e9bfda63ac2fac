"""A result for every row of a manifest (a caption, a score), shared out over shards and ranks.

Each rank appends what it finds to a journal of its own, JSON lines that outlive a killed run; the next run continues at
the clip where it ended.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from foley.core.files import write_json
from foley.core.locks import only_writer
from foley.core.reading import DamagedFileError, parse_json, read_json, reading
from foley.core.sharding import ALL, Shard
from foley.data.manifest import OUR_COLUMNS, ManifestOptions, checked_rows


class JournalError(ValueError):
    """A journal with a line in its middle that cannot be read; the message names the file and the line."""


class Journal:
    """Appends results to `directory/<name>-rank<rank>.jsonl`; what `append` was given is on the disk when it returns.

    A process killed while it writes leaves a torn last line. Readers pass over it, and the next journal of that
    rank cuts it off.
    """

    def __init__(self, directory: Path, name: str, rank: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{name}-rank{rank:04d}.jsonl"
        self._stream = self.path.open("ab+")
        self._cut_torn_line()

    def append(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Write one line for each result, and flush to the disk."""
        lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        self._stream.write(lines.encode("utf-8", errors="replace"))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _cut_torn_line(self) -> None:
        end = self._stream.seek(0, os.SEEK_END)
        while end and not _ends_line(self._stream, end):
            end -= 1
        self._stream.truncate(end)


def _ends_line(stream: Any, end: int) -> bool:
    stream.seek(end - 1)
    return bool(stream.read(1) == b"\n")


def read_journals(directory: Path, name: str, fields: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The results of all ranks, those of an earlier run on other ranks too; raises JournalError.

    `fields`: that each result must have.
    """
    for path in sorted(directory.glob(f"{name}-rank*.jsonl")):
        with path.open("rb") as stream:
            for line, raw in enumerate(stream, start=1):
                if not raw.endswith(b"\n"):
                    break
                yield _journal_row(raw, f"{path}, line {line}", fields)


def _journal_row(raw: bytes, place: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        with reading(place, "JSON"):
            text = raw.decode()
        row = parse_json(text, place)
    except DamagedFileError as error:
        raise JournalError(f"{place}: not JSON ({error.reason}); remove the line") from error
    if not isinstance(row, dict) or (missing := [field for field in fields if field not in row]):
        lacks = f"lacks {missing}" if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}"
        raise JournalError(f"{place}: {lacks}; remove the line")
    return row


RESULTS, FAULTS, SETTINGS_FILE = "results", "faults", "settings.json"

ManifestRow = dict[str, Any]
NumberedRow = tuple[int, ManifestRow | str]
"""The line of a row, with its fields or what is wrong with them."""


class AnnotationError(RuntimeError):
    """A run that should not go on, or not into this folder."""


@dataclass(frozen=True)
class Fault:
    """Why there is no result for a row; the next run tries again.

    `of_service`: it need not be the row's fault; many of these in a row end the run. `ends_run`: one does.
    """

    reason: str
    of_service: bool = False
    ends_run: bool = False


class Annotator(Protocol):
    """Makes results of rows.

    `identity` is what results depend on besides the row, such as a model and a prompt: results of two of them never
    mix in one folder. `key_fields` are the fields of a row that name its result; results carry them.
    """

    identity: Mapping[str, str]
    key_fields: Sequence[str]

    def start(self, world_size: int, device: torch.device) -> None:
        """Called on every rank before its first row, with the device that is this rank's."""
        ...

    def annotate(self, rows: Sequence[ManifestRow]) -> Sequence[dict[str, Any] | Fault]:
        """One result, without the key fields, or fault for each of B rows."""
        ...


def annotate(
    annotator: Annotator,
    manifest: Path,
    output_dir: Path,
    trainer: pl.Trainer,
    batch_size: int,
    options: ManifestOptions = OUR_COLUMNS,
    shard: Shard = ALL,
) -> None:
    """Let `annotator` go over every row of a shard of `manifest` that has no result in `output_dir` yet.

    Results are appended to `results-rank*.jsonl`; rows without one are in `faults-rank*.jsonl`, with line and reason.

    Raises:
        ManifestError: the manifest is absent, or has a byte-order mark.
        AnnotationError: `output_dir` holds results of another identity, or a service is of no use.
        FolderInUseError: another process writes the results of this share.
    """
    module = AnnotationModule(annotator, manifest, output_dir, batch_size, options=options, shard=shard)
    share = shard.split(trainer.global_rank, trainer.world_size)
    with only_writer(share.writer_folder(output_dir), "results"):
        trainer.predict(module, return_predictions=False)


def read_results(output_dir: Path, fields: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Every result so far; raises JournalError where a file was damaged, or a result lacks one of `fields`."""
    return read_journals(output_dir, RESULTS, fields)


def pending_rows(
    manifest: Path,
    output_dir: Path,
    key_fields: Sequence[str],
    shard: Shard = ALL,
    options: ManifestOptions = OUR_COLUMNS,
) -> Iterator[NumberedRow]:
    """The rows without a result among those of a shard of the whole manifest.

    Shards do not depend on what is finished, so those that start at different times share out the same rows.
    """
    finished = {_key(result, key_fields) for result in read_results(output_dir, key_fields)}
    for line, row in islice(checked_rows(manifest, options), shard.number, None, shard.count):
        if isinstance(row, str):
            yield line, row
        elif _key(row, key_fields) not in finished:
            yield line, dict(row)


class AnnotationModule(pl.LightningModule):
    """Runs an annotator in `Trainer.predict`; see `annotate`.

    Args:
        max_faults_in_a_row: more of a service end the run: then it is not the rows that are at fault.
    """

    def __init__(
        self,
        annotator: Annotator,
        manifest: Path,
        output_dir: Path,
        batch_size: int,
        max_faults_in_a_row: int = 20,
        options: ManifestOptions = OUR_COLUMNS,
        shard: Shard = ALL,
    ) -> None:
        super().__init__()
        self.annotator = annotator
        self.manifest, self.output_dir = manifest, output_dir
        self.batch_size = batch_size
        self.max_faults_in_a_row = max_faults_in_a_row
        self.options, self._shard = options, shard
        self._faults_in_a_row = 0
        self._results: Journal | None = None
        self._faults: Journal | None = None

    def predict_dataloader(self) -> DataLoader[NumberedRow]:
        """The rows of this rank."""
        rows = _Rows(self.manifest, self.output_dir, self.annotator.key_fields, self.share, self.options)
        return DataLoader(rows, self.batch_size, collate_fn=list)

    @property
    def share(self) -> Shard:
        """What this rank does."""
        return self._shard.split(self.trainer.global_rank, self.trainer.world_size)

    def on_predict_start(self) -> None:
        """Refuse a folder of another identity; open this rank's files."""
        self._check_identity()
        number, count = self.share.number, self.share.count
        for path in self.output_dir.glob(f"{FAULTS}-rank*.jsonl"):
            if int(path.stem.rpartition("rank")[2]) % count == number:
                path.unlink()
        self._results, self._faults = (Journal(self.output_dir, name, number) for name in (RESULTS, FAULTS))
        self.annotator.start(count, self.device)

    def predict_step(self, batch: list[NumberedRow], batch_idx: int) -> int:
        """Annotate the rows of one batch, and write before anything else happens; returns the number of results."""
        assert self._results is not None
        assert self._faults is not None
        good = [(line, row) for line, row in batch if not isinstance(row, str)]
        answers = self.annotator.annotate([row for _, row in good]) if good else []
        faults = [{"line": line, "reason": row} for line, row in batch if isinstance(row, str)]
        results = []
        for (line, row), answer in zip(good, answers, strict=True):
            if isinstance(answer, Fault):
                faults.append({"line": line, "id": row["id"], "reason": answer.reason})
            else:
                results.append({field: row[field] for field in self.annotator.key_fields} | answer)
        self._results.append(results)
        self._faults.append(faults)
        self._check_service(answers)
        return len(results)

    def on_predict_end(self) -> None:
        """Close the files; all ranks leave together, so that what follows finds everything."""
        for journal in (self._results, self._faults):
            if journal is not None:
                journal.close()
        self.trainer.strategy.barrier("annotations")

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Rows are text and stay where they are."""
        return batch

    def _check_identity(self) -> None:
        path = self.output_dir / SETTINGS_FILE
        wanted = dict(self.annotator.identity)
        if not path.is_file():
            if self.trainer.is_global_zero:
                write_json(path, wanted)
            return
        found = read_json(path, "the settings of a run", "choose another folder")
        if found != wanted:
            raise AnnotationError(f"{self.output_dir} holds results of {found}, not of {wanted}: choose another folder")

    def _check_service(self, answers: Sequence[dict[str, Any] | Fault]) -> None:
        for answer in answers:
            failed = isinstance(answer, Fault) and answer.of_service
            self._faults_in_a_row = self._faults_in_a_row + 1 if failed else 0
            if isinstance(answer, Fault) and answer.ends_run:
                raise AnnotationError(answer.reason)
            if self._faults_in_a_row > self.max_faults_in_a_row:
                raise AnnotationError(f"{self._faults_in_a_row} rows in a row have no result; the last: {answer}")


class _Rows(IterableDataset[NumberedRow]):
    """`pending_rows`, read as they are needed."""

    def __init__(
        self,
        manifest: Path,
        output_dir: Path,
        key_fields: Sequence[str],
        shard: Shard,
        options: ManifestOptions,
    ) -> None:
        self._arguments = (manifest, output_dir, key_fields, shard, options)

    def __iter__(self) -> Iterator[NumberedRow]:
        return pending_rows(*self._arguments)


def _key(fields: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(fields.get(name) for name in names)
