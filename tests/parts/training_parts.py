"""Small stand-ins with the interfaces of the real parts, and a complete run of them; also run as a script."""

import csv
import sys
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from foley.core.seeding import torch_generator
from foley.data.dataset import LatentBatch, SampleKey
from foley.data.resumable import ResumableDataModule
from foley.diffusion.process import DiffusionProcess
from foley.models.codec.normaliser import LatentNormaliser
from foley.models.dit.masking import SpanMask
from foley.models.text.base import TextConditioner, TextEmbedding
from foley.training.callbacks.checkpointing import BestCheckpoint, PeriodicCheckpoint
from foley.training.callbacks.ema import ExponentialMovingAverage
from foley.training.callbacks.monitoring import AppendingCSVLogger
from foley.training.callbacks.non_finite import NonFiniteGuard
from foley.training.checkpoint_io import AtomicCheckpointIO
from foley.training.diffusion import DiffusionTraining
from foley.training.optim import cosine_schedule

CHANNELS, FRAMES = 4, 12


class TinyDenoiser(nn.Module):
    """One hidden layer over [noisy, visible, mask], moved by time and by the mean of the context."""

    def __init__(self, context_dim: int | None = 6) -> None:
        super().__init__()
        self.latent_channels = CHANNELS
        self.inner = nn.Linear(2 * CHANNELS + 1, 8)
        self.time = nn.Linear(1, 8)
        self.cross_attention = nn.Linear(context_dim, 8) if context_dim else None
        self.outer = nn.Linear(8, CHANNELS)

    def forward(
        self, noisy, timestep, context=None, context_mask=None, frame_mask=None, visible=None, hidden_mask=None
    ) -> Tensor:
        hidden = torch.ones_like(noisy[:, :1], dtype=torch.bool) if hidden_mask is None else hidden_mask[:, None]
        visible = torch.zeros_like(noisy) if visible is None else visible.masked_fill(hidden, 0.0)
        state = self.inner(torch.cat([noisy, visible, hidden.to(noisy)], dim=1).mT)
        state = state + self.time(timestep[:, None].float() / 1000)[:, None]
        if self.cross_attention is not None:
            state = state + self.cross_attention(context.mean(dim=1))[:, None]
        return self.outer(state.tanh()).mT


class TinyText(TextConditioner):
    """A table over caption lengths."""

    dim = 6

    def __init__(self, trainable: bool = True) -> None:
        super().__init__()
        self.trainable = trainable
        self.table = nn.Embedding(16, self.dim)

    def forward(self, prompts: list[str]) -> TextEmbedding:
        index = torch.tensor([[len(prompt) % 16] for prompt in prompts])
        return TextEmbedding(self.table(index), torch.ones_like(index, dtype=torch.bool))


class LatentSamples(torch.utils.data.Dataset):
    """Latents that are functions of index and, in training, of epoch; those in `poisoned` are NaN."""

    def __init__(self, size: int, poisoned: frozenset[int] = frozenset(), fixed: bool = False) -> None:
        self.size, self.poisoned, self.fixed = size, poisoned, fixed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: SampleKey) -> tuple[SampleKey, Tensor]:
        latent = torch.randn(
            CHANNELS, FRAMES, generator=torch_generator("latent", key.index, 0 if self.fixed else key.epoch)
        )
        return key, latent * (float("nan") if key.index in self.poisoned else 1.0)


def collate(items: list[tuple[SampleKey, Tensor]]) -> LatentBatch:
    return LatentBatch(
        latent=torch.stack([latent for _, latent in items]),
        frame_mask=torch.ones(len(items), FRAMES, dtype=torch.bool),
        is_padded=False,
        caption=["x" * (key.index % 7) for key, _ in items],
        label=[""] * len(items),
        id=[f"{key.epoch}/{key.index}" for key, _ in items],
    )


class TinyData(ResumableDataModule):
    def __init__(self, train_size: int = 20, poisoned: frozenset[int] = frozenset(), num_workers: int = 0) -> None:
        super().__init__(batch_size=4, num_workers=num_workers)
        self.collate = collate
        self.datasets = {"train": LatentSamples(train_size, poisoned), "val": LatentSamples(6, fixed=True)}


class BatchLog(pl.Callback):
    """Remembers the ids and the loss of every batch."""

    def __init__(self) -> None:
        self.ids: list[list[str]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.ids.append(batch["id"])
        self.losses.append(float(outputs["loss"]))


def build_module(text: nn.Module | None = None, context_dim: int | None = 6, **options) -> DiffusionTraining:
    torch.manual_seed(3)
    module = DiffusionTraining(
        denoiser=TinyDenoiser(context_dim),
        process=DiffusionProcess(),
        normaliser=LatentNormaliser(CHANNELS),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        text=(text or TinyText()) if context_dim else None,
        lr_schedule=partial(cosine_schedule, total_steps=40, warmup_steps=3),
        masking=SpanMask(span_frames=3, partial_probability=0.5),
        **options,
    )
    module.component_configs = {"denoiser": {"_target_": "foley.test.Denoiser", "context_dim": context_dim}}
    return module


def build_trainer(
    folder: Path,
    max_steps: int,
    callbacks=(),
    every: int = 4,
    progress_bar: bool = False,
    keep_all: bool = True,
    slice_minutes: float | None = None,
    **options,
) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=7,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_progress_bar=progress_bar,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        logger=AppendingCSVLogger(str(folder), flush_logs_every_n_steps=1),
        callbacks=[
            ExponentialMovingAverage(0.9),
            NonFiniteGuard(3),
            BestCheckpoint(str(folder / "checkpoints")),
            PeriodicCheckpoint(str(folder / "checkpoints"), every, keep_all, slice_minutes=slice_minutes),
            *callbacks,
        ],
        **options,
    )


def metrics(folder: Path) -> list[tuple[str, str, str]]:
    """Losses of training and validation with their steps, in the order of the steps."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    losses = [(int(row["step"]), name, row.get(name)) for row in rows for name in ("train/loss", "val/loss")]
    return sorted(loss for loss in losses if loss[2])


def run(folder: Path, max_steps: int, ckpt_path: Path | None = None, module=None, data=None, callbacks=(), **options):
    """Train and return (trainer, module, batch log)."""
    log = BatchLog()
    module = module or build_module()
    trainer = build_trainer(folder, max_steps, [log, *callbacks], **options)
    trainer.fit(module, datamodule=data or TinyData(), ckpt_path=ckpt_path, weights_only=True)
    return trainer, module, log


def fit_on_noise(
    module: pl.LightningModule, folder: Path, num_samples: int, steps: int = 4, callbacks: list | None = None
) -> pl.Trainer:
    """Train `module` on eight clips of quiet noise, two in a batch, and nothing but the callbacks given."""
    audio = 0.1 * torch.randn(8, 1, num_samples, generator=torch.Generator().manual_seed(1))
    batches = [{"audio": item, "length_samples": num_samples, "id": str(index)} for index, item in enumerate(audio)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(batches, batch_size=2), DataLoader(batches, batch_size=4))
    return trainer


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Components of which some tensor changed."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


if __name__ == "__main__":
    last = Path(sys.argv[1]) / "checkpoints" / "last.ckpt"
    run(Path(sys.argv[1]), int(sys.argv[2]), last if last.exists() else None, every=int(sys.argv[3]))
