"""`ClipFolder`: the clips of a prompt file, shared out over processes, and continued where an earlier run stopped."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import soundfile
from lightning_fabric import Fabric
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import from_numpy

from foley.core.files import sample_stem, write_json, write_text
from foley.core.logs import get_logger
from foley.generation.prompts import Clip
from foley.generation.result import Generation
from foley.reporting.samples import MAX_PAGE_CLIPS, PAGE_FILE, Card, count_sounds, draw_card, render_page

RECORD_FILE = "test_set.json"
_log = get_logger(__name__)


def launch_processes(trainer: DictConfig | None) -> Fabric:
    """The processes of a trainer config, this one being one of them from here on; a single one on the CPU for None."""
    if trainer is None:
        return Fabric(accelerator="cpu", devices=1)
    chosen = {key: trainer[key] for key in ("accelerator", "devices", "num_nodes", "strategy") if key in trainer}
    fabric = Fabric(**chosen)
    fabric.launch()
    return fabric


@dataclass(frozen=True)
class ClipFolder:
    """Clips asked for, each with its own seed, and the folder that receives a WAV and a JSON for each.

    Which process makes a clip, and beside which others, changes nothing about it. A clip whose JSON is there is never
    made or written again.

    Args:
        request: all that the clips depend on; an existing folder must have been begun with the same.
    """

    directory: Path
    clips: Sequence[Clip]
    request: Mapping[str, Any]

    def fill(self, generate: Callable[[Sequence[Clip]], Generation], fabric: Fabric, batch_size: int) -> Path:
        """Make this process's share of the clips that are missing; returns the page, once all processes are done.

        Raises ValueError where the folder holds clips of another request.
        """
        # One process decides for all: a look at the folder while another writes would share the clips out differently.
        todo: list[int] = fabric.broadcast(self._begin() if fabric.is_global_zero else [])
        share = todo[fabric.global_rank :: fabric.world_size]
        start, of_all = time.perf_counter(), f"clips of process 1 of {fabric.world_size}"
        with _progress_bar(disable=not fabric.is_global_zero) as progress:
            task = progress.add_task("" if fabric.world_size == 1 else of_all, total=len(share), rate="")
            for first in range(0, len(share), batch_size):
                indices = share[first : first + batch_size]
                made = generate([self.clips[index] for index in indices])
                for row, index in enumerate(indices):
                    made.write_clip(self.directory, row, index)
                rate = (first + len(indices)) / (time.perf_counter() - start)
                progress.update(task, advance=len(indices), rate=f"{rate:.3g} clips/s")
        fabric.barrier()
        seconds = time.perf_counter() - start
        _log.info("%d clips made in %.1f s, %d were there already", len(todo), seconds, len(self.clips) - len(todo))
        return self._write_page() if fabric.is_global_zero else self.directory

    def stem(self, index: int) -> str:
        """Name of a clip's files, without extension."""
        return sample_stem(self.clips[index].prompt, index, self.clips[index].seed)

    def _begin(self) -> list[int]:
        """Write the record of a new folder, or compare with that of an old one; the clips that it lacks."""
        record = self.directory / RECORD_FILE
        if record.is_file():
            begun = json.loads(record.read_text(encoding="utf-8"))
            ours = json.loads(json.dumps(dict(self.request)))
            if changed := sorted(key for key in begun | ours if begun.get(key) != ours.get(key)):
                was = ", ".join(f"{key} was {begun.get(key)}, is {ours.get(key)}" for key in changed)
                raise ValueError(f"{self.directory} holds clips of another request ({was}); give another output_dir")
        else:
            write_json(record, dict(self.request))
        return [i for i in range(len(self.clips)) if not (self.directory / f"{self.stem(i)}.json").is_file()]

    def _write_page(self) -> Path:
        """The page of all clips, or of evenly spread ones where there are thousands."""
        shown = range(0, len(self.clips), ceil(len(self.clips) / MAX_PAGE_CLIPS))
        cards = [self._draw_card(index) for index in shown]
        settings = json.loads((self.directory / cards[-1].sidecar_file).read_text(encoding="utf-8"))["settings"]
        page = self.directory / PAGE_FILE
        write_text(page, render_page(count_sounds(len(self.clips), len(cards)), settings, cards))
        return page

    def _draw_card(self, index: int) -> Card:
        """From the WAV: an earlier run, or another process, may have made the clip."""
        clip, stem = self.clips[index], self.stem(index)
        samples, rate = soundfile.read(self.directory / f"{stem}.wav", dtype="float32", always_2d=True)
        return draw_card(self.directory, stem, clip.prompt, clip.seed, from_numpy(samples.T), rate)


def _progress_bar(disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeRemainingColumn(), disable=disable)
