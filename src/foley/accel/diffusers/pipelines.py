"""Accelerators on the pipelines of diffusers, which run their own loops: told of the run from the denoiser's calls."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from inspect import signature
from pathlib import Path
from threading import current_thread
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from foley.accel.caching.calibration import CalibrationRecorder, calibration_stem
from foley.accel.layers import Forward, entry_of, replaced
from foley.core.config import CONFIG_DIR, compose_aside
from foley.core.hashing import uncompiled
from foley.core.locks import sole_user
from foley.diffusion.context import Accelerator, RunContext, StepContext

_NEAREST = 0.005  # of all training steps: how far a timestep that was scaled in half precision may be off


@contextmanager
def accelerate(
    pipeline: Any, accelerator: str | Accelerator, guidance_scale: float | None = None, **options: Any
) -> Iterator[list[Accelerator]]:
    """Every generation of an image, video or audio pipeline of diffusers runs under `accelerator` inside the context.

        with accelerate(pipeline, "fora", interval=2):
            pipeline("a dog in the snow")

    Args:
        pipeline: has a `scheduler`, and denoisers called `transformer` or `unet` (Wan 2.2 has two); each gets an
            accelerator of its own, and the context gives the list of them.
        accelerator: one, or a name as `accel=` takes it: "fora", "audiocache", ...
        guidance_scale: recorded with schedules and calibrations; where it is None, what the pipeline says of its call.
        options: of a named accelerator, as its config has them. Calibrated policies want `calibration_dir`, where
            `calibrate` has put the curves.

    Raises:
        ValueError: the pipeline has no such denoiser; the name or an option is not known.

    As `accelerated` otherwise.
    """
    made = _by_name(accelerator, pipeline, options) if isinstance(accelerator, str) else accelerator
    if made is accelerator and options:
        raise ValueError(f"{', '.join(options)}: options belong to a name; this accelerator is made already")
    # Copies: an accelerator stands before one denoiser at a time.
    with _each_under(pipeline, lambda: deepcopy(made), guidance_scale) as accelerators:
        yield accelerators


@contextmanager
def calibrate(
    pipeline: Any, calibration_dir: str | Path, guidance_scale: float | None = None, max_distance: int = 3
) -> Iterator[CalibrationRecorder]:
    """Record how much each layer of the pipeline's denoiser changes while it generates inside the context, uncached.

        with calibrate(pipeline, "curves"):
            pipeline(prompts, num_inference_steps=50)
        with accelerate(pipeline, "audiocache", calibration_dir="curves", threshold=0.2):
            pipeline("a dog in the snow", num_inference_steps=50)

    The curves are of one solver and number of steps, and are written as the context ends without an error.

    Raises:
        ValueError: the pipeline has several denoisers, of which each sees a part of a run.
        RuntimeError: nothing was generated to its end.
    """
    names = list(denoisers_of(pipeline))
    if len(names) > 1:
        raise ValueError(
            f"{type(pipeline).__name__} has several denoisers ({', '.join(names)}), of which each runs a part of the "
            "evaluations; curves are recorded of one that runs them all. Take fora or prediction"
        )
    with _each_under(pipeline, lambda: CalibrationRecorder(max_distance), guidance_scale) as recorders:
        yield recorders[0]
    calibration = recorders[0].calibration()  # its last run ended with the context
    made = calibration.signature
    calibration.save(calibration_stem(Path(calibration_dir), made.solver, made.num_steps))


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """By name; raises ValueError for a pipeline that has none."""
    # Pipelines may register None for a denoiser that they do without, such as Wan's second.
    components: dict[str, Any] = pipeline.components
    found = {
        name: part
        for name, part in components.items()
        if name.startswith(("transformer", "unet")) and isinstance(part, nn.Module)
    }
    if not found:
        raise ValueError(
            f"{type(pipeline).__name__} has no denoiser called transformer or unet among {', '.join(components)}; "
            "take `foley.accel.diffusers.pipelines.accelerated` with its denoiser and scheduler"
        )
    return found


@contextmanager
def _each_under(pipeline: Any, make: Callable[[], Any], guidance_scale: float | None) -> Iterator[list[Any]]:
    # Asked for as a run begins: the pipeline learns it from its call, within the context.
    def scale() -> float:
        return _guidance_scale(pipeline) if guidance_scale is None else guidance_scale

    with ExitStack() as stack:
        accelerators = []
        for denoiser in denoisers_of(pipeline).values():
            accelerators.append(make())
            stack.enter_context(_driven(denoiser, _Driver(denoiser, pipeline.scheduler, scale, accelerators[-1])))
        yield accelerators


def _guidance_scale(pipeline: Any) -> float:
    """What the pipeline keeps of its call, or, where it keeps nothing, what it takes by itself."""
    default = signature(type(pipeline).__call__).parameters.get("guidance_scale")
    kept = getattr(pipeline, "_guidance_scale", None)
    return float(kept if kept is not None else 1.0 if default is None else default.default)


def _by_name(name: str, pipeline: Any, options: dict[str, Any]) -> Accelerator:
    # The two left out choose among the others by a system's folder, which a pipeline has not.
    known = sorted(
        file.stem for file in (CONFIG_DIR / "accel").glob("*.yaml") if file.stem not in ("auto", "calibrated")
    )
    if name not in known:
        raise ValueError(f"no accelerator is called {name!r}; there are {', '.join(known)}")
    config: DictConfig = compose_aside(f"accel/{name}").accel
    unknown = [option for option in options if option not in config]
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}; it has {', '.join(map(str, config))}")
    if "calibration_dir" in config:
        if "calibration_dir" not in options:
            raise ValueError(f"{name} wants calibration_dir=FOLDER, with curves that `foley.accel.calibrate` put there")
        config.calibration_dir = str(options.pop("calibration_dir"))  # in the place of a system's folder
        config.calibrate, config.source = "never", {"system": type(pipeline).__name__}
    accelerator: Accelerator = instantiate(OmegaConf.merge(config, options))
    return accelerator


@contextmanager
def accelerated(denoiser: nn.Module, scheduler: Any, guidance_scale: float, accelerator: Accelerator) -> Iterator[None]:
    """Every generation of a pipeline inside the context runs under `accelerator`; all is as before on any exit.

        with accelerated(pipeline.transformer, pipeline.scheduler, 7.0, Fora(interval=2)):
            pipeline("a dog barks", guidance_scale=7.0)

    The scheduler's timesteps tell one generation from the next, and its step index, or else the timestep's value, one
    evaluation from the next; pipelines may scale the timestep as they like. Guidance branches run as one joint batch,
    or one after the other: then each is a branch of its own, by the name that the pipeline gives it (`cache_context`)
    or else in order of the calls. A batch whose halves or thirds are the same latents is a joint one.
    `on_evaluation_end` is given the prediction before guidance. Another thread that enters waits until this one leaves.

    Args:
        denoiser: the pipeline's `transformer` or `unet`, compiled or not.
        scheduler: the pipeline's.
        guidance_scale: as the pipeline is called with; recorded, no more.

    Raises:
        RuntimeError: the denoiser is accelerated already; within the context, where another thread calls it.
        ValueError: within the context, where it is called at a timestep that the scheduler does not have.
    """
    with _driven(denoiser, _Driver(denoiser, scheduler, lambda: guidance_scale, accelerator)):
        yield


@contextmanager
def _driven(denoiser: nn.Module, driver: "_Driver") -> Iterator[None]:
    model = uncompiled(denoiser)
    entry = entry_of(denoiser)
    with ExitStack() as stack:
        # Undone from the last to the first: what was replaced, the run, the attachment.
        stack.enter_context(sole_user(model))
        if isinstance(getattr(vars(denoiser).get(entry), "__self__", None), _Driver):
            raise RuntimeError(
                "the denoiser is accelerated already; make one accelerator of several with `Combined.of`"
            )
        stack.enter_context(driver.accelerator.attach(denoiser))
        stack.callback(driver.end_run)
        driver.forward = stack.enter_context(replaced(denoiser, entry, driver.evaluate))
        if hasattr(model, "cache_context"):
            driver.cache_context = stack.enter_context(replaced(model, "cache_context", driver.named))
        yield


class _Driver:
    def __init__(
        self, denoiser: nn.Module, scheduler: Any, guidance_scale: Callable[[], float], accelerator: Accelerator
    ) -> None:
        self.accelerator = accelerator
        self.forward: Forward = denoiser.forward  # that of the denoiser under its accelerator
        self.cache_context: Callable[..., Any] | None = None  # the denoiser's own
        names = list(signature(type(uncompiled(denoiser)).forward).parameters)[1:]
        self._time_position = names.index("timestep") if "timestep" in names else 1
        self._scheduler = scheduler
        self._guidance_scale = guidance_scale
        self._thread = current_thread()
        self._name: str | None = None  # that the pipeline gives to the present call
        self._run: RunContext | None = None  # None between generations
        self._rows = 0  # of the run's first call
        self._evaluation = -1  # the last that the accelerator was told of
        self._calls: Counter[str] = Counter()  # at that evaluation, by branch

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward: tells the accelerator of the evaluation before it and after it."""
        if current_thread() is not self._thread:
            raise RuntimeError(
                f"the denoiser is accelerated in thread {self._thread.name!r}, and {current_thread().name!r} calls it; "
                "enter the context in each thread that generates: they take turns"
            )
        # Transformers call it `hidden_states`, U-Nets `sample`: [rows, C, ...].
        sample = args[0] if args else kwargs[_first_of(kwargs, "hidden_states", "sample")]
        # One number, or one for each row and all the same.
        timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[self._time_position])
        context = self._context(sample, timestep.flatten()[0])
        self.accelerator.on_evaluation_start(context)
        # What runs here is the denoiser as the accelerator has left it: it was attached before this took its place.
        output = self.forward(*args, **kwargs)
        # A tuple, or an output class that reads as one.
        prediction = output if isinstance(output, Tensor) else output[0]
        self.accelerator.on_evaluation_end(context, prediction)
        return output

    @contextmanager
    def named(self, name: str, **kwargs: Any) -> Iterator[None]:
        """`cache_context` of diffusers, with which pipelines name the branch that they call: "cond", "uncond"."""
        assert self.cache_context is not None
        self._name = name
        try:
            with self.cache_context(name, **kwargs):
                yield
        finally:
            self._name = None

    def end_run(self) -> None:
        """Tell the accelerator, where a run was begun."""
        if self._run is not None:
            # First, so that a second call, after an error in the accelerator's own, does nothing.
            self._run = None
            self.accelerator.on_run_end()

    def _context(self, sample: Tensor, timestep: Tensor) -> StepContext:
        evaluation = self._index(timestep)
        # `set_timesteps` makes a new tensor, so that every generation has one of its own; or else it begins anew.
        if self._run is None or self._run.timesteps is not self._scheduler.timesteps or evaluation < self._evaluation:
            self.end_run()
            self._begin_run(sample)
        assert self._run is not None
        if evaluation != self._evaluation:
            # Branches are told apart within an evaluation alone: order starts anew.
            self._evaluation, self._calls = evaluation, Counter()
        return StepContext(evaluation, self._run.timesteps[evaluation], self._run, self._branch(len(sample)))

    def _branch(self, rows: int) -> str:
        branch = "joint" if self._name in (None, "cond_uncond") else str(self._name)
        if rows != self._rows:  # guidance that ends before the run does: what was kept is of other rows
            branch += f" of {rows}"
        self._calls[branch] += 1
        return branch if self._calls[branch] == 1 else f"{branch} {self._calls[branch]}"

    def _begin_run(self, sample: Tensor) -> None:
        scheduler = self._scheduler
        num_steps = getattr(scheduler, "num_inference_steps", None) or len(scheduler.timesteps)
        # A rescale (0 here) is the pipeline's own affair: it follows the evaluation.
        known = type(scheduler).__name__, num_steps, scheduler.timesteps, self._guidance_scale(), 0.0
        log_snr = _log_snr(scheduler)
        weights = None if log_snr is None else _clean_weights(scheduler, log_snr)
        adds_noise = weights is not None and _adds_noise(scheduler)
        levels: dict[str, Any] = {"log_snr": log_snr, "clean_weights": weights, "adds_noise": adds_noise}
        self._run = RunContext(*known, _items(sample), **levels)
        self._rows, self._evaluation = len(sample), -1
        self.accelerator.on_run_start(self._run)

    def _index(self, timestep: Tensor) -> int:
        # Exact, and known without waiting for the device; before the first step it is where the pipeline begins.
        for name in ("step_index", "begin_index"):
            index = getattr(self._scheduler, name, None)
            if index is not None:
                return int(index)
        return self._by_value(float(timestep))

    def _by_value(self, value: float) -> int:
        """Of schedulers without an index; of several evaluations at one timestep, the next."""
        # In double, for integer timesteps and those of half precision are compared alike.
        timesteps = self._scheduler.timesteps.double().cpu()
        matches: list[int] = (timesteps == value).nonzero().flatten().tolist()
        if matches:
            return next((match for match in matches if match > self._evaluation), matches[0])
        total = self._scheduler.config.get("num_train_timesteps", 1000)
        # Divided by the number of training steps (Flux), counted up from the noise (Lumina), or both.
        for scaled in (value * total, total - value, total * (1 - value)):
            nearest = int((timesteps - scaled).abs().argmin())
            if abs(timesteps[nearest] - scaled) <= _NEAREST * total:
                return nearest
        raise ValueError(
            f"timestep {value:g} is none of the {len(timesteps)} of the scheduler "
            f"({type(self._scheduler).__name__}): give `accelerated` the scheduler that the pipeline uses"
        )


def _first_of(kwargs: dict[str, Any], *names: str) -> str:
    return next(name for name in names if name in kwargs)


def _items(sample: Tensor) -> int:
    """How many items a batch `[rows, ...]` holds: guidance in one joint batch repeats them, twice or three times."""
    # Three where a text and an image guide apart, as in InstructPix2Pix.
    for branches in (2, 3):
        parts = sample.chunk(branches)
        if len(sample) % branches == 0 and all(torch.equal(parts[0], part) for part in parts[1:]):
            return len(parts[0])
    return len(sample)


def _log_snr(scheduler: Any) -> Tensor | None:
    """Of each evaluation, `[E]`; None where the scheduler hides its noise levels."""
    timesteps = scheduler.timesteps.double().cpu()
    if "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        sigmas = timesteps / scheduler.config.num_train_timesteps  # x = (1 - sigma) data + sigma noise
        return 2 * ((1 - sigmas) / sigmas).log()
    if scheduler.config.get("sigma_data") == 1:  # Stable Audio's: sigma over data of variance 1
        return -2 * scheduler.sigmas[: len(timesteps)].double().cpu().log()
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    signal = scheduler.alphas_cumprod.double().cpu()
    below = timesteps.floor().long().clamp(0, len(signal) - 1)  # solvers in sigma space evaluate between two
    above = (below + 1).clamp(max=len(signal) - 1)
    known = (signal / (1 - signal)).log()
    return torch.where(timesteps == below, known[below], torch.lerp(known[below], known[above], timesteps - below))


def _clean_weights(scheduler: Any, log_snr: Tensor) -> Tensor | None:
    """As `RunContext` holds them, of the denoiser's own input, alpha data + sigma noise with squares that sum to 1."""
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    # Of the noisy input and of the prediction.
    weights = {"v_prediction": (alpha, -sigma), "epsilon": (1 / alpha, -sigma / alpha)}
    found = weights.get(scheduler.config.get("prediction_type"))
    is_flow = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas")
    # Of pure noise, epsilon says nothing about the clean latent.
    return None if found is None or is_flow or not found[1].isfinite().all() else torch.stack(found, dim=1)


def _adds_noise(scheduler: Any) -> bool:
    """Whether the scheduler draws noise at each step, by its name or its algorithm's."""
    names = type(scheduler).__name__, str(scheduler.config.get("algorithm_type"))
    return any(sign in name for name in names for sign in ("DDPM", "Ancestral", "SDE", "sde", "CosineDPM"))
