"""The conditions under which change curves and cache schedules hold, and the refusal of any other."""

from dataclasses import dataclass

from torch import nn

from foley.diffusion.types import RunContext
from foley.hashing import hash_module
from foley.logs import get_logger

_logger = get_logger(__name__)
_DECISIVE_FIELDS = ("model_hash", "solver", "num_steps", "num_evaluations")


class SignatureMismatchError(ValueError):
    """A schedule or calibration made for another model, solver or number of steps."""


@dataclass(frozen=True)
class RunSignature:
    """What a generation was run with. The guidance scale is recorded, but another one is no reason to refuse."""

    model_hash: str
    solver: str
    num_steps: int
    num_evaluations: int
    guidance_scale: float

    @classmethod
    def of(cls, run: RunContext, denoiser: nn.Module) -> "RunSignature":
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
                "Run scripts/calibrate.py with this run's ckpt, solver and steps."
            )
        if self.guidance_scale != actual.guidance_scale:
            _logger.warning(
                "%s was made with guidance_scale %g; this run uses %g",
                subject,
                self.guidance_scale,
                actual.guidance_scale,
            )
