"""A guided evaluation of a denoiser as one compiled graph.

Both branches, their joint batch and the guidance rule are one graph, and on CUDA one recording of it
(`foley.diffusion.graphs`), so that a step of the sampler starts one graph and then its solver's few kernels. CUDA
graphs are those recordings, and not `mode="reduce-overhead"`, which would keep a second copy of all memory and know
nothing of accelerators.

Accelerators put something in the place of layers, by decisions that no graph holds. Under them blocks are compiled
instead (`foley.accel.precision.compile_blocks`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor

from foley.accel.caching.prediction_calibration import CovarianceRecorder
from foley.accel.combined import Combined, NoAcceleration
from foley.diffusion.context import Accelerator

Denoise = Callable[[Tensor, Tensor], Tensor]
CHOICES = (False, True, "blocks")
"""Of `compile=`: nothing, an evaluation as a whole wherever nothing is attached, or always block by block."""
MOST_GRAPHS = 64
"""Of one function. Each guidance scale is a graph of its own, each new length one at most: PyTorch's own limit is 8."""


def compile_evaluation(denoise: Denoise, **options: Any) -> Denoise:
    """A run's guided `denoise` as one graph, compiled at its first call; the next run of the same kind has it already.

    Steps share it. Another number of steps, frames or padded text tokens costs a second graph, for sizes that differ.

    Args:
        options: of `torch.compile`.

    Example:
        >>> evaluate = compile_evaluation(lambda noisy, timestep: noisy * 2, backend="eager")
        >>> evaluate(torch.ones(1, 1, 2), torch.ones(1))
        tensor([[[2., 2.]]])
    """
    compiled = torch.compile(denoise, fullgraph=True, **options)

    def evaluate(noisy: Tensor, timestep: Tensor) -> Tensor:
        # Beyond the limit PyTorch would refuse to go on.
        # Around the call and not for good: the limit is the whole process's.
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            return compiled(noisy, timestep)

    return evaluate


def check_choice(compiled: bool | str) -> None:
    """Raises ValueError for what `compile=` does not know.

    >>> check_choice("blocks")
    """
    if compiled not in CHOICES:
        raise ValueError(f"compile must be true, false or blocks, got {compiled!r}")


def leaves_evaluations_whole(accelerator: Accelerator | None) -> bool:
    """Whether nothing is attached to the denoiser, so that an evaluation can be one graph."""
    # An empty combination, such as accel=none with nothing else, is nothing.
    if isinstance(accelerator, Combined):
        return all(leaves_evaluations_whole(part) for part in accelerator.accelerators)
    return accelerator is None or isinstance(accelerator, NoAcceleration)


def leaves_layers_alone(accelerator: Accelerator | None) -> bool:
    """Whether it computes an evaluation as it is or not at all, so that any denoiser will do, an exported one too."""
    if isinstance(accelerator, Combined):
        return all(leaves_layers_alone(part) for part in accelerator.accelerators)
    # A calibration of predictions looks at what the denoiser gives, and at nothing inside.
    looks_on = isinstance(accelerator, CovarianceRecorder)
    return looks_on or leaves_evaluations_whole(accelerator) or hasattr(accelerator, "computed_evaluations")
