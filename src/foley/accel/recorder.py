"""Records change curves: runs a denoiser without caching, and watches its layers."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foley.accel.calibration import Calibration
from foley.accel.cost import MacCounter
from foley.accel.layers import CacheableLayer, Forward, find_cacheable_layers, replaced_forwards
from foley.accel.signature import RunSignature
from foley.diffusion.types import RunContext, StepContext


def relative_change(current: Tensor, previous: Tensor) -> Tensor:
    """`|current - previous|_1 / |current|_1` of each item of a batch, `[B]` (AudioCache, eq. 1).

    0 where both are silent, as the output of a layer that starts at zero is.
    """
    difference = (current - previous).flatten(1).abs().sum(dim=1, dtype=torch.float32)
    size = current.flatten(1).abs().sum(dim=1, dtype=torch.float32)
    return difference / size.clamp_min(torch.finfo(torch.float32).tiny)


class CalibrationRecorder:
    """An accelerator that speeds nothing up: it lets every layer compute and records how much the output changes.

    Keeps the last `max_distance` outputs of each layer and branch. Runs may differ in batch size; each item of a batch
    is one prompt, over whose guidance branches the change is averaged. A run that breaks off is left out. The
    multiply-accumulates are those of the last run's first evaluation.
    """

    def __init__(self, max_distance: int = 3) -> None:
        self._max_distance = max_distance
        self._layers: list[CacheableLayer] = []
        self._denoiser: nn.Module | None = None
        self._signature: RunSignature | None = None
        self._timesteps: tuple[float, ...] = ()
        self._macs = MacCounter()
        self._finished_runs: list[Tensor] = []
        self._context: StepContext | None = None
        self._forget_run()

    def _forget_run(self) -> None:
        self._history: dict[tuple[str, int], deque[Tensor]] = {}
        self._totals = torch.zeros(0)
        self._counts = torch.zeros(0)

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Watch the cacheable layers of `denoiser` inside the context; raises as `LayerCache.attach` does."""
        layers = find_cacheable_layers(denoiser)
        with replaced_forwards(denoiser, layers, self._recording_forward):
            self._layers, self._denoiser = layers, denoiser
            try:
                yield
            finally:
                self._denoiser = None
                self._forget_run()

    def _recording_forward(self, index: int, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = self._macs.call(index, original, *args, **kwargs)
            self._record(index, output.detach())
            return output

        return forward

    def _record(self, index: int, output: Tensor) -> None:
        if self._context is None:
            raise RuntimeError("a CalibrationRecorder is attached, but the sampler does not call it as a callback")
        evaluation, batch_size = self._context.evaluation, self._context.run.batch_size
        self._totals = self._totals.to(output.device)  # stays there for the run: to read it would wait for the device
        history = self._history.setdefault((self._context.branch, index), deque(maxlen=self._max_distance))
        for distance, previous in enumerate(reversed(history)):
            branches = relative_change(output, previous).view(-1, batch_size)
            self._totals[index, distance, evaluation] += branches.sum(dim=0)
        self._counts[index, evaluation] += output.shape[0] // batch_size
        history.append(output)

    def on_run_start(self, run: RunContext) -> None:
        """Raises RuntimeError if nothing is attached, SignatureMismatchError if runs of two kinds would be mixed."""
        if self._denoiser is None:
            raise RuntimeError("CalibrationRecorder has no denoiser: generate inside its `attach(denoiser)` context")
        signature = RunSignature.of(run, self._denoiser)
        if self._signature is not None:
            self._signature.require(signature, "the calibration recorded so far")
        self._signature = signature
        self._timesteps = tuple(run.timesteps.tolist())
        self._forget_run()
        self._totals = torch.zeros(len(self._layers), self._max_distance, run.num_evaluations, run.batch_size)
        self._counts = torch.zeros(len(self._layers), run.num_evaluations)

    def on_evaluation_start(self, context: StepContext) -> None:
        self._context = context
        if context.evaluation == 0:
            self._macs = MacCounter()
            self._macs.start()

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        self._context = None
        self._macs.stop()

    def on_run_end(self) -> None:
        self._macs.stop()
        if self._counts.numel() and (self._counts > 0).all():
            self._finished_runs.append(self._totals.cpu() / self._counts[:, None, :, None])
        self._context = None
        self._forget_run()

    def calibration(self) -> Calibration:
        """The curves over all prompts of the finished runs; raises RuntimeError if there is none."""
        if self._signature is None or not self._finished_runs:
            raise RuntimeError("no generation has run to its end under this recorder: there is nothing to average")
        prompts = torch.cat(self._finished_runs, dim=-1)
        return Calibration(
            mean=prompts.mean(dim=-1),
            std=prompts.std(dim=-1, correction=0),
            layer_names=tuple(layer.name for layer in self._layers),
            layer_kinds=tuple(layer.kind for layer in self._layers),
            signature=self._signature,
            num_prompts=prompts.shape[-1],
            timesteps=self._timesteps,
            macs=self._macs.evaluation([layer.name for layer in self._layers]),
        )
