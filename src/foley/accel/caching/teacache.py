"""TeaCache (Liu et al. 2024): the timestep-modulated input of the first block foretells how much the output changes.

The noisy latent and the embedding of the time are known before anything is computed, and together, as the norm and
modulation of the first block join them, they move nearly as the model's output does. Their
relative L1 change since the evaluation before, computed or not, is

    L1rel(F, t) = |F_t - F_{t+1}|_1 / |F_{t+1}|_1                               (1)

where t falls from T to 0. What remains between it and the change of the output is corrected by a polynomial f, fitted
once on a few generations of the model. The estimates since the last computed evaluation t_a are added up, and the whole
stack of blocks is reused until the sum reaches delta:

    reuse at t_b  while  sum of f(L1rel(F, t)) for t from t_a to t_b  <  delta  (2)

The first and the last evaluation always compute. The published polynomials, of degree four, are those of video models;
without one for this model, f is the identity. `TeaCacheRecorder` fits it.
"""

from collections.abc import Sequence
from typing import Unpack

import numpy as np
from torch import Tensor

from foley.accel.caching.block_cache import BlockCache, BlockOptions, Probe, Rule
from foley.accel.caching.calibration import relative_change
from foley.accel.caching.reuse import ReuseChoice
from foley.core.numbers import COUNT, NOT_NEGATIVE
from foley.diffusion.context import RunContext, StepContext

DEGREE = 4  # of the published polynomials
IDENTITY = (1.0, 0.0)  # f(x) = x, highest power first


class Accumulated:
    """Equation (2) for one branch: compute once the rescaled changes have added up to delta.

    Args:
        delta: 0 computes always.
        coefficients: of f, highest power first, as published.

    Example:
        >>> rule = Accumulated(delta=0.5, coefficients=(1.0, 0.0))
        >>> decisions = []
        >>> for evaluation, change in enumerate([None, 0.2, 0.2, 0.2, 0.2]):
        ...     decisions.append(rule.computes(evaluation, change))
        ...     if decisions[-1]:
        ...         rule.has_computed()
        >>> decisions
        [True, False, False, True, False]
    """

    def __init__(self, delta: float, coefficients: Sequence[float] = IDENTITY) -> None:
        self._delta, self._coefficients = delta, coefficients
        self._sum = 0.0

    def computes(self, evaluation: int, change: float | None) -> bool:
        if change is None:
            return True
        # A change is not negative; a polynomial may be, outside of what it was fitted on.
        self._sum += max(float(np.polyval(self._coefficients, change)), 0.0)
        return self._sum >= self._delta

    def has_computed(self) -> None:
        self._sum = 0.0


class _ModulatedInput(BlockCache):
    """What TeaCache and its recorder look at."""

    compares_with_computed = False  # equation (1): the evaluation before

    def signal(self, probe: Probe) -> Tensor:
        """The timestep-modulated input of the first block."""
        return probe.modulated()


class TeaCache(_ModulatedInput):
    """Reuse the whole stack of blocks until the rescaled changes of its modulated input have added up to `threshold`.

    Args:
        threshold: the paper's delta; 0 computes always. 0.1 to 0.6 there.
        coefficients: of the polynomial f, highest power first; None is the identity.
        reuse, options: as `BlockCache` takes them; `cooldown` is 1 where none is given, as published.

    Example:
        A small transformer, which has random weights: a high threshold computes only the first and the last evaluation.

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
        >>> cache, process = TeaCache(threshold=1e9), DiffusionProcess("v")
        >>> latent = generate_latents(denoiser, process, text, text, [0], 20, guidance, solver, accelerator=cache)
        >>> cache.schedule.compute.all(dim=1), cache.hits
        (tensor([ True, False, False, False, False,  True]), 4)
    """

    def __init__(
        self,
        threshold: float = 0.2,
        coefficients: Sequence[float] | None = None,
        reuse: ReuseChoice = "hold",
        **options: Unpack[BlockOptions],
    ) -> None:
        NOT_NEGATIVE.check("threshold", threshold)
        self._threshold = threshold
        self._coefficients = IDENTITY if coefficients is None else tuple(float(value) for value in coefficients)
        if not self._coefficients:
            raise ValueError("accel.coefficients=[]: give those of a polynomial, highest power first, or null")
        policy = {"name": "teacache", "threshold": threshold, "coefficients": list(self._coefficients)}
        # Published code computes the last evaluation too, which the latent takes as it is.
        guards: BlockOptions = {"cooldown": 1, **options}  # as published where none is given
        super().__init__(policy, reuse=reuse, **guards)

    def rule(self, run: RunContext) -> Rule:
        """Equation (2)."""
        return Accumulated(self._threshold, self._coefficients)


class TeaCacheRecorder(_ModulatedInput):
    """Computes everything, and keeps how input and output change: what the polynomial is fitted on.

    The pairs of all runs are kept; a few prompts will do.

    Example: `generate` with this accelerator as with `TeaCache`, then `TeaCache(coefficients=recorder.coefficients())`.
    """

    def __init__(self) -> None:
        super().__init__({"name": "teacache_recorder"})
        self.pairs: list[tuple[float, float]] = []  # change of the modulated input, and of the prediction
        self._predictions: dict[str, Tensor] = {}  # of the evaluation before, by branch

    def rule(self, run: RunContext) -> Rule:
        """Computes always."""
        return Accumulated(0.0)

    def on_run_start(self, run: RunContext) -> None:
        """As that of `BlockCache`."""
        self._predictions = {}
        super().on_run_start(run)

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        """Pair what was measured before the blocks with what became of it."""
        before, change = self._predictions.get(context.branch), self.differences[context.evaluation]
        # The first evaluation of a branch has nothing before it, and makes no pair.
        if before is not None and change is not None:
            self.pairs.append((change, relative_change(before, prediction).mean().item()))
        self._predictions[context.branch] = prediction
        super().on_evaluation_end(context, prediction)

    def coefficients(self, degree: int = DEGREE) -> list[float]:
        """Of the polynomial of least squares from the change of the input to that of the output, highest power first.

        Raises ValueError where there are no more pairs than the degree.
        """
        COUNT.check("degree", degree)
        if len(self.pairs) <= degree:
            raise ValueError(f"{len(self.pairs)} pairs of changes do not determine a polynomial of degree {degree}")
        inputs, outputs = zip(*self.pairs, strict=True)
        fitted: list[float] = np.polyfit(inputs, outputs, degree).tolist()
        return fitted
