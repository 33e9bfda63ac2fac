"""FirstBlockCache (ParaAttention, Cheng 2024): what the first block adds tells whether the others have to run.

The first block always runs. Let r(t) = h_1 - h_0 be what it adds to the stream at evaluation t. If that is nearly what
it added when the whole model last ran, at t',

    |r(t) - r(t')|_1 / |r(t')|_1 < threshold

then so is, one may hope, what all other blocks would add, and their residual of then is added again. No calibration,
no polynomial: TeaCache with a better signal and a dearer one.
"""

from typing import Unpack

from torch import Tensor

from foley.accel.caching.block_cache import BelowThreshold, BlockCache, BlockOptions, Probe, Rule
from foley.accel.caching.reuse import ReuseChoice
from foley.core.numbers import NOT_NEGATIVE
from foley.diffusion.context import RunContext


class FirstBlockCache(BlockCache):
    """Run the first block, and the others where its residual has changed by `threshold` or more.

    Args:
        threshold: of the relative L1 change; 0 computes always. 0.05 to 0.2 in the library.
        reuse, options: as `BlockCache` takes them.

    Example: as that of `foley.accel.caching.teacache.TeaCache`.

        >>> rule = FirstBlockCache(threshold=0.1).rule(run=None)
        >>> [rule.computes(evaluation, change) for evaluation, change in enumerate([None, 0.05, 0.2])]
        [True, False, True]
    """

    def __init__(self, threshold: float = 0.1, reuse: ReuseChoice = "hold", **options: Unpack[BlockOptions]) -> None:
        NOT_NEGATIVE.check("threshold", threshold)
        self._threshold = threshold
        # One block is the least that hears both the latent and the text.
        policy = {"name": "first_block_cache", "threshold": threshold}
        super().__init__(policy, first_blocks=1, reuse=reuse, **options)

    def rule(self, run: RunContext) -> Rule:
        """The change since the last computed evaluation, against the threshold."""
        return BelowThreshold(self._threshold)

    def signal(self, probe: Probe) -> Tensor:
        """What the first block has added: `h_1 - h_0`."""
        return probe.arrived - probe.entered
