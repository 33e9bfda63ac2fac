"""Lets one hear a codec or a vocoder in training: originals and reconstructions side by side."""

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from foley.reporting.audio_files import write_wav
from foley.training.adversarial import AdversarialTraining


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
                write_wav(files[-1], audio[0], rate)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_audio("reconstructions", [str(file) for file in files], step=trainer.global_step)
