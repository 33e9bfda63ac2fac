"""Lets one hear a run: fixed prompts with fixed noise, generated after validation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import soundfile
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from foley.checkpoint import load_trained
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.sampler import sample
from foley.diffusion.solver import Solver
from foley.seeding import torch_generator


class AudioSamples(pl.Callback):
    """Writes a WAV and a spectrogram for each prompt, and a table of them to W&B where that is the logger.

    The weights are those of validation: the averaged ones. A module without text (stage 1) has nothing to say.

    Args:
        codec_path: component directory or training checkpoint of the codec; loaded at the first use.
        output_dir: receives `step_000123/00_<prompt>.wav` and `.png`.
        prompts: what to generate; the noise of prompt i depends on `seed` and i only.
        num_frames: latent length L.
        every_n_validations: generate at every n-th validation.
    """

    def __init__(
        self,
        codec_path: str,
        output_dir: str,
        prompts: Sequence[str],
        num_frames: int,
        guidance: ClassifierFreeGuidance,
        solver: Solver,
        every_n_validations: int = 1,
        seed: int = 0,
    ) -> None:
        self.codec_path = Path(codec_path)
        self.output_dir = Path(output_dir)
        self.prompts = list(prompts)
        self.num_frames = num_frames
        self.guidance = guidance
        self.solver = solver
        self.every_n_validations = every_n_validations
        self.seed = seed
        self._codec: Any = None
        self._validations = 0

    # Callbacks' `on_validation_epoch_end` comes before the averaged weights are swapped out in `on_validation_end`.
    @rank_zero_only
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validations += 1
        if trainer.sanity_checking or pl_module.text is None or (self._validations - 1) % self.every_n_validations:
            return
        audio = self.generate(pl_module)
        folder = self.output_dir / f"step_{trainer.global_step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        files = [self._write(folder, index, item[0]) for index, item in enumerate(audio)]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log_table(logger, files, trainer.global_step)

    @torch.no_grad()
    def generate(self, module: Any) -> Tensor:
        """Audio `[len(prompts), 1, T]` in [-1, 1] from the module's present weights."""
        device = module.device
        if self._codec is None:
            self._codec = load_trained(self.codec_path, "codec")
        text = module.text([*self.prompts, ""])
        conditioning = Conditioning(text.embeddings[:-1], text.mask[:-1])
        unconditional = Conditioning(text.embeddings[-1:], text.mask[-1:])
        shape = (module.denoiser.latent_channels, self.num_frames)
        generators = [torch_generator("sample", self.seed, index) for index in range(len(self.prompts))]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        scheduler = self.solver.build(module.process)
        latent = sample(
            self.guidance.wrap(module.denoiser, conditioning, unconditional),
            noise,
            scheduler,
            self.solver.run_context(scheduler, self.guidance, len(noise)),
            generators=generators,
        )
        audio: Tensor = self._codec.to(device).decode(module.normaliser.denormalise(latent))
        return audio.clamp(-1, 1).cpu()

    def _write(self, folder: Path, index: int, waveform: Tensor) -> Path:
        name = re.sub(r"[^a-z0-9]+", "_", self.prompts[index].lower())[:40]
        path = folder / f"{index:02d}_{name}.wav"
        soundfile.write(path, waveform.numpy(), self._codec.sample_rate_hz)
        figure = Figure(figsize=(6, 3))
        axes = figure.subplots()
        axes.specgram(waveform.numpy() + 1e-7, NFFT=512, noverlap=384, Fs=self._codec.sample_rate_hz)
        axes.set(title=self.prompts[index], xlabel="seconds", ylabel="Hz")
        figure.savefig(path.with_suffix(".png"), bbox_inches="tight")
        return path

    def _log_table(self, logger: WandbLogger, files: Sequence[Path], step: int) -> None:
        import wandb  # slow to import, and of no use to the other loggers

        rows = [
            [prompt, wandb.Audio(str(file)), wandb.Image(str(file.with_suffix(".png")))]
            for prompt, file in zip(self.prompts, files, strict=True)
        ]
        logger.log_table("samples", columns=["caption", "audio", "spectrogram"], data=rows, step=step)
