"""AudioCache (Shi et al. 2025): each layer is recomputed once its calibrated changes have added up to a threshold.

Some layers of a diffusion transformer change much while the contours of a sound form, others while its details do, and
all of them little at the end (Fig. 3). So each layer has a schedule of its own. The change of layer i at step t is

    E(t, i) = |L(t, i) - L(t + 1, i)|_1 / |L(t, i)|_1                            (1)

where t falls from T to 0, so that t + 1 is the step before. It is the same for every prompt, near enough, and is
recorded once (`foley.accel.caching.calibration`). While sampling, the changes since the last computation at t_1 are
added up, and the layer is computed again where the sum exceeds delta (Algorithm 1):

    E_sum(t, i) = sum of E(tau, i) for tau from t_1 to t                        (2)

To the letter, the sum includes the change at t_1 itself, which led to the present output; so what changes much is
computed again soon. The first step has no step before it, and no change of its own. The text has the sum reach delta;
here it exceeds delta, as in Algorithm 1, but that delta = 0 computes always.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

from foley.accel.caching.calibration import CalibratedCache, CalibratedOptions, Calibration
from foley.accel.caching.reuse import ReuseChoice
from foley.accel.caching.schedule import UNCONSTRAINED, Constraints
from foley.core.numbers import NOT_NEGATIVE


def audiocache_schedule(
    changes: Mapping[str, Sequence[float]],
    delta: float,
    include_refresh: bool = True,
    constraints: Constraints = UNCONSTRAINED,
) -> dict[str, list[bool]]:
    """Per layer, compute when the changes since the last computation exceed `delta` (AudioCache, Algorithm 1, eq. 2).

    Args:
        changes: for each layer, its relative-L1 change at each evaluation since the one before (eq. 1); evaluation 0
            has no predecessor, always computes, and its value is ignored.
        delta: 0 computes always.
        include_refresh: sum from the evaluation last computed, its own change included, as equation (2) has it; False
            sums from the one after, which reuses more at the same delta.
        constraints: what else computes; the sum goes on from there.

    Raises:
        ValueError: delta is negative.

    Example:
        After the computation at evaluation 2 its change of 0.4 counts towards the next one.

        >>> curves = {"0.feed_forward": [0.0, 0.2, 0.4, 0.2, 0.2]}
        >>> audiocache_schedule(curves, delta=0.5)
        {'0.feed_forward': [True, False, True, True, False]}
        >>> audiocache_schedule(curves, delta=0.5, include_refresh=False)
        {'0.feed_forward': [True, False, True, False, False]}
    """
    if delta < 0:
        raise ValueError(f"AudioCache's threshold must be at least 0 (0 computes always), got {delta}")
    return {layer: _accumulate(curve, delta, include_refresh, constraints) for layer, curve in changes.items()}


def _accumulate(curve: Sequence[float], delta: float, include_refresh: bool, constraints: Constraints) -> list[bool]:
    decisions, accumulated = [True], 0.0  # the first evaluation has nothing to reuse
    due = constraints.next_due(0, len(curve))
    for evaluation, change in enumerate(curve[1:], start=1):  # curve[0] has no evaluation before it
        accumulated += change  # eq. 2
        decisions.append(accumulated > delta or delta == 0 or evaluation == due)  # Algorithm 1
        if decisions[-1]:
            accumulated = change if include_refresh else 0.0  # t_1 is this step now
            due = constraints.next_due(evaluation, len(curve))
    return decisions


class AudioCache(CalibratedCache):
    """Each layer is recomputed when its calibrated changes add up to more than `threshold`; 0 computes always.

    Args:
        calibration_dir, reuse, options: as `CalibratedCache` takes them.
        threshold: the paper's delta, 0.2 to 0.4 there; it grows with the number of steps (Table V).
        include_refresh: equation (2) to the letter, see `audiocache_schedule`; False reuses more at the same threshold.

    Example:
        Record the curves of a small transformer, which has random weights, then generate with them.

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
        >>> def generate(accelerator):
        ...     process = DiffusionProcess("v")
        ...     return generate_latents(denoiser, process, text, text, [0], 20, guidance, solver, accelerator)

        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from foley.accel import AudioCache, CalibrationRecorder
        >>> recorder, folder = CalibrationRecorder(), TemporaryDirectory()
        >>> exact = generate(recorder)
        >>> recorder.calibration().save(Path(folder.name) / "ddim_6")

        >>> torch.equal(generate(AudioCache(folder.name, threshold=0.0)), exact)
        True
        >>> cache = AudioCache(folder.name, threshold=1e9)
        >>> latent = generate(cache)
        >>> cache.schedule.compute.all(dim=1)  # per evaluation
        tensor([ True, False, False, False, False, False])
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        threshold: float = 0.3,
        reuse: ReuseChoice = "hold",
        include_refresh: bool = True,
        **options: Unpack[CalibratedOptions],
    ) -> None:
        policy = {"name": "audiocache", "threshold": threshold, "include_refresh": include_refresh}
        super().__init__(calibration_dir, policy, reuse, **options)
        NOT_NEGATIVE.check("threshold", threshold)
        self._threshold = threshold
        self._include_refresh = include_refresh

    def decide(self, calibration: Calibration) -> dict[str, list[bool]]:
        """Each layer by itself, see `audiocache_schedule`."""
        return audiocache_schedule(calibration.changes(), self._threshold, self._include_refresh, self.constraints)
