"""Which layer is computed at which evaluation of a run, and for which run that holds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foley.core.files import load_record, save_record
from foley.core.hashing import hash_module
from foley.core.logs import get_logger
from foley.core.numbers import COUNT, NumberRange
from foley.diffusion.context import RunContext

_logger = get_logger(__name__)

_NUMBER = NumberRange(least=0, whole=True)

# What must agree; of another guidance scale a warning is enough.
_DECISIVE_FIELDS = ("model_hash", "solver", "num_steps", "num_evaluations")


CHANGING_GUIDANCE = (
    "guidance that begins or ends on the way makes no calibration, whose evaluations must be alike: make it with "
    "guidance throughout (guidance=default) and the same guidance_scale, which serves such a run too"
)


def refuse_changing(run: RunContext) -> None:
    """Raises ValueError where guidance begins or ends on the way: calibrations are of runs in which it does not."""
    if run.branches is not None:
        raise ValueError(CHANGING_GUIDANCE)


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

    def having(self, compute: Tensor) -> "CacheSchedule":
        """The same with another table."""
        return replace(self, compute=compute)

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


@dataclass(frozen=True)
class Constraints:
    """What holds of a schedule whatever the policy decides; by default nothing, as in the papers.

    Policies take them into account, so that they go on from a computation that is asked for here; `enforced` makes any
    other table meet them. They count evaluations, of which Heun's solvers have two a step.

    Args:
        shared: all layers compute at the same evaluations; layers reused at different moments disturb each other.
        max_reuses: the most reuses of one output in a row; None is no limit.
        warmup: this many evaluations at the beginning compute.
        cooldown: this many at the end.
        always_compute: and these, by their numbers: the mask of steps.

    Example:
        >>> Constraints(max_reuses=2, cooldown=1).next_due(0, num_evaluations=8)
        3
        >>> Constraints(warmup=2, always_compute=(5,)).next_due(1, num_evaluations=8)
        5
    """

    shared: bool = False
    max_reuses: int | None = None
    warmup: int = 1
    cooldown: int = 0
    always_compute: Sequence[int] = ()

    def __post_init__(self) -> None:
        COUNT.check("accel.warmup", self.warmup)
        _NUMBER.check("accel.cooldown", self.cooldown)
        if self.max_reuses is not None:
            _NUMBER.check("accel.max_reuses", self.max_reuses)
        object.__setattr__(self, "always_compute", tuple(self.always_compute))  # a config brings a list of its own
        for evaluation in self.always_compute:
            _NUMBER.check("accel.always_compute", evaluation)

    def check(self, num_evaluations: int) -> None:
        """Raises ValueError where the run has no such evaluation."""
        beyond = [evaluation for evaluation in self.always_compute if evaluation >= num_evaluations]
        if beyond:
            raise ValueError(
                f"accel.always_compute names evaluation {beyond[0]}, but this run has {num_evaluations}, counted from 0"
            )

    def next_due(self, last: int, num_evaluations: int) -> int:
        """The latest evaluation at which a layer that computed at `last` computes again; their number for none."""
        due = [evaluation for evaluation in self.always_compute if evaluation > last]
        due += [last + 1] * (last + 1 < self.warmup) + [num_evaluations]
        due += [max(last + 1, num_evaluations - self.cooldown)]
        due += [] if self.max_reuses is None else [last + 1 + self.max_reuses]
        return min(min(due), num_evaluations)

    def enforced(self, compute: Tensor) -> Tensor:
        """The table `[evaluations, layers]` with the computations added that are missing."""
        compute = compute.any(dim=1, keepdim=True).expand_as(compute).clone() if self.shared else compute.clone()
        for column in compute.T:  # views: written to in place
            last = 0
            for evaluation in range(1, len(compute)):
                if column[evaluation] or evaluation == self.next_due(last, len(compute)):
                    column[evaluation], last = True, evaluation
        return compute

    def changed(self) -> dict[str, Any]:
        """Those that are not as in the papers, for records."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(UNCONSTRAINED, name)}


UNCONSTRAINED = Constraints()
