"""How far the generated latent moves when a layer is reused: what a schedule costs, rather than what a layer changes.

A layer may change much where nothing follows from it, and little where everything does. Let J(s, i) be the derivative
of the final latent with respect to the output of layer i at evaluation s, through all that comes after, and d(s, i, k)
the difference that reusing its output of k evaluations ago makes there. Then J d is how far the latent moves, to first
order. Its length follows from products with random vectors: E (v' J d)^2 = |J d|^2 for standard normal v, and v' J of
all layers and evaluations at once is one pass backwards through the run. Each item of a batch has a v of its own.

Layers that are reused at the same evaluation hear nothing of each other. So one more row is kept, of all layers
together: the difference of the denoiser's whole output is taken as it is, and only what follows to first order.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foley.accel.caching.layer_cache import replaced_forwards
from foley.accel.caching.schedule import refuse_changing
from foley.accel.layers import CacheableLayer, Forward, find_cacheable_layers
from foley.core.seeding import torch_generator
from foley.diffusion.context import RunContext, StepContext

_any_function: Any = torch.autograd.Function  # which declares no types


class _Evaluation(_any_function):  # type: ignore[misc]
    """The denoiser as one node of the run's graph: nothing of its inside is kept."""

    @staticmethod
    def forward(ctx: Any, noisy: Tensor, root: Tensor, evaluate: Forward, pull_back: Callable[[Tensor], Tensor]) -> Any:
        ctx.pull_back = pull_back
        return evaluate(noisy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # The root is there so that the first evaluation is gone back to as well; nothing depends on its gradient.
        return ctx.pull_back(gradient), torch.zeros(()), None, None


class SensitivityRecorder:
    """An accelerator that speeds nothing up: it goes back through a finished run and records what reuse would do.

    After each generation the caller hands over its latent, `on_latent`. That takes about five times as long as the
    generation, and the memory of one evaluation with its gradient. Of a solver of any kind: a run is differentiated as
    it was. A denoiser is to return one tensor, and its layers too.

    Args:
        max_distance: reuse of outputs up to so many evaluations old.
        num_probes: random vectors for each item.

    Example:
        >>> from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
        >>> from foley.diffusion.process import DiffusionProcess
        >>> from foley.diffusion.sampler import generate_latents
        >>> from foley.diffusion.solver import Solver
        >>> from foley.models.dit.model import DiffusionTransformer
        >>> from foley.nn.adaln import AdaLNSola
        >>> denoiser = DiffusionTransformer(4, 16, 2, 2, 8, AdaLNSola(rank=2, alpha=2)).eval()
        >>> text = Conditioning(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
        >>> guidance, solver, recorder = ClassifierFreeGuidance(3.0), Solver("ddim", 4), SensitivityRecorder()
        >>> process = DiffusionProcess("v")
        >>> latent = generate_latents(denoiser, process, text, text, [0], 20, guidance, solver, recorder)
        >>> recorder.on_latent(latent)
        >>> recorder.sensitivity().shape  # layers and all together, distances, evaluations
        torch.Size([10, 3, 4])
    """

    def __init__(self, max_distance: int = 3, num_probes: int = 2) -> None:
        self._max_distance, self._num_probes = max_distance, num_probes
        self._denoiser: nn.Module | None = None  # while attached
        self._layers: list[CacheableLayer] = []
        self._evaluation: int | None = None  # None outside of one, and in this recorder's own calls
        self._sums = torch.zeros(0)  # of squares over items and probes, [layers + 1, distances, evaluations]
        self._count = 0  # of those
        self._probe = 0
        self._forget_run()

    def _forget_run(self) -> None:
        self._root = torch.zeros((), requires_grad=True)  # what a run is differentiated by
        self._calls: list[tuple[Tensor, Forward] | None] = []  # of each evaluation, its latent and the rest of the call
        self._outputs: dict[int, list[Tensor]] = {}  # of the layers, and last of the denoiser, at some evaluations
        self._batch_size = 0
        self._seen: dict[int, Tensor] | None = None  # outputs of the layers, while they are wanted
        self._held: list[Tensor] | None = None  # what layers return instead

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Watch `denoiser` inside the context; raises as `LayerCache.attach` does."""
        layers = find_cacheable_layers(denoiser)
        with ExitStack() as stack:
            stack.enter_context(replaced_forwards(denoiser, layers, self._watching_forward))
            stack.callback(vars(denoiser).pop, "forward")
            denoiser.forward = self._recorded_forward(denoiser.forward)
            self._denoiser, self._layers = denoiser, layers
            yield

    def _watching_forward(self, index: int, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._held is not None:
                return self._held[index]
            output = original(*args, **kwargs)
            if self._seen is not None:
                self._seen[index] = output
            return output

        return forward

    def _recorded_forward(self, original: Forward) -> Forward:
        def forward(noisy: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._evaluation is None:
                return original(noisy, *args, **kwargs)

            def evaluate(noisy: Tensor) -> Any:
                return original(noisy, *args, **kwargs)

            self._calls[self._evaluation] = noisy.detach(), evaluate
            pull_back = partial(self._pull_back, self._evaluation)
            return _Evaluation.apply(noisy, self._root, evaluate, pull_back)

        return forward

    def on_run_start(self, run: RunContext) -> None:
        """Raises RuntimeError where nothing is attached, and ValueError where guidance begins or ends on the way."""
        if self._denoiser is None:
            raise RuntimeError("SensitivityRecorder has no denoiser: generate inside its `attach(denoiser)` context")
        refuse_changing(run)
        self._forget_run()
        self._calls = [None] * run.num_evaluations
        self._batch_size = run.batch_size
        torch.set_grad_enabled(True)  # the sampler's loop runs without

    def on_evaluation_start(self, context: StepContext) -> None:
        self._evaluation = context.evaluation

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        self._evaluation = None

    def on_run_end(self) -> None:
        self._evaluation = None
        torch.set_grad_enabled(False)

    def on_latent(self, latent: Tensor) -> None:
        """Go back through the run that gave `latent` `[B, C, L]`.

        Raises RuntimeError where that was another one, or began in the middle.
        """
        if self._denoiser is None or None in self._calls or not latent.requires_grad:
            raise RuntimeError("SensitivityRecorder wants the latent of a whole run that it was attached to")
        shape = len(self._layers) + 1, self._max_distance, len(self._calls)
        if self._sums.shape != shape:
            self._sums, self._count = torch.zeros(shape, dtype=torch.float64), 0
        # Relative to each item's own length: [B, 1, 1].
        scale = 1 / latent.detach().flatten(1).norm(dim=1)[:, None, None]
        with replaced_forwards(self._denoiser, self._layers, self._watching_forward):
            for _ in range(self._num_probes):
                generator = torch_generator("sensitivity", self._probe)
                probe = scale * torch.randn(latent.shape, generator=generator).to(latent.device, latent.dtype)
                # What is wanted is recorded on the way back, evaluation by evaluation, so no graph of a run is kept.
                torch.autograd.grad(latent, self._root, probe, retain_graph=True)
                self._outputs.clear()
                self._probe, self._count = self._probe + 1, self._count + self._batch_size
        self._forget_run()

    def sensitivity(self) -> Tensor:
        """`[layers + 1, distances, evaluations]`: how far the latent moves where one layer is reused once.

        That is the relative L2 distance, root mean square over items, of an output so many evaluations old; the last
        row is of all layers reused at once.

        Raises RuntimeError where no run has been recorded.
        """
        if not self._count:
            raise RuntimeError("no latent was handed to this recorder: there is nothing to average")
        return (self._sums / self._count).sqrt().float()

    def _pull_back(self, evaluation: int, gradient: Tensor) -> Tensor:
        """The gradient by an evaluation's latent, from that by its prediction; records what all layers' would do."""
        noisy, evaluate = self._call(evaluation)
        with torch.enable_grad():
            noisy = noisy.requires_grad_()
            outputs = self._evaluate(evaluate, noisy)
            by_noisy, *by_outputs = torch.autograd.grad(outputs[-1], [noisy, *outputs], gradient)
        distances = range(1, min(self._max_distance, evaluation) + 1)
        for distance in distances:
            earlier = self._outputs_at(evaluation - distance)
            # All layers at once: what they do together is taken as it is, and only what follows to first order.
            self._held = earlier
            held = evaluate(noisy.detach())  # all layers reused
            self._held = None
            pairs = zip([*earlier[:-1], held], outputs, by_outputs, strict=True)
            moves = torch.stack([self._move(old, new.detach(), slope) for old, new, slope in pairs])  # [layers + 1, B]
            self._sums[:, distance - 1, evaluation] += moves.double().square().sum(dim=1).cpu()
        self._outputs.pop(evaluation, None)  # the way back does not come here again
        return by_noisy

    def _move(self, old: Tensor, new: Tensor, slope: Tensor) -> Tensor:
        """`v' J d` of each item, `[B]`, over its guidance branches."""
        products: Tensor = ((old - new) * slope).reshape(-1, self._batch_size, *new.shape[1:])  # [branches, B, ...]
        return products.transpose(0, 1).flatten(1).sum(dim=1)

    def _outputs_at(self, evaluation: int) -> list[Tensor]:
        if evaluation not in self._outputs:
            noisy, evaluate = self._call(evaluation)
            with torch.no_grad():
                self._outputs[evaluation] = self._evaluate(evaluate, noisy)
        return self._outputs[evaluation]

    def _evaluate(self, evaluate: Forward, noisy: Tensor) -> list[Tensor]:
        """Outputs of the layers, and last of the denoiser."""
        self._seen = {}
        prediction = evaluate(noisy)
        seen, self._seen = self._seen, None
        return [*(seen[index] for index in range(len(self._layers))), prediction]

    def _call(self, evaluation: int) -> tuple[Tensor, Forward]:
        call = self._calls[evaluation]
        assert call is not None
        return call[0].detach(), call[1]
