"""What the proofs on a GPU share: the device and size that the environment names, and trainings in this process.

`FOLEY_TEST_DEVICE=cpu` tries the proofs where there is no GPU: everything that they say is run, but for what CUDA alone
has. They are small unless `FOLEY_TEST_SIZE=full` asks for the published sizes, as `make gpu` does.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from commands import compose_command
from torch import Tensor, nn

from foley.training.callbacks.cost import COST_FILE
from foley.training.run import objective, train

DEVICE = torch.device(os.environ.get("FOLEY_TEST_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
FULL = os.environ.get("FOLEY_TEST_SIZE") == "full"
STEPS = 5
SMALL_DENOISER = ["size.width=32", "size.depth=2", "size.num_heads=2"]


class Watch(pl.Callback):
    """Remembers of a training where it ran, its losses, what moved, and the types of what it computed with."""

    last: "Watch"

    def __init__(self) -> None:
        Watch.last = self
        self.losses: list[float] = []
        self.device = ""
        self.buffer_types: dict[str, torch.dtype] = {}
        self.input_types: set[torch.dtype] = set()
        self.moved: set[str] = set()
        self._before: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.device = pl_module.device.type
        self._before = {name: tensor.detach().clone() for name, tensor in pl_module.named_parameters()}
        if isinstance(denoiser := getattr(pl_module, "denoiser", None), nn.Module):
            denoiser.register_forward_pre_hook(self._see_inputs, with_kwargs=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, Mapping):
            self.losses.append(float(outputs["loss"]))
        self.buffer_types = {name: buffer.dtype for name, buffer in pl_module.named_buffers()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        after = {name: tensor for name, tensor in pl_module.named_parameters() if name in self._before}
        self.moved = {name.split(".")[0] for name in after if not torch.equal(self._before[name], after[name])}

    def _see_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        self.input_types |= {value.dtype for value in given if torch.is_tensor(value) and value.is_floating_point()}


def trainer(name: str, precision: str | None = None) -> list[str]:
    """`trainer=NAME`; where the proof is tried on a CPU, with the GPU's precision and fused optimizer."""
    chosen = [f"trainer={name}", *([f"trainer.precision={precision}"] if precision else [])]
    if ON_CUDA:
        # On several GPUs Lightning would start other ranks by the words of the test's own command.
        return [*chosen, *(["trainer.devices=1"] if torch.cuda.device_count() > 1 else [])]
    fused = [] if str(precision).startswith("16") else ["optimizer.fused=true"]
    return [*chosen, "trainer.accelerator=cpu", "trainer.devices=1", *fused]


def trained(folder: Path, *overrides: str, synthetic: bool = False) -> Watch:
    """Train in this process as `train.py OVERRIDES` does, into `folder`."""
    watch = [f"+callbacks.watch._target_={Watch.__module__}.{Watch.__qualname__}", "callbacks.progress=null"]
    cfg = compose_command("train", "name=proof", f"paths.output_dir={folder}", *watch, *overrides)
    objective(cfg) if synthetic else train(cfg)
    return Watch.last


def read_cost(folder: Path) -> dict[str, Any]:
    """What `data=synthetic` measured into `folder`."""
    cost: dict[str, Any] = json.loads((folder / COST_FILE).read_text(encoding="utf-8"))
    return cost


def random_weights(module: nn.Module, std: float = 0.05) -> nn.Module:
    """In eval mode on the device, with weights none of which is zero, so that nothing looks equal by being nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def relative_difference(result: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected; both on whatever device."""
    expected = expected.float().cpu()
    return float((result.float().cpu() - expected).norm() / expected.norm())
