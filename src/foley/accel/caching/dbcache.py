"""DBCache (cache-dit, 2025): the first F blocks say whether the middle is reused, the last B correct what was reused.

Let R_F(t) = h_F - h_0 be what the first F blocks add at evaluation t, and t' the evaluation at which all blocks last
ran. The middle of the stack is reused while

    |R_F(t) - R_F(t')|_1 / |R_F(t')|_1 < threshold

More blocks at the front make that measure steadier, and the last B blocks, which always run, fit the approximate stream
to the present evaluation. Three guards: so many evaluations at the beginning always compute (warm-up), so many reuses
in a row at most, and so many in all. FirstBlockCache is F = 1, B = 0, without guards.

With `reuse=taylor` the residual is not held, but extrapolated through the last computed ones (TaylorSeer, Liu et al.
2025), which the library calls its calibrator. Which evaluations compute in any case can be fixed
beforehand (`always_compute`, the library's mask of steps).
"""

from typing import Unpack

from torch import Tensor

from foley.accel.caching.block_cache import BelowThreshold, BlockCache, BlockOptions, Probe, Rule
from foley.accel.caching.reuse import ReuseChoice
from foley.core.numbers import COUNT, NOT_NEGATIVE
from foley.diffusion.context import RunContext


class DBCache(BlockCache):
    """Run the first and last blocks always, and the others where the first ones have changed by `threshold` or more.

    Args:
        threshold: of the relative L1 change; 0 computes always. 0.08 in the library.
        first_blocks, last_blocks: F and B; the library takes 8 and 0 of Flux's 57.
        max_hits: reuses in all, at most; None for no limit.
        reuse, options: as `BlockCache` takes them; `warmup` is 8 where none is given, as in the library, and
            `always_compute` its mask of steps.

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
        max_hits: int | None = None,
        reuse: ReuseChoice = "hold",
        **options: Unpack[BlockOptions],
    ) -> None:
        NOT_NEGATIVE.check("threshold", threshold)
        COUNT.check("first_blocks", first_blocks)  # none, and there is nothing to measure
        self._threshold = threshold
        policy = {"name": "dbcache", "threshold": threshold, "first_blocks": first_blocks, "last_blocks": last_blocks}
        guards: BlockOptions = {"warmup": 8, **options}  # as published where none is given
        super().__init__(policy, first_blocks, last_blocks, max_hits, reuse, **guards)

    def rule(self, run: RunContext) -> Rule:
        """The change since the last computed evaluation, against the threshold."""
        return BelowThreshold(self._threshold)

    def signal(self, probe: Probe) -> Tensor:
        """What the first F blocks have added: `h_F - h_0`."""
        return probe.arrived - probe.entered
