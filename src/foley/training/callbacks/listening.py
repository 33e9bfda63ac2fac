"""Callbacks that let one hear a run at validation: fixed prompts with fixed noise, or a codec's reconstructions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from foley.accel.precision import choose_precision, computing_in
from foley.core.files import sample_stem
from foley.core.logs import get_logger
from foley.core.rates import clip_size
from foley.data.audio import write_wav
from foley.diffusion.consistency import Consistency, ConsistencySolver
from foley.diffusion.context import Accelerator
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.sampler import embed, generate_latents
from foley.diffusion.solver import Solver, default_solver
from foley.models.text import StoredText
from foley.reporting.plots import draw_spectrogram
from foley.system.checkpoint import load_trained
from foley.training.adversarial import AdversarialTraining
from foley.training.diffusion import LatentTraining

_log = get_logger(__name__)


class AudioSamples(pl.Callback):
    """Writes a WAV and a spectrogram for each prompt, to W&B too where that is the logger.

    The weights are those of validation: the averaged ones. Prompt i has the seed `seed + i`, with which sample.py makes
    the same clip, whichever process of the run makes it: all share in the work, and the first one writes. A module that
    takes no captions (stage 1, a codec) has nothing to say and is left in peace.

    Args:
        codec_path: component directory or training checkpoint of the codec; loaded at the first use. None, with a
            warning, leaves the run silent.
        output_dir: receives `step_000123/000_<prompt>_seed0.wav` and `.png`.
        prompts: what to generate, unless `num_captions` finds other words.
        duration_seconds: length of each clip.
        num_steps: of the solver that fits the module's process; a student in training samples in two steps.
        every_n_validations: generate at the first validation and at every n-th after it.
        batch_size: clips generated at a time.
        num_captions: so many captions of the validation split, the first different ones, take the place of `prompts`
            where the data has them.
    """

    def __init__(
        self,
        codec_path: str | None,
        output_dir: str,
        prompts: Sequence[str],
        duration_seconds: float,
        guidance: ClassifierFreeGuidance,
        num_steps: int = 25,
        every_n_validations: int = 1,
        seed: int = 0,
        batch_size: int = 16,
        num_captions: int = 0,
    ) -> None:
        self.codec_path = None if codec_path is None else Path(codec_path)
        self.output_dir = Path(output_dir)
        self.prompts = list(prompts)
        self.duration_seconds = duration_seconds
        self.guidance = guidance
        self.num_steps = num_steps
        self.every_n_validations = every_n_validations
        self.batch_size = batch_size
        self.seed = seed
        self.num_captions = num_captions
        self.accelerator: Accelerator | None = None
        self._codec: Any = None
        self._validations = 0

    @property
    def seeds(self) -> range:
        """One for each prompt."""
        return range(self.seed, self.seed + len(self.prompts))

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.prompts = _captions(trainer, self.num_captions) or self.prompts
        if self.codec_path is None:
            _log.warning("no audio samples: they need the codec that made the latents; set codec_path=...")
        elif not takes_captions(pl_module):
            _log.warning("no audio samples: this %s takes no captions", type(pl_module).__name__)
        elif isinstance(pl_module.text, StoredText) and trainer.is_global_zero:
            pl_module.text(self.prompts)  # an encoder that has to be loaded for some of them is missed now, or never

    # Callbacks' `on_validation_epoch_end` comes before the averaged weights are swapped out in `on_validation_end`.
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.codec_path is None or not self._due(trainer, pl_module):
            return
        own = shared_out(len(self.prompts), trainer.global_rank, trainer.world_size)
        audio = self.generate(pl_module, self.codec_path, own)
        if trainer.world_size > 1:
            gathered = cast(Tensor, pl_module.all_gather(audio.to(pl_module.device)))
            audio = in_order(gathered, len(self.prompts)).cpu()
        if not trainer.is_global_zero:
            return
        if not bool(audio.isfinite().all()):
            _log.warning("step %d: no audio samples, for they are not finite", trainer.global_step)
            return
        self._publish(trainer, pl_module, audio)

    def _due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Count this validation, and say whether samples are wanted of it."""
        if trainer.sanity_checking or not takes_captions(pl_module):
            return False
        self._validations += 1
        return (self._validations - 1) % self.every_n_validations == 0

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, audio: Tensor) -> None:
        """Do what there is to do with `audio [len(prompts), channels, T]`."""
        folder = self.output_dir / f"step_{trainer.global_step:06d}"
        files = [self._write(folder, index, clip) for index, clip in enumerate(audio)]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log_media(logger, files, trainer.global_step)

    @torch.no_grad()
    def generate(self, module: Any, codec_path: Path, chosen: Sequence[int] | None = None) -> Tensor:
        """Audio `[N, channels, T]` of the `chosen` prompts, or all, from the module's present weights, on the CPU."""
        own = range(len(self.prompts)) if chosen is None else chosen
        parts = [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]
        return torch.cat([self._generate(module, codec_path, part) for part in parts])

    def _generate(self, module: Any, codec_path: Path, part: Sequence[int]) -> Tensor:
        if self._codec is None:
            self._codec = load_trained(codec_path, "codec")
        codec = self._codec.to(module.device)
        num_samples, num_frames = clip_size(self.duration_seconds, codec.sample_rate_hz, codec.hop_samples)
        guidance, solver = self._method(module)
        # Validation has ended, and with it the autocast of the trainer.
        with computing_in(choose_precision("auto", module.device), module.device, autocast=True):
            latent = generate_latents(
                module.denoiser,
                module.process,
                embed(module.text, [self.prompts[index] for index in part]),
                embed(module.text, [""]),
                [self.seeds[index] for index in part],
                num_frames,
                guidance,
                solver,
                self.accelerator,
                device=module.device,
            )
        audio: Tensor = codec.decode(module.normaliser.denormalise(latent))
        return audio[..., :num_samples].cpu()

    def _method(self, module: Any) -> tuple[ClassifierFreeGuidance, Solver]:
        """How the module samples: a student as `TextToAudio` lets it, in two steps."""
        student: Consistency | None = getattr(module, "consistency", None)
        if student is None:
            return self.guidance, Solver(default_solver(module.process), self.num_steps)
        nearest = ClassifierFreeGuidance(student.nearest_scale(self.guidance.scale))
        return student.guidance(nearest), ConsistencySolver(consistency=student)

    def _write(self, folder: Path, index: int, clip: Tensor) -> Path:
        path = folder / f"{sample_stem(self.prompts[index], index, self.seeds[index])}.wav"
        write_wav(path, clip, self._codec.sample_rate_hz)
        draw_spectrogram(path.with_suffix(".png"), clip, self._codec.sample_rate_hz)
        return path

    def _log_media(self, logger: WandbLogger, files: Sequence[Path], step: int) -> None:
        """Sounds and spectrograms under their prompts; not in a table, whose files W&B keeps in the home folder."""
        logger.log_audio("samples", [str(file) for file in files], step=step, caption=self.prompts)
        images = [str(file.with_suffix(".png")) for file in files]
        logger.log_image("spectrograms", images, step=step, caption=self.prompts)


def shared_out(count: int, rank: int, world_size: int) -> list[int]:
    """Which of `count` clips a process makes. All make equally many, as sharded weights want it: the first ones twice.

    >>> shared_out(5, 0, 2), shared_out(5, 1, 2)
    ([0, 2, 4], [1, 3, 0])
    """
    return [place % count for place in range(rank, -(-count // world_size) * world_size, world_size)]


def in_order(gathered: Tensor, count: int) -> Tensor:
    """The `count` clips of the shares of all processes, `[processes, share, channels, T]`, in order and each once."""
    return gathered.transpose(0, 1).flatten(0, 1)[:count]


def _captions(trainer: pl.Trainer, num_captions: int) -> list[str]:
    """The first different captions of the validation split; none where the data does not list them."""
    datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
    different: dict[str, None] = {}
    for entry in getattr(datasets.get("val"), "entries", ()):
        if len(different) == num_captions:  # no further: there may be millions
            break
        different.update(dict.fromkeys([entry.caption] if entry.caption else []))
    return list(different)


def takes_captions(module: pl.LightningModule) -> bool:
    return isinstance(module, LatentTraining) and module.text is not None and module.prompt_field == "caption"


class Reconstructions(pl.Callback):
    """After each validation, writes the pairs that the module kept as WAV files, and to W&B where that is a logger.

    Args:
        output_dir: receives `step_000123/00_original.wav` and `00_reconstruction.wav`.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not isinstance(pl_module, AdversarialTraining):
            return
        rate = pl_module.sample_rate_hz
        if rate is None:
            return
        folder = self.output_dir / f"step_{trainer.global_step:06d}"
        files = []
        for index, pair in enumerate(pl_module.examples):
            for kind, audio in zip(("original", "reconstruction"), pair, strict=True):
                files.append(folder / f"{index:02d}_{kind}.wav")
                write_wav(files[-1], audio, rate)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_audio("reconstructions", [str(file) for file in files], step=trainer.global_step)
