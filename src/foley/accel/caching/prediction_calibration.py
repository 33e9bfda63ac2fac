"""How alike predictions are at different evaluations: recorded once, kept, and what optimal plans are made of.

As the change curves of layers (`foley.accel.caching.calibration`), it hardly depends on the prompt, so that a few tell.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from foley.accel.caching.schedule import CHANGING_GUIDANCE, RunSignature, refuse_changing
from foley.core.files import info_path, load_record, save_record
from foley.core.reading import reading
from foley.diffusion.context import RunContext, StepContext


def extrapolates_clean(run: RunContext, quantity: str) -> bool:
    """Whether "auto", "prediction" or "clean" is the clean latent in this run; "auto" takes it where noise is added.

    Raises ValueError for "clean" in a loop that does not say what its noise levels are.
    """
    if quantity == "clean" and run.clean_weights is None:
        raise ValueError("accel.quantity=clean: this loop does not say what its noise levels are; take prediction")
    return quantity == "clean" or (quantity == "auto" and run.adds_noise)


@dataclass(frozen=True, eq=False)
class PredictionCovariance:
    """`covariance [E, E]`: the mean product of the predictions of two evaluations over prompts, of mean square 1."""

    covariance: Tensor
    signature: RunSignature
    num_prompts: int

    def save(self, stem: Path) -> None:
        """Write `<stem>.safetensors` and `<stem>.json`."""
        info = {"signature": asdict(self.signature), "num_prompts": self.num_prompts}
        save_record(stem, {"covariance": self.covariance}, info)

    @classmethod
    def load(cls, stem: Path) -> "PredictionCovariance":
        """Read what `save` wrote; raises FileNotFoundError where there is none, ValueError where it is damaged."""
        mend = "remove it, and it is made again"
        with reading(info_path(stem), "a calibration of predictions", mend):
            tensors, info = load_record(stem)
            return cls(tensors["covariance"], RunSignature(**info["signature"]), info["num_prompts"])


class CovarianceRecorder:
    """An accelerator that speeds nothing up: it keeps the predictions of each run, and sums up their products.

    Runs may differ in batch size, each item is one prompt. A run that breaks off or begins in the middle is left out.

    Args:
        quantity: "prediction", "clean" or "auto", see `extrapolates_clean`.
    """

    def __init__(self, quantity: str = "auto") -> None:
        self._quantity = quantity
        self._noisy: Tensor | None = None
        self._denoiser: nn.Module | None = None
        self._signature: RunSignature | None = None
        self._predictions: list[Tensor] = []  # of this run, by evaluation, [B, N] each
        self._evaluation = -1  # that of the last of them
        self._sum = torch.zeros((), dtype=torch.float64)
        self._num_prompts = 0

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        self._denoiser = denoiser
        try:
            yield
        finally:
            self._denoiser = None

    def graph_pattern(self) -> str:
        """Nothing happens inside of the denoiser."""
        return "plain"

    def on_run_start(self, run: RunContext) -> None:
        """Raises SignatureMismatchError if runs of two kinds would be mixed, ValueError as `refuse_changing` does."""
        assert self._denoiser is not None
        refuse_changing(run)
        signature = RunSignature.of(run, self._denoiser)
        if self._signature is not None:
            self._signature.require(signature, "the predictions recorded so far")
        self._signature, self._predictions, self._evaluation = signature, [], -1

    def on_evaluation_start(self, context: StepContext) -> None:
        pass

    def forecast(self, context: StepContext, noisy: Tensor) -> None:
        """None: only looks on."""
        self._noisy = noisy

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        if extrapolates_clean(context.run, self._quantity):
            assert context.run.clean_weights is not None
            assert self._noisy is not None
            of_noisy, of_prediction = context.run.clean_weights[context.evaluation].tolist()
            prediction = of_noisy * self._noisy + of_prediction * prediction
        rows = prediction.flatten(1).float()
        if context.evaluation == self._evaluation:  # another guidance branch: more items, as in a joint batch
            rows = torch.cat([self._predictions.pop(), rows])
        self._evaluation = context.evaluation
        self._predictions.append(rows)

    def on_run_end(self) -> None:
        """Raises ValueError where a pipeline has begun or ended its guidance on the way."""
        predictions, self._predictions = self._predictions, []
        # A run that broke off, or began in the middle, has gaps in its covariance.
        if self._signature is not None and len(predictions) == self._signature.num_evaluations:
            if len({len(rows) for rows in predictions}) > 1:
                raise ValueError(CHANGING_GUIDANCE)
            runs = torch.stack(predictions, dim=1)  # [B, E, N]
            size = runs.square().mean(dim=(1, 2), keepdim=True).sqrt()
            # A loud prompt counts as a quiet one, and a silent one, as of a denoiser that starts at zero, as nothing.
            runs = runs / size.clamp_min(torch.finfo(size.dtype).tiny)
            products = torch.einsum("ben,bfn->ef", runs, runs) / runs.shape[2]
            self._sum = self._sum + products.cpu().double()
            self._num_prompts += len(runs)

    def calibration(self) -> PredictionCovariance:
        """Over all prompts of the finished runs; raises RuntimeError if there is none."""
        if self._signature is None or not self._num_prompts:
            raise RuntimeError("no generation has run to its end under this recorder: there is nothing to average")
        return PredictionCovariance(self._sum / self._num_prompts, self._signature, self._num_prompts)
