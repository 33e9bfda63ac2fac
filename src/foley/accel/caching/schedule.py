"""Which layer is computed at which evaluation of a run, and for which run that holds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foley.core.files import load_record, save_record
from foley.core.hashing import hash_module
from foley.core.logs import get_logger
from foley.diffusion.context import RunContext

_logger = get_logger(__name__)

# What must agree; of another guidance scale a warning is enough.
_DECISIVE_FIELDS = ("model_hash", "solver", "num_steps", "num_evaluations")


class SignatureMismatchError(ValueError):
    """A schedule or calibration made for another model, solver or number of steps."""


@dataclass(frozen=True)
class RunSignature:
    """What a generation was run with. The guidance scale is recorded, but another one is no reason to refuse."""

    model_hash: str  # of the weights
    solver: str
    num_steps: int
    num_evaluations: int  # more than steps for Heun's solvers
    guidance_scale: float  # w

    @classmethod
    def of(cls, run: RunContext, denoiser: nn.Module) -> "RunSignature":
        """The signature of a run that is about to begin."""
        return cls(hash_module(denoiser), run.solver, run.num_steps, run.num_evaluations, run.guidance_scale)

    def require(self, actual: "RunSignature", subject: str) -> None:
        """Refuse to use `subject`, made under this signature, in a run of signature `actual`.

        Raises:
            SignatureMismatchError: names every decisive field that differs, with both values.
        """
        differing = [
            f"{field} {getattr(self, field)!r}, but this run has {getattr(actual, field)!r}"
            for field in _DECISIVE_FIELDS
            if getattr(self, field) != getattr(actual, field)
        ]
        if differing:
            raise SignatureMismatchError(
                f"{subject} was made for {'; for '.join(differing)}. "
                "Run scripts/calibrate.py with this run's system, solver and steps."
            )
        if self.guidance_scale != actual.guidance_scale:
            _logger.warning(
                "%s was made with guidance_scale %g; this run uses %g",
                subject,
                self.guidance_scale,
                actual.guidance_scale,
            )


@dataclass(frozen=True, eq=False)
class CacheSchedule:
    """A compute table `[evaluations, layers]` of bool: true computes, false reuses the last computed output.

    `policy` records where the table comes from (name and parameters); nothing depends on it.

    Raises:
        ValueError: the table is not a bool matrix of that shape, or its first evaluation reuses anything.

    Example:
        Two layers over four evaluations; every second call of the attention is reused.

        >>> signature = RunSignature("hash of the model", "ddim", num_steps=4, num_evaluations=4, guidance_scale=3.0)
        >>> rows = {"0.attention": [True, False, True, False], "0.feed_forward": [True] * 4}
        >>> kinds = {"0.attention": "attention", "0.feed_forward": "feed_forward"}
        >>> schedule = CacheSchedule.from_rows(rows, kinds, signature, {"name": "by hand"})
        >>> schedule.compute[1]
        tensor([False,  True])
        >>> schedule.computed_fraction
        0.75
    """

    compute: Tensor  # [evaluations, layers]
    layer_names: tuple[str, ...]  # dotted, in order of execution
    layer_kinds: tuple[str, ...]
    signature: RunSignature
    policy: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = (self.signature.num_evaluations, len(self.layer_names))
        if self.compute.dtype != torch.bool or tuple(self.compute.shape) != expected:
            raise ValueError(
                f"a schedule for {expected[0]} evaluations of {expected[1]} layers needs a bool table of shape "
                f"{expected}, got {self.compute.dtype} {tuple(self.compute.shape)}"
            )
        if len(self.layer_kinds) != len(self.layer_names):
            raise ValueError(f"{len(self.layer_kinds)} layer kinds for {len(self.layer_names)} layer names")
        if not self.compute[0].all():
            reused = self.layer_names[int(self.compute[0].int().argmin())]  # the first that is false
            raise ValueError(f"evaluation 0 reuses {reused!r}, but nothing has been computed yet: it must compute all")

    @classmethod
    def from_rows(
        cls,
        rows: Mapping[str, Sequence[bool]],
        kinds: Mapping[str, str],
        signature: RunSignature,
        policy: Mapping[str, Any],
    ) -> "CacheSchedule":
        """From one list of decisions per layer, in order of execution, and the kind of each layer."""
        # Policies think layer by layer; a run asks evaluation by evaluation: [layers, evaluations] is transposed.
        table = torch.tensor([list(row) for row in rows.values()], dtype=torch.bool).T.contiguous()
        return cls(table, tuple(rows), tuple(kinds[name] for name in rows), signature, policy)

    @property
    def computed_fraction(self) -> float:
        """The share of layer calls that compute, 1 without caching."""
        return self.compute.double().mean().item()  # of calls: layers count alike, whatever their MACs

    def check(self, run: RunContext, denoiser: nn.Module) -> None:
        """Raises SignatureMismatchError if this run has another model, solver or number of steps."""
        self.signature.require(RunSignature.of(run, denoiser), "this cache schedule")

    def save(self, stem: Path) -> None:
        """Write `<stem>.safetensors` and `<stem>.json`."""
        info = {
            "signature": asdict(self.signature),
            "layer_names": self.layer_names,
            "layer_kinds": self.layer_kinds,
            "policy": dict(self.policy),
        }
        save_record(stem, {"compute": self.compute}, info)

    @classmethod
    def load(cls, stem: Path) -> "CacheSchedule":
        """Read what `save` wrote; raises as `load_record` and the constructor do."""
        tensors, info = load_record(stem)
        return cls(
            compute=tensors["compute"],
            layer_names=tuple(info["layer_names"]),  # JSON has lists alone
            layer_kinds=tuple(info["layer_kinds"]),
            signature=RunSignature(**info["signature"]),
            policy=info["policy"],
        )
