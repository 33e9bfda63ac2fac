"""What a calibration found: how much each layer changes from one evaluation to the next, and what its reuse does."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foley.accel.caching.schedule import RunSignature
from foley.accel.cost import EvaluationMacs
from foley.core.files import info_path, load_record, save_record
from foley.core.reading import reading

ALL_LAYERS = "all"
"""The one layer of `Calibration.joint`."""
OBJECTIVES = ("change", "sensitivity")


@dataclass(frozen=True, eq=False)
class Calibration:
    """`mean` and `std` over prompts, `[layers, distances, evaluations]`: the change since `distance` evaluations ago.

    Entry `[i, k - 1, s]` compares evaluation s with evaluation s - k; entries with s < k are zero and mean nothing.
    `timesteps` are those of the evaluations; `macs` are counted at the duration and batch size of the calibration, and
    their proportions are what matters.

    Example:
        Of two layers over four evaluations, the attention settles and the feed-forward layer does not.

        >>> mean = torch.tensor([[[0.0, 0.4, 0.2, 0.1]], [[0.0, 0.5, 0.5, 0.5]]])  # [layers, distances, evaluations]
        >>> names, kinds = ("0.attention", "0.feed_forward"), ("attention", "feed_forward")
        >>> signature = RunSignature("hash of the model", "ddim", num_steps=4, num_evaluations=4, guidance_scale=3.0)
        >>> macs = EvaluationMacs(total=100, layers={"0.attention": 30, "0.feed_forward": 60})
        >>> times = (999.0, 749.0, 499.0, 249.0)
        >>> calibration = Calibration(mean, torch.zeros_like(mean), names, kinds, signature, 8, times, macs)

        Read at two steps instead of four, the change from the first to the third evaluation is the sum of two.

        >>> coarse = calibration.at(num_steps=2, timesteps=(999.0, 499.0))
        >>> [round(change, 3) for change in coarse.changes()["0.attention"]]
        [0.0, 0.6]
    """

    mean: Tensor
    std: Tensor
    layer_names: tuple[str, ...]
    layer_kinds: tuple[str, ...]
    signature: RunSignature
    num_prompts: int
    timesteps: tuple[float, ...]
    macs: EvaluationMacs
    sensitivity: Tensor | None = None  # [layers + 1, distances, evaluations], of `SensitivityRecorder`

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each layer, in order of execution."""
        return dict(zip(self.layer_names, self.layer_kinds, strict=True))

    @classmethod
    def merged(cls, parts: Iterable["Calibration"]) -> "Calibration":
        """Of the prompts of all `parts`, one or more, of which one at a time is looked at.

        Parts in float64 lose nothing: it is the calibration of all their prompts at once. Raises SignatureMismatchError
        for parts of different kinds of runs.
        """
        remaining = iter(parts)
        first = last = next(remaining)
        total, sums, squares = 0, torch.zeros(1), torch.zeros(1)
        sensitivity: Tensor | None = torch.zeros(1)  # the sum of its squares
        for last in chain([first], remaining):
            first.signature.require(last.signature, "the first part of the calibration")
            mean, std, total = last.mean.double(), last.std.double(), total + last.num_prompts
            sums, squares = sums + last.num_prompts * mean, squares + last.num_prompts * (std**2 + mean**2)
            own = last.sensitivity
            sensitivity = None if own is None or sensitivity is None else sensitivity + last.num_prompts * own**2
        sensitivity = None if sensitivity is None else (sensitivity / total).sqrt()
        mean = sums / total
        std = (squares / total - mean**2).clamp_min(0).sqrt()
        return replace(last, mean=mean.float(), std=std.float(), num_prompts=total, sensitivity=sensitivity)

    def joint(self) -> "Calibration":
        """That of all layers as one, with the mean of their curves and the sum of their multiply-accumulates."""
        macs = EvaluationMacs(self.macs.total, {ALL_LAYERS: sum(self.macs.layers[name] for name in self.layer_names)})
        mean, std = (curves.mean(dim=0, keepdim=True) for curves in (self.mean, self.std))
        sensitivity = None if self.sensitivity is None else self.sensitivity[[-1, -1]]  # of the layer, and of all
        same: dict[str, Any] = {
            "sensitivity": sensitivity,
            "layer_names": (ALL_LAYERS,),
            "layer_kinds": (ALL_LAYERS,),
            "macs": macs,
        }
        return replace(self, mean=mean, std=std, **same)

    def by(self, objective: str) -> "Calibration":
        """With "sensitivity": what a reuse does to the latent in the place of how much a layer changes.

        Raises ValueError where that was not recorded.
        """
        if objective == "change":
            return self
        if self.sensitivity is None:
            raise ValueError(
                "accel.objective=sensitivity: this calibration has none, or was read at another number of steps; make "
                "it with scripts/calibrate.py sensitivity=true for the steps of this run"
            )
        return replace(self, mean=self.sensitivity[:-1], std=torch.full_like(self.mean, torch.nan))

    def changes(self) -> dict[str, list[float]]:
        """Per layer, the mean change since the previous evaluation (AudioCache, eq. 1)."""
        return dict(zip(self.layer_names, self.mean[:, 0].tolist(), strict=True))  # distance 1

    def at(self, num_steps: int, timesteps: Sequence[float]) -> "Calibration":
        """For a run of another number of steps: the differences of the cumulative curves between its evaluations.

        So a fine calibration serves a coarser run. Changes that turn back add up all the same, so that errors are
        rather too large than too small. The standard deviations are not known: NaN. Raises ValueError where timesteps
        do not fall from one evaluation to the next, as those of a second-order solver do not.
        """
        # Negative, so that they ascend, as interpolation wants them: [own evaluations], [asked evaluations].
        own, asked = -np.asarray(self.timesteps), -np.asarray(timesteps)
        if (np.diff(own) <= 0).any() or (np.diff(asked) <= 0).any():
            raise ValueError(
                f"the calibration of solver {self.signature.solver!r} cannot be read at other steps: its timesteps do "
                "not fall steadily; calibrate for the number of steps that you sample with"
            )
        # How far each layer has come since evaluation 0; only sums can be read between evaluations, changes cannot.
        curves = self.mean[:, 0].double().cumsum(dim=1).numpy()  # [layers, own evaluations]
        positions = torch.from_numpy(np.stack([np.interp(asked, own, curve) for curve in curves]))  # [layers, asked]
        mean = torch.zeros(*self.mean.shape[:2], len(asked))  # [layers, distances, asked]
        for distance in range(1, mean.shape[1] + 1):
            mean[:, distance - 1, distance:] = positions[:, distance:] - positions[:, :-distance]
        signature = replace(self.signature, num_steps=num_steps, num_evaluations=len(asked))
        std = torch.full_like(mean, torch.nan)  # no sum of standard deviations is that of the sum
        changed: dict[str, Any] = {"signature": signature, "timesteps": tuple(timesteps), "sensitivity": None}
        return replace(self, mean=mean, std=std, **changed)

    def errors(self, max_lookahead: int) -> dict[str, list[list[float]]]:
        """Per layer, at `[k - 1][s]`, the mean change from evaluation s to s + k, for k up to `max_lookahead`.

        Raises:
            ValueError: the calibration did not record as many distances.
        """
        recorded = self.mean.shape[1]  # distances
        if not 1 <= max_lookahead <= recorded:
            raise ValueError(f"max_lookahead must be between 1 and the {recorded} recorded, got {max_lookahead}")
        # The curves look back: what evaluation s + k says of distance k is the change that begins at s.
        return {
            name: [curves[k - 1, k:].tolist() for k in range(1, max_lookahead + 1)]
            for name, curves in zip(self.layer_names, self.mean, strict=True)  # [distances, evaluations] of each layer
        }

    def save(self, stem: Path) -> None:
        """Write `<stem>.safetensors` and `<stem>.json`."""
        info = {
            "signature": asdict(self.signature),
            "layer_names": self.layer_names,
            "layer_kinds": self.layer_kinds,
            "num_prompts": self.num_prompts,
            "timesteps": self.timesteps,
            "macs": asdict(self.macs),
        }
        sensitivity = {} if self.sensitivity is None else {"sensitivity": self.sensitivity}
        save_record(stem, {"mean": self.mean, "std": self.std, **sensitivity}, info)

    @classmethod
    def load(cls, stem: Path) -> "Calibration":
        """Read what `save` wrote.

        Raises FileNotFoundError where there is none, ValueError where it is damaged or an earlier version wrote it.
        """
        mend = "it may be of an earlier version; make it again with scripts/calibrate.py"
        with reading(info_path(stem), "a calibration", mend):
            tensors, info = load_record(stem)
            return cls(
                mean=tensors["mean"],
                std=tensors["std"],
                layer_names=tuple(info["layer_names"]),
                layer_kinds=tuple(info["layer_kinds"]),
                signature=RunSignature(**info["signature"]),
                num_prompts=info["num_prompts"],
                timesteps=tuple(info["timesteps"]),
                macs=EvaluationMacs(**info["macs"]),
                sensitivity=tensors.get("sensitivity"),
            )
