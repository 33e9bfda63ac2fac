"""`ClipFolder`: the clips of a prompt file, shared out over processes, and continued where an earlier run stopped."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import soundfile
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import from_numpy

from foley.core.files import sample_stem, write_json, write_text
from foley.core.locks import only_writer
from foley.core.logs import first_few, get_logger
from foley.core.reading import read_json, reading
from foley.core.sharding import ALL, Shard
from foley.generation.prompts import Clip
from foley.generation.result import Generation
from foley.metrics.latency import RealTimeFactor
from foley.reporting.samples import PAGE_FILE, SHEET_FILE, Card, count_sounds, draw_card, page_file, render_page

RECORD_FILE = "test_set.json"
FOLDER_CLIPS = 1000
"""A larger set lies in subfolders `0000`, `0001`, ... of so many clips each, with a page for each of them."""
_PAGE = re.compile(r"index_\d{4,}\.html")
_SUBFOLDER = re.compile(r"\d{4,}")
_CLIP_FILE = re.compile(r"\d{3,}_[a-z0-9-]+_seed\d+\.(wav|json|png)")  # see `foley.core.files.sample_stem`
_PATIENCE = timedelta(days=7)  # shares take as long as they take: those who are through wait for the others
_log = get_logger(__name__)


def launch_processes(trainer: DictConfig | None) -> Fabric:
    """The processes of a trainer config, this one being one of them from here on; a single one on the CPU for None."""
    if trainer is None:
        return Fabric(accelerator="cpu", devices=1)
    chosen = {key: trainer[key] for key in ("accelerator", "devices", "num_nodes", "strategy") if key in trainer}
    if str(chosen.get("strategy")).startswith("ddp"):
        chosen["strategy"] = DDPStrategy(timeout=_PATIENCE)
    fabric = Fabric(**chosen)
    fabric.launch()
    return fabric


@dataclass(frozen=True)
class ClipFolder:
    """Clips asked for, each with its own seed, and the folder that receives a WAV and a JSON for each.

    More than `FOLDER_CLIPS` of a file of prompts lie in subfolders. What an earlier version put of such a set into the
    folder itself is taken where it is.

    Which process makes a clip, and beside which others, changes nothing about it. A clip whose JSON is there is never
    made or written again.

    Args:
        request: all that the clips depend on; an existing folder must have been begun with the same.

    Those of a file of prompts are made batch by batch (`fill`), those of one prompt at once (`write`); either inside
    `claimed`.
    """

    directory: Path
    clips: Sequence[Clip]
    request: Mapping[str, Any]

    @contextmanager
    def claimed(self, fabric: Fabric, overwrite: bool, shard: Shard = ALL) -> Iterator[None]:
        """Hold the folder as its only writer: no clips of another request are in it, or will be added to it.

        Args:
            overwrite: remove all clips that are there, and begin anew.
            shard: which others write beside, each held by its own writer.

        Raises ValueError where it holds clips of another request, FolderInUseError where another process writes to it.
        """
        held = shard.writer_folder(self.directory)
        with only_writer(held, "clips") if fabric.is_global_zero else nullcontext():
            if fabric.is_global_zero and overwrite:
                remove_clips(self.directory)
            elif fabric.is_global_zero:
                self._require_own_clips()
            yield

    @cached_property
    def request_hash(self) -> str:
        """By which a clip's JSON tells of which request it is."""
        return hashlib.sha256(json.dumps(dict(self.request), sort_keys=True).encode()).hexdigest()[:16]

    def _require_own_clips(self) -> None:
        """Of a file of prompts the record tells more, see `_begin`."""
        own = {self.stem(index) for index in range(len(self.clips))}
        strangers = sorted({file.stem for file in _clip_files(self.directory)} - own)
        if not (self.directory / RECORD_FILE).is_file():
            strangers += sorted(stem for stem in own if self._made_otherwise(stem))
        if strangers:
            raise ValueError(
                f"{self.directory} holds clips of another request ({first_few(strangers, 3)}, {len(strangers)} in "
                "all), which would be scored with these; give another output_dir, or overwrite=true to remove them"
            )

    def _made_otherwise(self, stem: str) -> bool:
        sidecar = self.directory / f"{stem}.json"
        if not sidecar.is_file():
            return False
        return bool(_record_of(sidecar)["settings"].get("request") != self.request_hash)

    def fill(
        self,
        generate: Callable[[Sequence[Clip]], Generation],
        fabric: Fabric,
        batch_size: int,
        shard: Shard = ALL,
    ) -> None:
        """Make this process's share of the clips of a shard that are missing; returns once all processes are done.

        Raises ValueError where the folder holds clips of another request.
        """
        # One process decides for all: a look at the folder while another writes would share the clips out differently.
        begun = self._begin() if fabric.is_global_zero else []
        todo = [index for index in fabric.broadcast(begun) if index % shard.count == shard.number]
        share = todo[fabric.global_rank :: fabric.world_size]
        start, of_all = time.perf_counter(), f"clips of process 1 of {fabric.world_size}"
        factors: list[RealTimeFactor] = []  # of each clip
        with _progress_bar(disable=not fabric.is_global_zero) as progress:
            task = progress.add_task("" if fabric.world_size == 1 else of_all, total=len(share), rate="")
            for first in range(0, len(share), batch_size):
                indices = share[first : first + batch_size]
                made = generate([self.clips[index] for index in indices])
                made.warn_of_levels()
                factors += [made.rtf] * len(indices)
                for row, index in enumerate(indices):
                    made.write_clip(self.directory / self._subfolder(index), row, index)
                rate = (first + len(indices)) / (time.perf_counter() - start)
                progress.update(task, advance=len(indices), rate=f"{rate:.3g} clips/s")
        fabric.barrier()
        seconds = time.perf_counter() - start
        asked = len(shard.of(self.clips))
        _log.info("%d clips made in %.1f s, %d were there already", len(todo), seconds, asked - len(todo))
        _log_factor(RealTimeFactor.mean(factors))

    def write_pages(self, fabric: Fabric) -> Path:
        """Show all clips, which are there; returns the first page, once all processes are done."""
        _, flat = self._there()
        for number in range(fabric.global_rank, len(self._pages), fabric.world_size):
            self._write_page(number, flat)
        fabric.barrier()
        return self.directory / PAGE_FILE

    def write(self, made: Generation) -> Path:
        """Write all clips, which were made at once; returns the page."""
        page, _ = made.write(self.directory)
        _log_factor(made.rtf)
        return page

    def stem(self, index: int) -> str:
        """Name of a clip's files, without extension."""
        return sample_stem(self.clips[index].prompt, index, self.clips[index].seed)

    def _subfolder(self, index: int) -> str:
        """Where a clip is written; empty for the folder itself."""
        return f"{index // FOLDER_CLIPS:04d}" if len(self.clips) > FOLDER_CLIPS else ""

    def _begin(self) -> list[int]:
        """Write the record of a new folder, or compare with that of an old one; returns the clips that it lacks."""
        record = self.directory / RECORD_FILE
        if record.is_file():
            begun = read_json(record, "the record of a folder of clips", "give another output_dir, or overwrite=true")
            ours = json.loads(json.dumps(dict(self.request)))
            if changed := sorted(key for key in begun | ours if begun.get(key) != ours.get(key)):
                was = ", ".join(f"{key} was {begun.get(key)}, is {ours.get(key)}" for key in changed)
                raise ValueError(
                    f"{self.directory} holds clips of another request ({was}); give another output_dir, or "
                    "overwrite=true to remove them"
                )
        else:
            write_json(record, dict(self.request))
        lacking, _ = self._there()
        return lacking

    def _there(self) -> tuple[list[int], set[int]]:
        """The clips that the folder lacks, and those of a large set that lie in the folder itself."""
        # Every folder is listed once: to ask for each clip takes a round over the network each.
        there = {file.relative_to(self.directory) for file in _clip_files(self.directory) if file.suffix == ".json"}
        sidecars = [Path(f"{self.stem(index)}.json") for index in range(len(self.clips))]
        flat = {index for index, file in enumerate(sidecars) if self._subfolder(index) and file in there}
        lacking = [i for i, file in enumerate(sidecars) if i not in flat and self._subfolder(i) / file not in there]
        return lacking, flat

    @property
    def _pages(self) -> list[range]:
        """The clips that each page shows."""
        count = len(self.clips)
        return [range(start, min(start + FOLDER_CLIPS, count)) for start in range(0, count, FOLDER_CLIPS)]

    def _write_page(self, number: int, flat: Set[int]) -> None:
        shown = self._pages[number]
        cards = [self._draw_card(index, "" if index in flat else self._subfolder(index)) for index in shown]
        records = [_record_of(self.directory / card.sidecar_file) for card in cards]
        rtf = RealTimeFactor.mean(map(RealTimeFactor.of_json, records))
        title = count_sounds(len(self.clips), shown)
        page = render_page(title, records[-1]["settings"], cards, self._pages, number, rtf)
        write_text(self.directory / page_file(number), page)

    def _draw_card(self, index: int, folder: str) -> Card:
        """From the WAV: an earlier run, or another process, may have made the clip."""
        clip, stem, directory = self.clips[index], self.stem(index), self.directory / folder
        samples, rate = soundfile.read(directory / f"{stem}.wav", dtype="float32", always_2d=True)
        card = draw_card(directory, stem, clip.prompt, clip.seed, from_numpy(samples.T), rate)
        return card.inside(folder) if folder else card


def _log_factor(rtf: RealTimeFactor | None) -> None:
    if rtf is not None:
        _log.info("%s: seconds of computing for a second of audio", rtf)


def _record_of(sidecar: Path) -> dict[str, Any]:
    """How a clip was made, by its JSON; raises DamagedFileError."""
    what, mend = "the JSON of a clip", "remove it, or give overwrite=true"
    made = read_json(sidecar, what, mend)
    with reading(sidecar, what, mend):
        return {**made, "settings": dict(made["settings"])}


def tells_of_clips(name: str) -> bool:
    """Whether a file says which clips are there, and of which request: the record, and the JSON of a clip."""
    return name.endswith(".json")


def _clip_files(directory: Path) -> list[Path]:
    """What `Generation.write_clip` and the page have written of clips, by their names."""
    folders = [directory, *_subfolders(directory)]
    return [file for folder in folders for file in folder.glob("*") if _CLIP_FILE.fullmatch(file.name)]


def _subfolders(directory: Path) -> list[Path]:
    return [folder for folder in directory.glob("*") if _SUBFOLDER.fullmatch(folder.name) and folder.is_dir()]


def remove_clips(directory: Path) -> None:
    """Remove the clips of a folder, their record and their pages; other files stay, and subfolders that hold such."""
    about = [directory / name for name in (RECORD_FILE, PAGE_FILE, SHEET_FILE)]
    pages = [page for page in directory.glob("index_*.html") if _PAGE.fullmatch(page.name)]
    for file in [*_clip_files(directory), *about, *pages]:
        file.unlink(missing_ok=True)
    for folder in _subfolders(directory):
        if not any(folder.iterdir()):
            folder.rmdir()


def _progress_bar(disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeRemainingColumn(), disable=disable)
