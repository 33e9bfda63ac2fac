"""What two processes that torchrun has started find out about sharded training; run as a script, in a folder given."""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from distillation_parts import distillation, tiny_teacher
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from training_parts import CHANNELS, BatchLog, TinyData, TinyText, build_module, build_trainer

from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola
from foley.training.base import FoleyModule
from foley.training.callbacks.listening import AudioSamples
from foley.training.callbacks.monitoring import state_bytes
from foley.training.diffusion import DiffusionTraining
from foley.training.sharding import ShardedStrategy

SHAPE = {"latent_channels": CHANNELS, "width": 32, "depth": 2, "num_heads": 2, "context_dim": TinyText.dim}
STEPS, HALF = 8, 4


class TinyCodec(nn.Module):
    """Ten samples a frame."""

    sample_rate_hz, hop_samples = 1000, 10

    def decode(self, latent: Tensor) -> Tensor:
        return latent.mean(dim=1, keepdim=True).repeat_interleave(10, dim=-1)


def transformer_module(recompute: bool = False) -> DiffusionTraining:
    """A training of a small EzAudio-DiT and of its text encoder, clipped hard."""
    module = build_module(gradient_clip_norm=0.1)
    torch.manual_seed(5)
    module.denoiser = DiffusionTransformer(**SHAPE, modulation=AdaLNSola(4, 4.0), gradient_checkpointing=recompute)
    for parameter in module.denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    scheme = {"_target_": "foley.nn.adaln.AdaLNSola", "rank": 4, "alpha": 4.0}
    module.component_configs["denoiser"] = {
        "_target_": "foley.models.dit.model.DiffusionTransformer",
        **SHAPE,
        "modulation": scheme,
    }
    return module


class State(pl.Callback):
    """Remembers the bytes that this process has held at the last step."""

    held = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.held = state_bytes(trainer)


def fit(
    folder: Path,
    strategy: Strategy,
    module: FoleyModule | None = None,
    ckpt_path: Path | None = None,
    accumulate: int = 1,
) -> dict[str, object]:
    """Train on two processes, and tell the losses of this one and what it held."""
    samples = AudioSamples(
        "codec", str(folder / "samples"), ["rain", "wind", "a dog"], 0.12, ClassifierFreeGuidance(2.0), 3
    )
    samples._codec = TinyCodec()
    log, state = BatchLog(), State()
    options = {"devices": 2, "strategy": strategy, "accumulate_grad_batches": accumulate}
    trainer = build_trainer(folder, STEPS, [samples, log, state], **options)
    trainer.fit(module or transformer_module(), datamodule=TinyData(), ckpt_path=ckpt_path, weights_only=True)
    return {"losses": log.losses, "held": state.held, "rank": trainer.global_rank, "size": trainer.world_size}


def main(folder: Path) -> None:
    """Train in every way, each in a folder of its own, and write what this process saw."""
    start = folder / f"sharded/checkpoints/step_{HALF:06d}.ckpt"
    found = {
        "ddp": fit(folder / "ddp", DDPStrategy()),
        "sharded": fit(folder / "sharded", ShardedStrategy()),
        "resumed": fit(folder / "resumed", ShardedStrategy(), ckpt_path=start),
        "resumed_ddp": fit(folder / "resumed_ddp", DDPStrategy(), ckpt_path=start),
        "accumulated_ddp": fit(folder / "accumulated_ddp", DDPStrategy(), accumulate=2),
        "accumulated": fit(folder / "accumulated", ShardedStrategy(), transformer_module(recompute=True), accumulate=2),
        "distilled_ddp": fit(folder / "distilled_ddp", DDPStrategy(), distillation(tiny_teacher())),
        "distilled": fit(folder / "distilled", ShardedStrategy(), distillation(tiny_teacher())),
    }
    (folder / f"rank_{found['ddp']['rank']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
