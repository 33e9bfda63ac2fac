"""Change curves of a denoiser's layers: recorded once without caching, then read by the policies."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foley.accel.cost import EvaluationMacs
from foley.accel.signature import RunSignature
from foley.accel.storage import load_record, save_record


def calibration_stem(directory: Path, solver: str, num_steps: int | str) -> Path:
    """Where the calibration of one solver and step count lies: `<directory>/<solver>_<steps>`, without extension."""
    return directory / f"{solver}_{num_steps}"


def calibration_directory(checkpoint: str | Path) -> Path:
    """`calibration/` inside a system directory, or beside a checkpoint file."""
    path = Path(checkpoint).expanduser()
    return (path.parent if path.is_file() else path) / "calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """`mean` and `std` over prompts, `[layers, distances, evaluations]`: the change since `distance` evaluations ago.

    Entry `[i, k - 1, s]` compares evaluation s with evaluation s - k; entries with s < k are zero and mean nothing.
    `timesteps` are those of the evaluations; `macs` are counted at the duration and batch size of the calibration, and
    their proportions are what matters.
    """

    mean: Tensor
    std: Tensor
    layer_names: tuple[str, ...]
    layer_kinds: tuple[str, ...]
    signature: RunSignature
    num_prompts: int
    timesteps: tuple[float, ...]
    macs: EvaluationMacs

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each layer, in order of execution."""
        return dict(zip(self.layer_names, self.layer_kinds, strict=True))

    def changes(self) -> dict[str, list[float]]:
        """Per layer, the mean change since the previous evaluation (AudioCache, eq. 1)."""
        return dict(zip(self.layer_names, self.mean[:, 0].tolist(), strict=True))

    def at(self, num_steps: int, timesteps: Sequence[float]) -> "Calibration":
        """For a run of another number of steps: the differences of the cumulative curves between its evaluations.

        So a fine calibration serves a coarser run. Changes that turn back add up all the same, so that errors are
        rather too large than too small. The standard deviations are not known: NaN. Raises ValueError where timesteps
        do not fall from one evaluation to the next, as those of a second-order solver do not.
        """
        own, asked = -np.asarray(self.timesteps), -np.asarray(timesteps)  # ascending, as interpolation wants them
        if (np.diff(own) <= 0).any() or (np.diff(asked) <= 0).any():
            raise ValueError(
                f"the calibration of solver {self.signature.solver!r} cannot be read at other steps: its timesteps do "
                "not fall steadily; calibrate for the number of steps that you sample with"
            )
        curves = self.mean[:, 0].double().cumsum(dim=1).numpy()
        positions = torch.from_numpy(np.stack([np.interp(asked, own, curve) for curve in curves]))
        mean = torch.zeros(*self.mean.shape[:2], len(asked))
        for distance in range(1, mean.shape[1] + 1):
            mean[:, distance - 1, distance:] = positions[:, distance:] - positions[:, :-distance]
        signature = replace(self.signature, num_steps=num_steps, num_evaluations=len(asked))
        std = torch.full_like(mean, torch.nan)
        return replace(self, mean=mean, std=std, signature=signature, timesteps=tuple(timesteps))

    def errors(self, max_lookahead: int) -> dict[str, list[list[float]]]:
        """Per layer, at `[k - 1][s]`, the mean change from evaluation s to s + k, for k up to `max_lookahead`.

        Raises:
            ValueError: the calibration did not record as many distances.
        """
        recorded = self.mean.shape[1]
        if not 1 <= max_lookahead <= recorded:
            raise ValueError(f"max_lookahead must be between 1 and the {recorded} recorded, got {max_lookahead}")
        return {
            name: [curves[k - 1, k:].tolist() for k in range(1, max_lookahead + 1)]
            for name, curves in zip(self.layer_names, self.mean, strict=True)
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
        save_record(stem, {"mean": self.mean, "std": self.std}, info)

    @classmethod
    def load(cls, stem: Path) -> "Calibration":
        """Read what `save` wrote; raises as `load_record` does, and ValueError where an earlier version wrote it."""
        tensors, info = load_record(stem)
        if "macs" not in info:
            raise ValueError(f"{stem}.json was written by an earlier version; make it again with scripts/calibrate.py")
        return cls(
            mean=tensors["mean"],
            std=tensors["std"],
            layer_names=tuple(info["layer_names"]),
            layer_kinds=tuple(info["layer_kinds"]),
            signature=RunSignature(**info["signature"]),
            num_prompts=info["num_prompts"],
            timesteps=tuple(info["timesteps"]),
            macs=EvaluationMacs(**info["macs"]),
        )
