"""Clips, a data module over their shards, and a run that logs every batch; also run as a script."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import soundfile
import torch

from foley.data.datamodule import AudioDataModule
from foley.data.dataset import Augmentation
from foley.data.manifest import ManifestEntry
from foley.data.shards_writer import write_shards
from foley.data.splits import shard_splits
from foley.system.checkpoint import FOLEY_KEY
from foley.training.callbacks.checkpointing import PeriodicCheckpoint
from foley.training.checkpoint_io import AtomicCheckpointIO

RATE = 8000
TRAIN, VAL = 45, 7


def write_clips(folder: Path) -> str:
    """Shards of short noises; returns their URL."""
    entries = []
    for index in range(TRAIN + VAL):
        path = folder / f"{index}.wav"
        samples = np.random.default_rng(index).uniform(-0.5, 0.5, 400 + 20 * index)
        soundfile.write(path, samples, RATE)
        entries.append(ManifestEntry(path, f"noise {index}", str(index), split="val" if index >= TRAIN else "train"))
    write_shards(entries, str(folder / "shards"), shard_megabytes=1)
    return str(folder / "shards")


def build_data(url: str, num_workers: int = 2, devices: int = 1) -> AudioDataModule:
    """Batches of four clips on each device."""
    options = {"seed": 3, "augmentation": Augmentation(), "bucket_batches": 4}
    return AudioDataModule(shard_splits(url, RATE), RATE, 0.1, 4 * devices, num_workers, **options)


def digest(batch: dict) -> str:
    """Equal where the batches are, bit for bit."""
    audio, lengths = batch["audio"].numpy(), batch["length_samples"].numpy()
    return hashlib.sha256(audio.tobytes() + lengths.tobytes() + repr(batch["id"]).encode()).hexdigest()


class Recorder(pl.LightningModule):
    """Appends step, digest and ids of every batch to the file of its rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        with (self.folder / f"rank{self.global_rank}.log").open("a") as log:
            log.write(f"{self.global_step} {digest(batch)} {','.join(batch['id'])}\n")
        return self.weight.square()

    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint[FOLEY_KEY] = {}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(url: str, folder: Path, max_steps: int, devices: int = 1) -> None:
    """Train from the last checkpoint in `folder`, where there is one."""
    last = folder / "checkpoints/last.ckpt"
    folder.mkdir(exist_ok=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[PeriodicCheckpoint(str(folder / "checkpoints"), every_n_train_steps=2)],
    )
    resume = last if last.exists() else None
    trainer.fit(Recorder(folder), datamodule=build_data(url, devices=devices), ckpt_path=resume, weights_only=True)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
