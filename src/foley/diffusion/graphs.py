"""Evaluations recorded once and replayed at every timestep: CUDA graphs of a whole guided denoiser.

In eager mode a GPU waits for Python between some thousand small kernels of an evaluation. A recording starts them all
at once. It reads and writes the memory that it was made with: latent and timestep are copied to where it looks for
them, and what it returns is copied from where it leaves it. All else that it reads has to stay in its place: a run's
conditions do, and accelerators that keep outputs between evaluations are told so by `RunContext.is_recorded`.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foley.core.logs import get_logger
from foley.diffusion.context import RunContext, followers
from foley.diffusion.guidance import Denoise

Replay = Callable[[], Tensor]
Recorder = Callable[[Callable[[], Tensor]], Replay]
"""Records work on fixed memory, and returns what does it again; each replay returns one and the same tensor."""

FEWEST_EVALUATIONS = 4
"""Of a run: the first of a kind runs as it is, the second is recorded, and only what is replayed after that is won."""
_log = get_logger(__name__)


class CudaRecorder:
    """Records CUDA graphs, which share their memory: they are replayed one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may go on with work of their own.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = work()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
            raise

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class RecordedDenoise:
    """`denoise`, of whose evaluations each pattern is recorded at its second occurrence.

    Where that cannot be, everything runs as it is, and the reason is logged once.

    Args:
        pattern: tells apart the evaluations that compute different things; None is one that is like no other.
    """

    def __init__(self, denoise: Denoise, record: Recorder, pattern: Callable[[], Hashable | None]) -> None:
        self._denoise = denoise
        self._record: Recorder | None = record
        self._pattern = pattern
        self._replays: dict[Hashable, Replay | None] = {}  # None of a pattern that has occurred once
        self._inputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """As `Denoise`."""
        if self._record is None:  # the pattern is not asked for: who is asked may count on being replayed
            return self._denoise(noisy, timestep)
        pattern = self._pattern()
        if pattern is None:
            self._give_up("evaluations under this accelerator are not alike")
            return self._denoise(noisy, timestep)
        if pattern not in self._replays:  # as it is: what is made or chosen at a first use must not be recorded
            self._replays[pattern] = None
            return self._denoise(noisy, timestep)
        self._place(noisy, timestep)
        try:
            replay = self._replays[pattern] or self._record(self._evaluate)
        except RuntimeError as error:  # what CUDA does not record: a wait, a copy from the CPU
            self._give_up(str(error).partition("\n")[0])
            return self._denoise(noisy, timestep)
        self._replays[pattern] = replay
        return replay().clone()  # the next replay writes over it, and solvers keep predictions

    def _give_up(self, reason: str) -> None:
        _log.info("no CUDA graphs: %s; evaluations run one kernel after the other", reason)
        self._record = None

    def _place(self, noisy: Tensor, timestep: Tensor) -> None:
        """Copy the inputs to where recordings look for them."""
        if self._inputs is None:
            self._inputs = noisy.clone(), timestep.clone()  # `timestep` is one number, expanded
            return
        for place, value in zip(self._inputs, (noisy, timestep), strict=True):
            place.copy_(value)

    def _evaluate(self) -> Tensor:
        assert self._inputs is not None
        return self._denoise(*self._inputs)


def recorded(
    denoise: Denoise, run: RunContext, recorder: Recorder | None, accelerator: Any
) -> tuple[Denoise, RunContext]:
    """Both for a run whose evaluations are recorded; as they are without a recorder, and in a run of few evaluations.

    Evaluations differ as the `graph_pattern` of the accelerator says, and that of guidance which changes on the way;
    without either all are alike.
    """
    if recorder is None or run.num_evaluations < FEWEST_EVALUATIONS:
        return denoise, run
    patterns = [getattr(part, "graph_pattern", lambda: None) for part in followers(denoise, accelerator)]

    def pattern() -> Hashable | None:
        found = tuple(one() for one in patterns)
        return None if None in found else found

    return RecordedDenoise(denoise, recorder, pattern), replace(run, is_recorded=True)


def choose_graphs(wanted: str | bool, device: torch.device) -> bool:
    """Whether to record: "auto" does on CUDA. Raises ValueError for what is neither, and for true elsewhere.

    >>> choose_graphs("auto", torch.device("cpu"))
    False
    """
    if wanted not in ("auto", True, False):
        raise ValueError(f"cuda_graphs must be auto, true or false, got {wanted!r}")
    if wanted is True and device.type != "cuda":
        raise ValueError(f"cuda_graphs=true: device={device} has none; leave it at auto")
    return device.type == "cuda" if wanted == "auto" else bool(wanted)
