"""Change curves made where an accelerator misses them, by whoever generates and before it does.

The curves of a system hardly depend on the prompt (`foley.accel.caching.calibration`), so that a few of the captions
that it knows are taken, or, of a system that keeps none, of the demo's; they are kept, and read from then on.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from rich.progress import track

from foley.accel.caching.calibration import Calibration, CalibrationRecorder, WantedCurves, calibrated_caches
from foley.core.config import shipped
from foley.core.logs import get_logger
from foley.data.ordering import evenly_spaced
from foley.diffusion.context import Accelerator
from foley.diffusion.sampler import Progress
from foley.generation.prompts import read_prompts

NUM_PROMPTS = 4
_log = get_logger(__name__)


class Uncached(Protocol):
    """Generates the prompts in the number of steps, with a recorder for its accelerator, and in the request's way."""

    def __call__(
        self, prompts: Sequence[str], *, num_steps: int, accelerator: Accelerator, progress: Progress
    ) -> object: ...


def calibration_prompts(known: Sequence[str]) -> list[str]:
    """Some of the captions that a system knows, or of the demo's where it knows none."""
    captions = list(known) or read_prompts(shipped("prompts/demo.jsonl"))
    return [captions[index] for index in evenly_spaced(len(captions), NUM_PROMPTS)]


def calibrate_missing(
    accelerator: Accelerator | None,
    run: tuple[str, str, int, float],
    prompts: Sequence[str],
    generate: Uncached,
) -> None:
    """Give each cache that calibrates by itself the curves of the run, from where they are kept or made anew.

    Args:
        run: model hash, solver, number of steps and guidance scale.
        prompts: to calibrate with.
    """
    for cache in calibrated_caches(accelerator):
        if cache.calibrates:
            wanted = cache.wanted(*run)
            calibration = cache.find(wanted)
            if calibration is None:
                calibration = _calibrate(wanted, prompts, generate)
                _log.info("kept the calibration: %s", cache.keep(calibration, wanted))
            cache.adopt(calibration)


def _calibrate(wanted: WantedCurves, prompts: Sequence[str], generate: Uncached) -> Calibration:
    _log.info(
        "no calibration for %s, %d steps, guidance scale %g yet: made of %d uncached clips, once",
        *(wanted.solver, wanted.num_steps, wanted.guidance_scale, len(prompts)),
    )
    recorder = CalibrationRecorder()
    bar = partial(track, description="calibrating")
    generate(prompts, num_steps=wanted.num_steps, accelerator=recorder, progress=bar)
    return recorder.calibration()
