"""MagCache (Ma et al. 2025): the magnitude of the residual falls by one law for all prompts, and tells when to reuse.

Let R_t be what all blocks add to the stream at evaluation t, and gamma_t the mean ratio of its magnitude, token by
token, to that at the evaluation before:

    gamma_t = mean( |R_t|_2 / |R_{t-1}|_2 )                                     (1)

It hardly depends on the prompt, so that one generation measures it. Where the residual of evaluation t' is reused at t,
the ratios in between multiply, and the error of a reuse is how far their product has come from one. The errors of all
reuses in a row are added up:

    e(t) = sum over s from t' + 1 to t of | 1 - gamma_{t'+1} ... gamma_s |      (2)

Reuse while e <= delta and while there are no more than K reuses in a row; the first evaluations, a share of them called
the retention ratio, always compute, since what is reused there shapes the whole clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from foley.accel.caching.block_cache import BlockCache, BlockOptions, Rule
from foley.accel.caching.reuse import Reuse, ReuseChoice
from foley.accel.caching.schedule import Constraints
from foley.core.files import write_json
from foley.core.hashing import hash_module
from foley.core.logs import get_logger
from foley.core.numbers import NOT_NEGATIVE, NumberRange
from foley.core.reading import read_json, reading
from foley.diffusion.context import RunContext

_log = get_logger(__name__)
_SHARE = NumberRange(least=0, most=1)


def resampled(ratios: Sequence[float], num_evaluations: int) -> list[float]:
    """gamma of a run with another number of evaluations: that of the nearest one, as in the published code.

    >>> resampled([1.0, 0.9, 0.8, 0.7, 0.6], 3)
    [1.0, 0.8, 0.6]
    """
    nearest = np.linspace(0, len(ratios) - 1, num_evaluations).round().astype(int)
    return [float(ratios[index]) for index in nearest]


class MagnitudeRule:
    """Equation (2) for one branch.

    Args:
        ratios: gamma of each evaluation.
        delta: the largest accumulated error; 0 computes always.

    Example:
        From 0.9, two ratios are 0.1 and 0.19 away from one.

        >>> rule = MagnitudeRule([1.0, 0.9, 0.9, 0.9], delta=0.3)
        >>> rule.has_computed()
        >>> [rule.computes(evaluation, None) for evaluation in (1, 2, 3)]
        [False, False, True]
    """

    def __init__(self, ratios: Sequence[float], delta: float) -> None:
        self._ratios, self._delta = ratios, delta
        self._seen = 0  # the evaluation that was asked for last
        self.has_computed()

    def computes(self, evaluation: int, change: float | None) -> bool:
        # Another accelerator may skip evaluations as a whole: the residual has aged by them all the same.
        self._product *= prod(self._ratios[self._seen + 1 : evaluation + 1])
        self._seen = evaluation
        self._error += abs(1 - self._product)
        return self._delta == 0 or self._error > self._delta

    def has_computed(self) -> None:
        self._product, self._error = 1.0, 0.0


@dataclass
class _Measured:
    """A memory that writes down gamma (1) at every store but the first."""

    ratios: list[float] = field(default_factory=list)
    residual: Any = None

    def store(self, evaluation: Any, output: Tensor) -> None:
        if self.residual is not None:
            norms = [torch.linalg.vector_norm(part.float(), dim=-1) for part in (output, self.residual)]  # [B, N]
            self.ratios.append((norms[0] / norms[1].clamp_min(1e-8)).mean().item())
        self.residual = output

    def recall(self, evaluation: Any) -> Any:
        return self.residual


class MagCache(BlockCache):
    """Reuse the whole stack of blocks while the calibrated error of its magnitude is at most `threshold`.

    Where no ratios are known for a model, solver and number of steps, the first generation of that kind computes
    everything and measures them; those after it use them.

    Args:
        threshold: the paper's delta; 0 computes always. 0.06 for Flux, 0.12 for Wan.
        retention_ratio: so large a share of the evaluations, at the beginning, always computes.
        ratios: gamma of each evaluation, where they are known; None measures them.
        ratios_dir: keeps what was measured, `<directory>/magcache_<solver>_<steps>.json`; None keeps it in memory.
        reuse, options: as `BlockCache` takes them; `max_reuses` is the paper's K, 3 where none is given, and a
            `warmup` beyond the retained share is held as well.

    Example: as that of `foley.accel.caching.teacache.TeaCache`, but generate twice: the first time measures.

        >>> cache = MagCache(threshold=0.06, ratios=[1.0, 0.98, 0.97, 0.9])
        >>> MagCache(retention_ratio=2)
        Traceback (most recent call last):
        ...
        ValueError: retention_ratio=2: give a number >= 0 and <= 1
    """

    def __init__(
        self,
        threshold: float = 0.06,
        retention_ratio: float = 0.2,
        ratios: Sequence[float] | None = None,
        ratios_dir: str | Path | None = None,
        reuse: ReuseChoice = "hold",
        **options: Unpack[BlockOptions],
    ) -> None:
        NOT_NEGATIVE.check("threshold", threshold)
        _SHARE.check("retention_ratio", retention_ratio)
        for ratio in ratios or ():
            NumberRange(above=0).check("ratios", ratio)
        self._threshold, self._retention = threshold, retention_ratio
        self._given = ratios
        self._directory = None if ratios_dir is None else Path(ratios_dir)
        self.measured: dict[tuple[str, str, int], list[float]] = {}  # by model, solver and number of steps
        self._ratios: list[float] | None = None  # of this run; None where they are being measured
        self._memories: list[_Measured] = []  # one for each branch of a run that measures
        policy = {"name": "magcache", "threshold": threshold, "retention_ratio": retention_ratio}
        guards: BlockOptions = {"max_reuses": 3, **options}  # as published where none is given
        super().__init__(policy, reuse=reuse, **guards)

    def rule(self, run: RunContext) -> Rule:
        """Equation (2); computes always where gamma is being measured."""
        if self._ratios is None:
            return MagnitudeRule([1.0] * run.num_evaluations, delta=0.0)
        return MagnitudeRule(self._ratios, self._threshold)

    def memory(self) -> Reuse:
        """One that measures, where gamma is not known."""
        if self._ratios is not None:
            return super().memory()
        self._memories.append(_Measured())
        return self._memories[-1]

    def guards(self, run: RunContext) -> Constraints:
        """With the retained share as a warm-up."""
        retained = int(self._retention * run.num_evaluations + 0.5)  # as published
        return replace(self.constraints, warmup=max(self.constraints.warmup, retained))

    def on_run_start(self, run: RunContext) -> None:
        """As that of `BlockCache`; looks for gamma, and measures it where there is none."""
        super().on_run_start(run)
        assert self._denoiser is not None
        ratios = self._given or self._find(run, self._denoiser)
        self._ratios = None if ratios is None else resampled(ratios, run.num_evaluations)
        self._memories = []

    def on_run_end(self) -> None:
        """As that of `BlockCache`; keeps what was measured of a whole run."""
        if self._memories and self._run is not None and self._denoiser is not None:
            columns = zip(*(memory.ratios for memory in self._memories), strict=False)  # of each evaluation
            ratios = [1.0, *(float(np.mean(column)) for column in columns)]
            if len(ratios) == self._run.num_evaluations:  # not begun in the middle, nor broken off
                # Others may have begun late, and would be read at the wrong evaluations.
                self._keep(ratios, self._run, self._denoiser)
        self._memories = []
        super().on_run_end()

    def _find(self, run: RunContext, denoiser: nn.Module) -> list[float] | None:
        key = (hash_module(denoiser), run.solver, run.num_steps)
        file = self._file(run)
        if key not in self.measured and file is not None and file.is_file():
            with reading(file, "ratios of MagCache", "remove it, and the next generation measures them anew"):
                info = read_json(file, "ratios of MagCache")
                if info["model_hash"] == key[0]:  # those of a model that was trained further are measured anew
                    self.measured[key] = [float(ratio) for ratio in info["ratios"]]
        return self.measured.get(key)

    def _keep(self, ratios: list[float], run: RunContext, denoiser: nn.Module) -> None:
        model_hash = hash_module(denoiser)
        self.measured[model_hash, run.solver, run.num_steps] = ratios
        if (file := self._file(run)) is not None:
            try:
                write_json(file, {"model_hash": model_hash, "ratios": ratios})
            except PermissionError as error:  # a shipped or shared system: generation goes on all the same
                _log.warning("%s: the ratios of MagCache are kept for this process alone", error)

    def _file(self, run: RunContext) -> Path | None:
        return self._directory and self._directory / f"magcache_{run.solver}_{run.num_steps}.json"
