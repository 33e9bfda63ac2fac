"""Change curves of a denoiser's layers: recorded once without caching, kept, and read by the caches that follow them.

How much the output of a layer changes from one evaluation to the next hardly depends on the prompt (AudioCache, Fig. 3;
SmoothCache, Fig. 2). So a few prompts tell, once and for all, where a model can reuse what it has computed.
`CalibrationRecorder` records the curves, `Calibration` holds them (`foley.accel.caching.curves`), `CalibratedCache`
turns them into a schedule.
"""

import shlex
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from foley.accel.caching.curves import ALL_LAYERS, OBJECTIVES, Calibration
from foley.accel.caching.layer_cache import CacheOptions, LayerCache, replaced_forwards
from foley.accel.caching.prediction_calibration import PredictionCovariance
from foley.accel.caching.reuse import ReuseChoice, reuse_name
from foley.accel.caching.schedule import CacheSchedule, RunSignature, refuse_changing
from foley.accel.cost import MacCounter
from foley.accel.layers import CacheableLayer, Forward, find_cacheable_layers, output_tensors
from foley.core.config import default_cache_dir, hub_name, published_name
from foley.core.files import info_path
from foley.core.hashing import is_compiled
from foley.core.locks import RunThread
from foley.core.logs import get_logger
from foley.core.numbers import COUNT, check_choice
from foley.diffusion.context import Accelerator, RunContext, StepContext

CALIBRATE = ("auto", "never")
_log = get_logger(__name__)

Source = Mapping[str, str | None]
"""The options by which scripts/calibrate.py knows a model."""

SOME_SYSTEM: Source = MappingProxyType({"system": "SYSTEM"})


def calibration_stem(directory: Path, solver: str, num_steps: int | str) -> Path:
    """Where the calibration of one solver and step count lies: `<directory>/<solver>_<steps>`, without extension."""
    return directory / f"{solver}_{num_steps}"


def calibration_directory(system: str | Path, cache_dir: str | Path | None = None) -> Path:
    """`calibration/` inside a system directory, beside a checkpoint file, or in `cache_dir` under a published name.

    What the hub has under OWNER/NAME lies there under OWNER--NAME.
    """
    if (name := published_name(system) or hub_name(system)) is not None:
        return Path(cache_dir or default_cache_dir()).expanduser() / name.replace("/", "--") / "calibration"
    path = Path(system).expanduser()
    return (path.parent if path.is_file() else path) / "calibration"


@dataclass(frozen=True)
class WantedCurves:
    """The run that curves are wanted for: its model's hash, solver, number of steps and guidance scale.

    >>> WantedCurves("hash of the model", "ddim", 25, 4.5).name
    'ddim_25_w4.5'
    """

    model_hash: str
    solver: str
    num_steps: int
    guidance_scale: float
    objective: str = "change"

    @property
    def name(self) -> str:
        """Of the files that are made where no others serve."""
        return f"{self.solver}_{self.num_steps}_w{self.guidance_scale:g}"

    def served_by(self, calibration: Calibration | PredictionCovariance) -> bool:
        """Whether it was made for just such a run."""
        run = {name: value for name, value in asdict(self).items() if name != "objective"}
        knows = self.objective == "change" or getattr(calibration, "sensitivity", None) is not None
        return knows and all(getattr(calibration.signature, name) == value for name, value in run.items())


Kept = TypeVar("Kept", Calibration, PredictionCovariance)


def homes(directory: Path, wanted: WantedCurves, prefix: str = "") -> tuple[Path, Path]:
    """Stems of what is made where no others serve: beside the system, and in the cache folder."""
    cache = Path(default_cache_dir()).expanduser() / "calibration" / wanted.model_hash[:16]
    return directory / f"{prefix}{wanted.name}", cache / f"{prefix}{wanted.name}"


def find_kept(load: Callable[[Path], Kept], stems: Iterable[Path], wanted: WantedCurves) -> Kept | None:
    """The first that is of just such a run; what is damaged is warned of and left."""
    for stem in (stem for stem in stems if info_path(stem).is_file()):
        try:
            calibration = load(stem)
        except (ValueError, FileNotFoundError) as error:
            _log.warning("%s: it is made anew", error)
            continue
        if wanted.served_by(calibration):
            return calibration
    return None


def keep(calibration: Kept, homes: tuple[Path, Path]) -> Path:
    """Write it beside the system, or into the cache folder where that cannot be written; returns where."""
    beside, in_cache = homes
    try:
        calibration.save(beside)
    except OSError:  # read-only
        calibration.save(in_cache)
        return info_path(in_cache)
    return info_path(beside)


def relative_change(current: Tensor, previous: Tensor, whole_batch: bool = False) -> Tensor:
    """`|current - previous|_1 / |current|_1` of each item of a batch, `[B]` (AudioCache, eq. 1).

    0 where both are silent, as the output of a layer that starts at zero is. With `whole_batch` the norms are over the
    batch, and all items have its one ratio.
    """
    kept = 0 if whole_batch else 1
    # [B, N, D] to [B] or []; summed in float32, since half precision would lose the small terms of a long sum.
    difference = (current - previous).flatten(kept).abs().sum(dim=-1, dtype=torch.float32)
    size = current.flatten(kept).abs().sum(dim=-1, dtype=torch.float32)
    return (difference / size.clamp_min(torch.finfo(torch.float32).tiny)).expand(len(current))


def _joined(output: Any) -> Tensor:
    """A layer's tensors as one: the change of joint attention is that of all it returns, `[B, N D + M D]`."""
    if isinstance(output, Tensor):
        return output
    return torch.cat([tensor.flatten(1) for tensor in output_tensors(output)], dim=1)


class CalibrationRecorder:
    """An accelerator that speeds nothing up: it lets every layer compute and records how much the output changes.

    Keeps the last `max_distance` outputs of each layer and branch. Runs may differ in batch size; each item of a batch
    is one prompt, over whose guidance branches the change is averaged. A run that breaks off is left out. The
    multiply-accumulates are those of the last run's first evaluation.

    Args:
        max_distance: how many outputs are kept, which is the largest lookahead of SmoothCache.
        whole_batch: record one ratio for the batch that a layer sees, guidance branches included, as published code
            does; a loud item then weighs more than a quiet one, and the curves depend on what shares a batch.

    Example: see `foley.accel.caching.audiocache.AudioCache`.
    """

    def __init__(self, max_distance: int = 3, whole_batch: bool = False) -> None:
        self._max_distance = max_distance
        self._whole_batch = whole_batch
        self._layers: list[CacheableLayer] = []
        self._denoiser: nn.Module | None = None
        self._signature: RunSignature | None = None
        self._timesteps: tuple[float, ...] = ()
        self._macs = MacCounter()
        self._num_prompts = 0  # of the finished runs, and the sums of their curves and of the squares of these
        self._sums, self._squares = torch.zeros(2, 0, dtype=torch.float64)
        self._context: StepContext | None = None
        self._thread = RunThread()
        self._forget_run()

    def _forget_run(self) -> None:
        self._history: dict[tuple[str, int], deque[Tensor]] = {}  # by branch and layer, oldest output first
        self._totals = torch.zeros(0)  # summed over guidance branches, [layers, distances, evaluations, B]
        self._counts = torch.zeros(0)  # of those branches, [layers, evaluations]

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Watch the cacheable layers of `denoiser` inside the context; raises as `LayerCache.attach` does."""
        layers = find_cacheable_layers(denoiser)
        with ExitStack() as stack:
            stack.enter_context(replaced_forwards(denoiser, layers, self._recording_forward, self._counting_forward))
            if is_compiled(denoiser):  # around the layers: recording changes at each evaluation, and a graph with it
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._layers, self._denoiser = layers, denoiser
            try:
                yield
            finally:
                self._denoiser = None
                self._forget_run()
                self._thread.end()

    def _recording_forward(self, index: int, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._thread.check()
            output = self._macs.call(index, original, *args, **kwargs)
            self._record(index, _joined(output).detach())
            return output

        return forward

    def _counting_forward(self, index: int, original: Forward) -> Forward:
        """Of what feeds a layer alone, whose cost is the layer's."""
        return lambda *args, **kwargs: self._macs.call(index, original, *args, **kwargs)

    def _record(self, index: int, output: Tensor) -> None:
        if self._context is None:
            raise RuntimeError("a CalibrationRecorder is attached, but the sampler does not call it as a callback")
        evaluation, batch_size = self._context.evaluation, self._context.run.batch_size
        self._totals = self._totals.to(output.device)  # stays there for the run: to read it would wait for the device
        history = self._history.setdefault((self._context.branch, index), deque(maxlen=self._max_distance))
        for distance, previous in enumerate(reversed(history)):  # the newest first: distance 1 is index 0
            change = relative_change(output, previous, self._whole_batch)  # of a joint batch, [branches * B]
            self._totals[index, distance, evaluation] += change.reshape(-1, batch_size).sum(dim=0)
        self._counts[index, evaluation] += output.shape[0] // batch_size  # 1, or 2 of a joint batch
        history.append(output)  # beyond `max_distance`, the oldest falls out

    def on_run_start(self, run: RunContext) -> None:
        """Raises RuntimeError if nothing is attached, SignatureMismatchError if runs of two kinds would be mixed.

        And ValueError where guidance begins or ends on the way.
        """
        refuse_changing(run)
        if self._denoiser is None:
            raise RuntimeError("CalibrationRecorder has no denoiser: generate inside its `attach(denoiser)` context")
        self._thread.begin()
        signature = RunSignature.of(run, self._denoiser)
        if self._signature is not None:
            self._signature.require(signature, "the calibration recorded so far")
        self._signature = signature
        self._timesteps = tuple(run.timesteps.tolist())
        self._forget_run()
        self._totals = torch.zeros(len(self._layers), self._max_distance, run.num_evaluations, run.batch_size)
        self._counts = torch.zeros(len(self._layers), run.num_evaluations)

    def on_evaluation_start(self, context: StepContext) -> None:
        self._context = context
        if context.evaluation == 0:
            self._macs = MacCounter()  # anew in each run: the last one counts
            self._macs.start()

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        self._context = None
        self._macs.stop()

    def on_run_end(self) -> None:
        if not self._thread.is_own():
            return  # that of another thread goes on; this one was refused
        self._macs.stop()
        # Every layer has computed at every evaluation, or else the run broke off.
        if self._counts.numel() and (self._counts > 0).all():
            # The mean over branches: [layers, distances, evaluations, B].
            curves = (self._totals.cpu() / self._counts[:, None, :, None]).double()
            started = self._num_prompts > 0
            self._sums = curves.sum(dim=-1) + (self._sums if started else 0)
            self._squares = curves.square().sum(dim=-1) + (self._squares if started else 0)
            self._num_prompts += curves.shape[-1]
        self._context = None
        self._forget_run()
        self._thread.end()

    def calibration(self, dtype: torch.dtype = torch.float32) -> Calibration:
        """The curves over all prompts of the finished runs; raises RuntimeError if there is none."""
        if self._signature is None or not self._num_prompts:
            raise RuntimeError("no generation has run to its end under this recorder: there is nothing to average")
        mean = self._sums / self._num_prompts
        spread = (self._squares / self._num_prompts - mean**2).clamp_min(0).sqrt()
        return Calibration(
            mean=mean.to(dtype),
            std=spread.to(dtype),  # of these prompts, not an estimate of others
            layer_names=tuple(layer.name for layer in self._layers),
            layer_kinds=tuple(layer.kind for layer in self._layers),
            signature=self._signature,
            num_prompts=self._num_prompts,
            timesteps=self._timesteps,
            macs=self._macs.evaluation([layer.name for layer in self._layers]),
        )


class CalibratedOptions(CacheOptions, total=False):
    """What every policy takes beside its own options, `reuse` and where its curves lie, see `CalibratedCache`."""

    calibrated_steps: int | None
    source: Source
    calibrate: str
    objective: str


class CalibratedCache(LayerCache, ABC):
    """A cache whose schedule follows from a calibration: a policy says in `decide` what is computed.

    Args:
        calibration_dir: holds `<solver>_<steps>.json` and `.safetensors`, as scripts/calibrate.py writes them.
        policy: name and parameters, as the schedule records them.
        reuse, options: as `LayerCache` takes them; where layers are `shared`, one schedule is made of their mean curve.
        calibrated_steps: take the calibration of that many steps, and read its cumulative curves at this run's steps.
        source: of the model, for the message where there is no calibration.
        calibrate: "auto" lets whoever generates make the curves that are missing (`foley.generation.calibrating`);
            "never" refuses to run without them.
        objective: "change" is how much a layer changes, as in the papers; "sensitivity" how far its reuse moves the
            latent (`foley.accel.caching.sensitivity`), which is what thresholds and sums are of then.
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        policy: Mapping[str, Any],
        reuse: ReuseChoice = "hold",
        calibrated_steps: int | None = None,
        source: Source = SOME_SYSTEM,
        calibrate: str = "never",
        objective: str = "change",
        **options: Unpack[CacheOptions],
    ) -> None:
        super().__init__(reuse=reuse, **options)
        if calibrated_steps is not None:
            COUNT.check("calibrated_steps", calibrated_steps)
        check_choice("accel.calibrate", calibrate, CALIBRATE)
        check_choice("accel.objective", objective, OBJECTIVES)
        self.calibrates = calibrate == "auto"
        self.objective = objective
        self._directory = Path(calibration_dir)
        self._calibrated_steps = calibrated_steps
        self._source = source
        self._adopted: Calibration | None = None
        chosen = {} if objective == "change" else {"objective": objective}
        self._policy = {**policy, "reuse": reuse_name(reuse), **chosen, **self.constraints.changed()}

    @abstractmethod
    def decide(self, calibration: Calibration) -> Mapping[str, Sequence[bool]]:
        """For each layer, in order of execution, at which evaluations it computes; the first must be one of them.

        `calibration` is read at the evaluations of the run already.
        """

    def schedule_for(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule:
        """What the policy makes of the calibration of the run's solver and number of steps.

        Raises:
            FileNotFoundError: there is none.
            SignatureMismatchError: it is another model's.
        """
        signature = RunSignature.of(run, denoiser)
        calibration = self._calibration_for(run, signature)
        if self.constraints.shared:
            row = self.decide(calibration.joint().by(self.objective))[ALL_LAYERS]
            rows = dict.fromkeys(calibration.layer_names, row)
        else:
            rows = dict(self.decide(calibration.by(self.objective)))
        return CacheSchedule.from_rows(rows, calibration.kinds, signature, self._policy)

    def wanted(self, model_hash: str, solver: str, num_steps: int, guidance_scale: float) -> WantedCurves:
        """The curves that this cache reads in such a run."""
        return WantedCurves(model_hash, solver, self._calibrated_steps or num_steps, guidance_scale, self.objective)

    def find(self, wanted: WantedCurves) -> Calibration | None:
        """Curves of just such a run, those of scripts/calibrate.py first; what is damaged is warned of and left."""
        by_hand = calibration_stem(self._directory, wanted.solver, wanted.num_steps)
        return find_kept(Calibration.load, (by_hand, *homes(self._directory, wanted)), wanted)

    def keep(self, calibration: Calibration, wanted: WantedCurves) -> Path:
        """Write it beside the system, or into the cache folder where that cannot be written; returns where."""
        return keep(calibration, homes(self._directory, wanted))

    def recorder(self) -> CalibrationRecorder:
        """What makes the curves."""
        return CalibrationRecorder()

    def adopt(self, calibration: Calibration) -> None:
        """Take these curves for the runs that they serve, whatever lies in the folder."""
        self._adopted = calibration

    def _calibration_for(self, run: RunContext, signature: RunSignature) -> Calibration:
        wanted = self.wanted(signature.model_hash, run.solver, run.num_steps, run.guidance_scale)
        stem = calibration_stem(self._directory, wanted.solver, wanted.num_steps)
        if self._adopted is not None and wanted.served_by(self._adopted):
            calibration = self._adopted
        else:
            self.require_calibration(run.solver, run.num_steps, run.guidance_scale)
            calibration = Calibration.load(stem)
        if self._calibrated_steps not in (None, run.num_steps):
            calibration = calibration.at(run.num_steps, run.timesteps.tolist())
        calibration.signature.require(signature, f"the calibration {stem}")
        return calibration

    def require_calibration(self, solver: str | None, num_steps: int | None, guidance_scale: float | None) -> None:
        """Raises FileNotFoundError where no calibration can serve such a run; what is None is not known yet."""
        steps = self._calibrated_steps or num_steps
        # What is not known yet may be anything.
        file = info_path(calibration_stem(self._directory, solver or "*", steps or "*"))
        if any(self._directory.glob(file.name)):
            return
        # The pipelines of diffusers keep their own solver.
        named = None if solver is None or solver.endswith("Scheduler") else solver
        named, _, eta = (named or "").partition("_eta")  # as `foley.diffusion.solver.solver_label` joins them
        scale = None if guidance_scale is None else f"{guidance_scale:g}"
        options = {"solver": named, "eta": eta, "prompts": "FILE", "steps": steps, "guidance_scale": scale}
        given = {**self._source, **options, "output_dir": self._directory}  # those of the script
        command = shlex.join(f"{key}={value}" for key, value in given.items() if value not in (None, ""))
        raise FileNotFoundError(
            f"{file} does not exist: this system is not calibrated for this solver and number of steps. "
            f"Make it with: python scripts/calibrate.py {command}"
        )


def calibrated_caches(accelerator: Accelerator | None) -> list[Any]:
    """Those that `Combined` holds, or the accelerator itself: each `CalibratedCache`, and what adopts as they do."""
    parts = getattr(accelerator, "accelerators", (accelerator,))
    return [part for part in parts if hasattr(part, "adopt")]


def require_calibrations(
    accelerator: Accelerator, solver: str | None, num_steps: int | None, guidance_scale: float | None
) -> None:
    """Raises FileNotFoundError where the accelerator, or one of those that it combines, lacks its calibration.

    The model need not be loaded for that. What is None is not known yet. One that calibrates by itself lacks nothing.
    """
    for cache in calibrated_caches(accelerator):
        if not cache.calibrates:
            cache.require_calibration(solver, num_steps, guidance_scale)
