"""DBCache (cache-dit, 2025): the first F blocks say whether the middle is reused, the last B correct what was reused.

Let R_F(t) = h_F - h_0 be what the first F blocks add at evaluation t, and t' the evaluation at which all blocks last
ran. The middle of the stack is reused while

    |R_F(t) - R_F(t')|_1 / |R_F(t')|_1 < threshold

More blocks at the front make that measure steadier, and the last B blocks, which always run, fit the approximate stream
to the present evaluation. Three guards: so many evaluations at the beginning always compute (warm-up), so many reuses
in a row at most, and so many in all. FirstBlockCache is F = 1, B = 0, without guards.

With `reuse=taylor` the residual is not held, but extrapolated through the last computed ones (TaylorSeer, Liu et al.
2025), which the library calls its calibrator. A `steps_mask` fixes beforehand which evaluations compute in any case.
"""

from collections.abc import Sequence

from torch import Tensor

from foley.accel.caching.block_cache import BelowThreshold, BlockCache, Probe, Rule
from foley.core.numbers import COUNT, NumberRange
from foley.diffusion.context import RunContext


class _Masked:
    """A rule, but what the mask names computes whatever it says.

    >>> rule = _Masked(BelowThreshold(1.0), [True, False, True])
    >>> [rule.computes(evaluation, 0.0) for evaluation in range(3)]
    [True, False, True]
    """

    def __init__(self, rule: Rule, mask: Sequence[bool]) -> None:
        self._rule, self._mask = rule, mask

    def computes(self, evaluation: int, change: float | None) -> bool:
        return self._mask[evaluation] or self._rule.computes(evaluation, change)

    def has_computed(self) -> None:
        self._rule.has_computed()


class DBCache(BlockCache):
    """Run the first and last blocks always, and the others where the first ones have changed by `threshold` or more.

    Args:
        threshold: of the relative L1 change; 0 computes always. 0.08 in the library.
        first_blocks, last_blocks: F and B; the library takes 8 and 0 of Flux's 57.
        warmup: so many evaluations at the beginning always compute; 8 in the library.
        max_consecutive, max_hits: reuses in a row and in all, at most; None for no limit.
        steps_mask: true where an evaluation computes in any case, one entry for each.
        reuse: "hold" or "taylor".

    Example: as that of `foley.accel.caching.teacache.TeaCache`.

        >>> DBCache(threshold=0.08, first_blocks=0)
        Traceback (most recent call last):
        ...
        ValueError: first_blocks=0: give a whole number >= 1
    """

    def __init__(
        self,
        threshold: float = 0.08,
        first_blocks: int = 1,
        last_blocks: int = 0,
        warmup: int = 8,
        max_consecutive: int | None = None,
        max_hits: int | None = None,
        steps_mask: Sequence[bool] | None = None,
        reuse: str = "hold",
    ) -> None:
        NumberRange(least=0).check("threshold", threshold)
        COUNT.check("first_blocks", first_blocks)  # none, and there is nothing to measure
        self._threshold = threshold
        self._mask = None if steps_mask is None else [bool(computes) for computes in steps_mask]
        policy = {"name": "dbcache", "threshold": threshold, "first_blocks": first_blocks, "last_blocks": last_blocks}
        super().__init__(
            policy,
            first_blocks,
            last_blocks,
            warmup,
            0,
            max_consecutive=max_consecutive,
            max_hits=max_hits,
            reuse=reuse,
        )

    def rule(self, run: RunContext) -> Rule:
        """The change against the threshold, and the mask; raises ValueError for one of another length than the run."""
        rule = BelowThreshold(self._threshold)
        if self._mask is None:
            return rule
        if len(self._mask) != run.num_evaluations:
            raise ValueError(
                f"accel.steps_mask has {len(self._mask)} entries, but this run has {run.num_evaluations} evaluations"
            )
        return _Masked(rule, self._mask)

    def signal(self, probe: Probe) -> Tensor:
        """What the first F blocks have added: `h_F - h_0`."""
        return probe.arrived - probe.entered
