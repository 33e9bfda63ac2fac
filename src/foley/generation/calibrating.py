"""Change curves, made by whoever generates where an accelerator misses them, or of thousands of prompts.

The curves of a system hardly depend on the prompt (`foley.accel.caching.calibration`), so that a few of the captions
that it knows are taken, or, of a system that keeps none, of the demo's; they are kept, and read from then on. Clips are
denoised for them, and never decoded.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.progress import track

from foley.accel.caching.calibration import Calibration, CalibrationRecorder, WantedCurves, calibrated_caches
from foley.accel.caching.sensitivity import SensitivityRecorder
from foley.core.config import shipped
from foley.core.files import info_path
from foley.core.hashing import hash_json
from foley.core.locks import only_writer
from foley.core.logs import get_logger
from foley.data.ordering import evenly_spaced
from foley.diffusion.context import Accelerator
from foley.generation.prompts import Clip, as_clips, read_prompts
from foley.generation.settings import GenerationSettings

NUM_PROMPTS = 4
_log = get_logger(__name__)

Denoise = Callable[[Sequence[Clip], GenerationSettings], None]
"""Denoises the clips, with the accelerator of the settings looking on."""


def calibration_prompts(known: Sequence[str]) -> list[str]:
    """Some of the captions that a system knows, or of the demo's where it knows none."""
    captions = list(known) or read_prompts(shipped("prompts/demo.jsonl"))
    return [captions[index] for index in evenly_spaced(len(captions), NUM_PROMPTS)]


def calibrate_missing(
    accelerator: Accelerator | None,
    run: tuple[str, str, int, float],
    prompts: Sequence[str],
    settings: GenerationSettings,
    denoise: Denoise,
) -> None:
    """Give each cache that calibrates by itself the curves of the run, from where they are kept or made anew.

    Args:
        run: model hash, solver, number of steps and guidance scale.
        prompts: to calibrate with.
        settings: of the request, but for steps, accelerator and progress.
    """
    for cache in calibrated_caches(accelerator):
        if cache.calibrates:
            wanted = cache.wanted(*run)
            calibration = cache.find(wanted)
            if calibration is None:
                calibration = _calibrate(cache.recorder(), wanted, prompts, settings, denoise)
                _log.info("kept the calibration: %s", cache.keep(calibration, wanted))
            cache.adopt(calibration)


def _calibrate(
    recorder: Any, wanted: WantedCurves, prompts: Sequence[str], settings: GenerationSettings, denoise: Denoise
) -> Any:
    """What the recorder makes of such runs."""
    _log.info(
        "no calibration for %s, %d steps, guidance scale %g yet: made of %d uncached clips, once",
        *(wanted.solver, wanted.num_steps, wanted.guidance_scale, len(prompts)),
    )
    bar = partial(track, description="calibrating")
    settings = replace(settings, num_steps=wanted.num_steps, progress=bar)
    recorder = CalibrationRecorder()
    return record_curves(as_clips(prompts), settings, denoise, recorder, wanted.objective == "sensitivity")


def record_curves(
    clips: Sequence[Clip],
    settings: GenerationSettings,
    denoise: Denoise,
    recorder: CalibrationRecorder,
    sensitivity: bool,
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """The curves of these clips, and how far reuse moves their latents where `sensitivity` is wanted."""
    denoise(clips, replace(settings, accelerator=recorder))
    calibration = recorder.calibration(dtype)
    if not sensitivity:
        return calibration
    looks_back = SensitivityRecorder(calibration.mean.shape[1])
    denoise(clips, replace(settings, accelerator=looks_back))
    return replace(calibration, sensitivity=looks_back.sensitivity())


@dataclass(frozen=True)
class CalibrationRun:
    """A calibration of many prompts: batches shared out over processes, and continued where an earlier run stopped.

    The curves of a finished batch are a small file. Which process made it changes nothing: they are merged in order.

    Args:
        directory: receives `parts_<hash of the request>`, which is removed in the end.
        request: all that the curves depend on.
    """

    directory: Path
    clips: Sequence[Clip]
    request: Mapping[str, Any]

    def record(
        self,
        denoise: Denoise,
        settings: GenerationSettings,
        fabric: Fabric,
        max_distance: int,
        keep: Callable[[Calibration], object] = lambda calibration: None,
        whole_batch: bool = False,
        sensitivity: bool = False,
    ) -> Calibration:
        """The curves of all clips, in every process; raises FolderInUseError where another run makes the same ones.

        Args:
            max_distance, whole_batch: as `CalibrationRecorder` takes them.
            sensitivity: also record how far reuse moves the latent.
            keep: called with them in one process, before those of the batches are removed.
        """
        folder = self.directory / f"parts_{hash_json(dict(self.request))[:16]}"
        batches = range(0, len(self.clips), settings.batch_size)
        with only_writer(folder, "a calibration") if fabric.is_global_zero else nullcontext():
            fabric.barrier()
            own = batches[fabric.global_rank :: fabric.world_size]
            for first in track(own, description="calibrating", disable=not fabric.is_global_zero):
                if not info_path(stem := folder / f"{first:07d}").is_file():
                    recorder = CalibrationRecorder(max_distance, whole_batch)
                    clips = self.clips[first : first + settings.batch_size]
                    record_curves(clips, settings, denoise, recorder, sensitivity, torch.float64).save(stem)
            fabric.barrier()
            merged = Calibration.merged(Calibration.load(folder / f"{first:07d}") for first in batches)
            if fabric.is_global_zero:
                keep(merged)
            fabric.barrier()
        if fabric.is_global_zero:
            rmtree(folder)
        return merged
