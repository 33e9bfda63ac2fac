"""A test set: the clips of a prompt file, shared out over processes, and continued where an earlier run stopped."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foley.core.files import sample_stem, write_json
from foley.core.logs import get_logger
from foley.generation.prompts import ClipRequest
from foley.generation.settings import Generation
from foley.reporting.samples import write_overview, write_sample

RECORD_FILE = "test_set.json"
_log = get_logger(__name__)

Generate = Callable[..., Generation]
"""Takes prompts and `seeds`, as `TextToAudio.generate` does."""


def launch_processes(trainer: DictConfig | None) -> Fabric:
    """The processes of a trainer config, this one being one of them from here on; a single one on the CPU for None."""
    if trainer is None:
        return Fabric(accelerator="cpu", devices=1)
    chosen = {key: trainer[key] for key in ("accelerator", "devices", "num_nodes", "strategy") if key in trainer}
    fabric = Fabric(**chosen)
    fabric.launch()
    return fabric


@dataclass(frozen=True)
class TestSet:
    """Clips asked for, each with its own seed, and the folder that receives a WAV and a JSON for each.

    Which process makes a clip, and beside which others, changes nothing about it. A clip whose JSON is there is never
    made or written again.

    Args:
        settings: all that the clips depend on; an existing folder must have been begun with the same.
        facts: what else each clip's JSON is to say of its settings.
    """

    __test__ = False  # pytest: not a test

    directory: Path
    clips: Sequence[ClipRequest]
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]

    def generate(self, generate: Generate, fabric: Fabric, batch_size: int) -> Path:
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
                batch = share[first : first + batch_size]
                clips = [self.clips[index] for index in batch]
                self._write(batch, generate([clip.prompt for clip in clips], seeds=[clip.seed for clip in clips]))
                rate = (first + len(batch)) / (time.perf_counter() - start)
                progress.update(task, advance=len(batch), rate=f"{rate:.3g} clips/s")
        fabric.barrier()
        seconds = time.perf_counter() - start
        _log.info("%d clips made in %.1f s, %d were there already", len(todo), seconds, len(self.clips) - len(todo))
        return self._finish() if fabric.is_global_zero else self.directory

    def stem(self, index: int) -> str:
        """Name of a clip's files, without extension."""
        return sample_stem(self.clips[index].prompt, index, self.clips[index].seed)

    def _begin(self) -> list[int]:
        """Write the record of a new folder, or compare with that of an old one; the clips that it lacks."""
        record = self.directory / RECORD_FILE
        if record.is_file():
            begun = json.loads(record.read_text(encoding="utf-8"))
            ours = json.loads(json.dumps(dict(self.settings)))
            if changed := sorted(key for key in begun | ours if begun.get(key) != ours.get(key)):
                was = ", ".join(f"{key} was {begun.get(key)}, is {ours.get(key)}" for key in changed)
                raise ValueError(f"{self.directory} holds clips of another request ({was}); give another output_dir")
        else:
            write_json(record, dict(self.settings))
        return [i for i in range(len(self.clips)) if not (self.directory / f"{self.stem(i)}.json").is_file()]

    def _write(self, indices: Sequence[int], made: Generation) -> None:
        settings = {**made.settings, **self.facts}
        for index, sample in zip(indices, made.samples([self.clips[i].notes for i in indices]), strict=True):
            facts = {"index": index, "settings": settings}
            write_sample(self.directory, self.stem(index), sample, made.sample_rate_hz, facts, made.peak_ceiling)

    def _finish(self) -> Path:
        stems = [self.stem(index) for index in range(len(self.clips))]
        return write_overview(self.directory, stems, f"{len(stems)} generated sounds")


def _progress_bar(disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeRemainingColumn(), disable=disable)
