"""Parameters and training memory of denoisers that differ in their blocks alone (EzAudio, figure 2).

On a GPU memory is the measured peak of a training step. Elsewhere it is counted, at no cost, on tensors without values:
what the forward pass saves, and the weights with their gradients and AdamW's moments. What only lives for the length of
one operation, and what a checkpointed block recomputes, is not in the count.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch._subclasses import FakeTensorMode

from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.models.dit.model import DiffusionTransformer
from foley.reporting.tables import markdown_table, provenance
from foley.training.callbacks.monitoring import activation_bytes

_COPIES = 4  # of every parameter in float32: itself, its gradient, and AdamW's two moments
_GB = 1e9


@dataclass(frozen=True)
class Batch:
    """A training batch's size: B clips of L frames and S text tokens; `autocast` computes in bfloat16."""

    size: int
    num_frames: int
    num_tokens: int
    autocast: bool

    def loss(self, denoiser: DiffusionTransformer, context_dim: int, device: torch.device) -> Tensor:
        """Of a forward pass on random inputs."""
        latent = torch.randn(self.size, denoiser.latent_channels, self.num_frames, device=device)
        context = torch.randn(self.size, self.num_tokens, context_dim, device=device)
        timestep = torch.ones(self.size, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            prediction = denoiser(latent, timestep, context)
        return (prediction.float() - latent).square().mean()


def measured_bytes(denoiser: DiffusionTransformer, loss: Callable[[], Tensor]) -> int:
    """Peak of a training step on the GPU."""
    optimizer = torch.optim.AdamW(denoiser.parameters())
    for _ in range(2):  # the first step makes the optimizer's state
        torch.cuda.reset_peak_memory_stats()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def compare(config: DictConfig, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Parameters, bytes of weights, gradients and moments, and bytes in all without and with checkpointing."""
    denoiser: DiffusionTransformer = instantiate(config)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    state_bytes = _COPIES * torch.float32.itemsize * parameters
    result = {"parameters": parameters, "state_bytes": state_bytes}
    for name, checkpointing in (("stored_bytes", False), ("checkpointed_bytes", True)):
        denoiser.gradient_checkpointing = checkpointing

        def loss() -> Tensor:
            return batch.loss(denoiser, config.context_dim, device)

        on_gpu = device.type == "cuda"
        result[name] = measured_bytes(denoiser, loss) if on_gpu else state_bytes + activation_bytes(denoiser, loss)
    return result


def as_table(rows: dict[str, dict[str, Any]], verb: str) -> str:
    """The rows as Markdown, in millions and in units of 10^9 bytes."""
    header = ("denoiser", "parameters, M", "weights, gradients, moments, GB", f"{verb}, GB", "checkpointed, GB")
    sizes = ("state_bytes", "stored_bytes", "checkpointed_bytes")
    return markdown_table(
        header,
        [
            (name, f"{row['parameters'] / 1e6:.1f}", *(f"{row[size] / _GB:.1f}" for size in sizes))
            for name, row in rows.items()
        ],
    )


@command("script/compare_parameters")
def main(cfg: DictConfig) -> None:
    device = resolve_device(cfg.device)
    measured = device.type == "cuda"
    batch = Batch(cfg.batch_size, cfg.num_frames, cfg.num_tokens, cfg.autocast)
    rows = {}
    for name, config in cfg.denoisers.items():
        with device if measured else FakeTensorMode():
            rows[name] = compare(config, batch, device)
    verb = "measured" if measured else "counted"
    write_json(
        Path(cfg.results_file),
        {"settings": {**asdict(batch), "memory": verb}, "rows": rows, "provenance": provenance()},
    )
    get_logger(__name__).info("%s\n%s", as_table(rows, verb), cfg.results_file)


if __name__ == "__main__":
    main()
