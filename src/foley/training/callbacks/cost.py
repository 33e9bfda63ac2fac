"""What a training step costs on this machine: seconds, memory, operations, and the share of its peak that is used."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from foley.core.devices import synchronise
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.metrics.latency import peak_memory_bytes

COST_FILE = "step_cost.json"
_log = get_logger(__name__)

# Dense 16-bit matrix products, in TFLOP/s, of the vendor's data sheets (SXM where there are several). The first fits.
_PEAKS = {
    **{"B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0},
    **{"A10G": 70.0, "A10": 125.0, "V100": 125.0, "T4": 65.0, "RTX 4090": 165.0, "RTX 3090": 71.0},
}


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _cpu_attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    # PyTorch knows the fused kernels of GPUs; those of CPUs cost the same.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class StepFlops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, attention and convolutions, both ways.

    What gradient checkpointing computes again in the backward pass is `recomputed`, and no part of `model`: so does
    the model FLOPs utilisation have it (Chowdhery et al. 2022, PaLM, appendix B).

    >>> linear, flops = nn.Linear(8, 3), StepFlops()
    >>> with flops:
    ...     loss = linear(torch.randn(5, 8, requires_grad=True)).sum()
    ...     loss.backward()
    >>> flops.model  # 5 rows x 8 x 3, twice for a product and a sum, for the output and for two gradients
    720
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = self.recomputed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=output)
            # A backward pass records no graph, unless it runs a forward pass again.
            if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
                self.recomputed += flops
            else:
                self.model += flops
        return output


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The most operations a second of a device, and where that is from: a data sheet, or a matrix product here."""
    half = "16" in precision
    if device.type == "cuda" and half:
        name = torch.cuda.get_device_name(device)
        if known := next((peak for part, peak in _PEAKS.items() if part in name), None):
            return known * 1e12, f"data sheet of {name}, dense 16-bit"
    dtype = (torch.float16 if precision.startswith("16") else torch.bfloat16) if half else torch.float32
    size = 1024 if device.type == "cpu" else 8192
    return _measured_peak(device, dtype, size), f"measured, products of {size} x {size} in {str(dtype)[6:]}"


def _measured_peak(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        began = _now(device)
        left @ right
        seconds.append(_now(device) - began)
    return float(2 * size**3 / min(seconds[1:]))


def _now(device: torch.device) -> float:
    synchronise(device)
    return time.perf_counter()


class StepCost(pl.Callback):
    """Ends a run after a few measured optimizer steps, and says what one costs: on the log, and in `step_cost.json`.

    The operations are those of the first batch, which is not timed.

    Args:
        output_dir: gets the file.
        name: of the recipe.
        clip_seconds: duration of every batch item.
        steps: measured steps; fewer, but no fewer than two, where they take longer than `max_seconds`.
        warmup_steps: before them.
        run_steps: of the whole recipe, for an estimate of its time.
    """

    def __init__(
        self,
        output_dir: str,
        name: str,
        clip_seconds: float,
        steps: int = 20,
        warmup_steps: int = 3,
        max_seconds: float = 60.0,
        run_steps: int = -1,
    ) -> None:
        self.output_dir, self.name, self.clip_seconds, self.run_steps = Path(output_dir), name, clip_seconds, run_steps
        self.steps, self.warmup_steps, self.max_seconds = steps, max(1, warmup_steps), max_seconds
        self.seconds: list[float] = []  # of each measured step
        self.flops: StepFlops | None = None
        self._counting = False
        self._clips = self._step = 0
        self._last = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.flops is None:
            self._clips, self.flops, self._counting = len(batch["id"]), StepFlops(), True
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)
            self.flops.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_counting()
        if trainer.global_step == self._step:
            return  # gradients are still gathered
        self._step, now = trainer.global_step, _now(pl_module.device)
        if self._step > self.warmup_steps:
            self.seconds.append(now - self._last)
        self._last = now
        enough = len(self.seconds) >= self.steps or (len(self.seconds) > 1 and sum(self.seconds) > self.max_seconds)
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(enough, all=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or not self.seconds:
            return
        cost = self.describe(trainer, pl_module)
        write_json(self.output_dir / COST_FILE, cost)
        _log.info("%s", cost_table(cost))

    def describe(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """The figures of one device; times are of the median step."""
        assert self.flops is not None
        device, seconds = module.device, statistics.median(self.seconds)
        peak, source = peak_flops(device, str(trainer.precision))
        batches = trainer.accumulate_grad_batches
        flops = self.flops.model * batches
        clips = self._clips * batches * trainer.world_size
        gpu = device.type == "cuda"
        return {
            "recipe": self.name,
            "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.get_num_threads()} threads",
            "num_devices": trainer.world_size,
            "precision": str(trainer.precision),
            "clips_per_step": clips,
            "clip_seconds": self.clip_seconds,
            "measured_steps": len(self.seconds),
            "step_seconds": seconds,
            "step_seconds_range": [min(self.seconds), max(self.seconds)],
            "clips_per_second": clips / seconds,
            "peak_memory_bytes": peak_memory_bytes(device),
            "parameters_trained": _num_parameters(module, trained=True),
            "parameters": _num_parameters(module, trained=False),
            "model_flops": flops,
            "recomputed_flops": self.flops.recomputed * batches,
            "flops_per_second": flops / seconds,
            "peak_flops_per_second": peak,
            "peak_source": source,
            "model_flops_utilisation": flops / seconds / peak,
            "run_steps": self.run_steps,
        }

    def _stop_counting(self) -> None:
        if self._counting and self.flops is not None:
            self._counting = False
            self.flops.__exit__(None, None, None)


def cost_table(cost: Mapping[str, Any]) -> str:
    """The figures in words, a line each."""
    low, high = cost["step_seconds_range"]
    memory = cost["peak_memory_bytes"]
    of_all = cost["clips_per_step"] // cost["num_devices"]
    lines = {
        "batch": f"{of_all} clips of {cost['clip_seconds']:g} s on each of {cost['num_devices']} devices",
        "step time": f"{cost['step_seconds']:.3f} s ({low:.3f} to {high:.3f} in {cost['measured_steps']} steps)",
        "throughput": f"{cost['clips_per_second']:.2f} clips/s, "
        f"{cost['clips_per_second'] * cost['clip_seconds']:.1f} s of audio a second",
        "peak memory": "unknown" if memory is None else f"{memory / 2**30:.2f} GiB",
        "parameters": f"{cost['parameters_trained']:,} trained of {cost['parameters']:,}",
        "model FLOPs": f"{_scaled(cost['model_flops'])}FLOP a step on each device, and "
        f"{_scaled(cost['recomputed_flops'])}FLOP computed again by gradient checkpointing",
        "MFU": f"{cost['model_flops_utilisation']:.1%}: {_scaled(cost['flops_per_second'])}FLOP/s of "
        f"{_scaled(cost['peak_flops_per_second'])}FLOP/s ({cost['peak_source']})",
    }
    if cost["run_steps"] > cost["measured_steps"]:
        hours = cost["run_steps"] * cost["step_seconds"] / 3600
        words = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        lines["whole run"] = f"{cost['run_steps']:,} steps would take {words}, without validation"
    title = f"what a step of {cost['recipe']} costs on {cost['device']}, {cost['precision']}, on random data"
    return "\n".join([title, *(f"  {name:<12} {words}" for name, words in lines.items())])


def _scaled(number: float) -> str:
    """With a prefix of its size.

    >>> _scaled(9.372e9), _scaled(3.12e14), _scaled(0)
    ('9.372 G', '312 T', '0 G')
    """
    return f"{number / 1e12:.4g} T" if number >= 1e12 else f"{number / 1e9:.4g} G"


def _num_parameters(module: nn.Module, trained: bool) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)
