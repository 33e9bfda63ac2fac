"""FORA (Selvaraju et al. 2024): every layer computes at every n-th evaluation and is reused in between.

The static schedule that the calibrated ones are compared with. It knows nothing of the model, and needs no calibration.
"""

from typing import Unpack

from torch import nn

from foley.accel.caching.layer_cache import CacheOptions, LayerCache
from foley.accel.caching.reuse import ReuseChoice, reuse_name
from foley.accel.caching.schedule import UNCONSTRAINED, CacheSchedule, Constraints, RunSignature
from foley.accel.layers import find_cacheable_layers
from foley.core.numbers import COUNT
from foley.diffusion.context import RunContext


def fora_schedule(num_steps: int, interval: int, constraints: Constraints = UNCONSTRAINED) -> list[bool]:
    """Compute every `interval`-th step, whatever the layer; 1 computes always.

    Where `constraints` have more computed, the interval begins there anew.

    Raises:
        ValueError: the interval is less than 1.

    Example:
        >>> fora_schedule(num_steps=5, interval=2)
        [True, False, True, False, True]
        >>> fora_schedule(num_steps=6, interval=3, constraints=Constraints(warmup=2))
        [True, True, False, False, True, False]
    """
    if interval < 1:
        raise ValueError(f"FORA's interval must be at least 1 (1 computes always), got {interval}")
    decisions, step = [False] * num_steps, 0
    while step < num_steps:
        decisions[step] = True
        step = min(step + interval, constraints.next_due(step, num_steps))  # 0, n, 2 n, ...
    return decisions


class Fora(LayerCache):
    """Every layer computes at every `interval`-th evaluation and is reused in between.

    Args:
        interval: n; 1 computes always.
        reuse, options: as `LayerCache` takes them.

    Example:
        >>> import torch
        >>> from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
        >>> from foley.diffusion.process import DiffusionProcess
        >>> from foley.diffusion.sampler import generate_latents
        >>> from foley.diffusion.solver import Solver
        >>> from foley.models.dit.model import DiffusionTransformer
        >>> from foley.nn.adaln import AdaLNSola
        >>> denoiser = DiffusionTransformer(4, 16, 2, 2, 8, AdaLNSola(rank=2, alpha=2)).eval()
        >>> text = Conditioning(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
        >>> guidance, solver = ClassifierFreeGuidance(3.0), Solver("ddim", 6)

        >>> from foley.accel import Fora
        >>> fora, process = Fora(interval=3), DiffusionProcess("v")
        >>> latent = generate_latents(denoiser, process, text, text, [0], 20, guidance, solver, accelerator=fora)
        >>> fora.schedule.compute.all(dim=1)  # per evaluation
        tensor([ True, False, False,  True, False, False])
    """

    def __init__(self, interval: int, reuse: ReuseChoice = "hold", **options: Unpack[CacheOptions]) -> None:
        super().__init__(reuse=reuse, **options)
        COUNT.check("interval", interval)
        self._interval = interval
        self._policy = {"name": "fora", "interval": interval, "reuse": reuse_name(reuse), **self.constraints.changed()}

    def schedule_for(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule:
        """The same row for all layers."""
        kinds = {layer.name: layer.kind for layer in find_cacheable_layers(denoiser)}
        rows = dict.fromkeys(kinds, fora_schedule(run.num_evaluations, self._interval, self.constraints))
        return CacheSchedule.from_rows(rows, kinds, RunSignature.of(run, denoiser), self._policy)
