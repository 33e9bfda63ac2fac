"""How many times faster sparse attention is than dense: alone, and in a denoising step of an untrained AudioLDM2 U-Net.

Speed-ups are against dense attention in the same round of the same run, so that a busy machine is busy for both. TMACs
are counted in a call of their own.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from foley.accel.attention.litefocus import compensation_indices, sparse_attention
from foley.accel.attention.local_global import keys_per_query, local_global_attention
from foley.accel.attention.sparse import pays
from foley.accel.combined import NoAcceleration
from foley.accel.cost import count_macs, tmacs
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.seeding import torch_generator
from foley.diffusion.context import Accelerator, RunContext, StepContext
from foley.metrics.latency import RealTimeFactor, measure_rounds
from foley.reporting.tables import provenance

Calls = Mapping[str, Callable[[], Tensor]]
PARTS = ("attention", "window", "denoising_step")


def straight_attention(q: Tensor, k: Tensor, v: Tensor, num_frequencies: int, indices: Tensor) -> Tensor:
    """LiteFocus as one would write it down: two sets of scores, one softmax over both, two weighted sums.

    `[B, H, N, D]` to `[B, H, N, D]`; a key in both sets counts twice, as in the published code.
    """
    own_q, own_k, own_v = (x.unflatten(2, (-1, num_frequencies)).transpose(2, 3) for x in (q, k, v))
    own_scores = (own_q @ own_k.mT).transpose(2, 3).flatten(2, 3)
    scores = torch.cat([own_scores, q @ k[:, :, indices].mT], dim=-1) / q.shape[-1] ** 0.5
    own_weights, weights = scores.softmax(dim=-1).split([own_scores.shape[-1], len(indices)], dim=-1)
    own_weights = own_weights.unflatten(2, (-1, num_frequencies)).transpose(2, 3)
    return (own_weights @ own_v).transpose(2, 3).flatten(2, 3) + weights @ v[:, :, indices]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, num_frequencies: int, indices: Tensor) -> Tensor:
    """The same attention, each key once, as dense attention behind a mask: what the equations say, and no faster."""
    frequency = torch.arange(q.shape[2], device=q.device) % num_frequencies
    mask = frequency[:, None] == frequency
    mask[:, indices] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def compare(calls: Calls, rounds: int) -> dict[str, dict[str, float]]:
    """TMACs and median seconds of each call, and its median speed-up over "dense", each against its own round's."""
    measured = measure_rounds(calls, rounds)
    return {
        name: {
            "tmacs": tmacs(count_macs(call)),
            "seconds": measured.median_seconds(name),
            "speedup": measured.speedup(name, "dense"),
        }
        for name, call in calls.items()
    }


def measure_attention(cfg: DictConfig, num_tokens: int, rounds: int, like: Tensor) -> dict[str, Any]:
    """One length: seconds and speed-ups, and the largest differences between ways to compute the same."""
    settings = cfg.attention
    shape = settings.batch_size, num_tokens, settings.num_heads, settings.head_dim
    q, k, v = (torch.randn(shape).to(like).transpose(1, 2) for _ in range(3))
    indices = compensation_indices(num_tokens, settings.ratio, torch_generator("bench")).to(like.device)
    sparse = (q, k, v, settings.num_frequencies, indices)
    calls: Calls = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "litefocus": lambda: sparse_attention(*sparse),
        "litefocus_double_count": lambda: sparse_attention(*sparse, double_count=True),
        "straight_reading": lambda: straight_attention(*sparse),
        "masked_dense": lambda: masked_attention(*sparse),
    }
    pairs = (("litefocus", "masked_dense"), ("litefocus_double_count", "straight_reading"))
    differences = {f"{a} - {b}": (calls[a]() - calls[b]()).abs().max().item() for a, b in pairs}
    return {"num_tokens": num_tokens, "largest_difference": differences, **compare(calls, rounds)}


def measure_window(cfg: DictConfig, num_tokens: int, rounds: int, like: Tensor) -> dict[str, Any]:
    """One length of a waveform latent: seconds, and the speed-up of a window with global frames."""
    settings = cfg.window
    shape = settings.batch_size, num_tokens, settings.num_heads, settings.head_dim
    q, k, v = (torch.randn(shape).to(like).transpose(1, 2) for _ in range(3))
    indices = compensation_indices(num_tokens, settings.ratio, torch_generator("bench")).to(like.device)
    calls: Calls = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "local_global": lambda: local_global_attention(q, k, v, settings.window_frames, indices),
    }
    saving = num_tokens / keys_per_query(num_tokens, settings.window_frames, len(indices))
    chosen = "local_global" if pays(num_tokens, num_tokens / saving, like.device) else "dense"
    ways = compare(calls, rounds)
    # Where it falls back, the choice is the dense way itself.
    fallback = {"chosen": chosen, "speedup": ways[chosen]["speedup"]}
    return {"num_tokens": num_tokens, "saving": saving, "fallback": fallback, **ways}


def break_even(windows: Sequence[Mapping[str, Any]]) -> float | None:
    """The least saving of scores from which on sparse attention is no slower than dense; None where it always is."""
    by_saving = sorted(windows, key=lambda row: row["saving"], reverse=True)
    faster = takewhile(lambda row: row["local_global"]["speedup"] >= 1, by_saving)
    return min((row["saving"] for row in faster), default=None)


def one_evaluation(
    unet: nn.Module, accelerator: Accelerator, run: RunContext, evaluate: Callable[[], Tensor]
) -> Tensor:
    """The first evaluation of a run, with the accelerator attached."""
    context = StepContext(0, run.timesteps[0], run)
    with accelerator.attach(unet):
        accelerator.on_run_start(run)
        try:
            accelerator.on_evaluation_start(context)
            prediction = evaluate()
            accelerator.on_evaluation_end(context, prediction)
        finally:
            accelerator.on_run_end()
    return prediction


def measure_step(cfg: DictConfig, unet: nn.Module, duration_seconds: float, like: Tensor) -> dict[str, Any]:
    """One denoising step of a clip of that length: TMACs, seconds, their RTF, and speed-up over the U-Net as it is."""
    settings, batch_size = cfg.step, cfg.step.batch_size
    frames = round(duration_seconds * settings.frames_per_second)
    noisy = torch.randn(batch_size, cfg.unet.in_channels, frames, settings.num_frequencies).to(like)
    dims = cfg.unet.cross_attention_dim[0][1:]
    sizes = zip(settings.num_tokens, dims, strict=True)
    context, more = (torch.randn(batch_size, tokens, dim).to(like) for tokens, dim in sizes)
    run = RunContext("ddim", 1, torch.tensor([500]), 1.0, 0.0, batch_size)

    def evaluate() -> Tensor:
        prediction: Tensor = unet(noisy, run.timesteps[0], context, encoder_hidden_states_1=more).sample
        return prediction

    accelerators = {"dense": NoAcceleration(), **instantiate(cfg.accelerators)}
    calls = {
        name: partial(one_evaluation, unet, accelerator, run, evaluate) for name, accelerator in accelerators.items()
    }
    ways = compare(calls, settings.rounds)
    for way in ways.values():
        way.update(RealTimeFactor.of(way["seconds"], duration_seconds, like.device).to_json())  # one clip, its guidance
    return {"duration_seconds": duration_seconds, **ways}


@torch.inference_mode()
def measure(cfg: DictConfig) -> dict[str, Any]:
    """All that the config asks for."""
    torch.manual_seed(0)
    like = torch.zeros((), device=resolve_device(cfg.device), dtype=getattr(torch, cfg.dtype))
    attention = [measure_attention(cfg, num_tokens, cfg.rounds, like) for num_tokens in cfg.attention.num_tokens]
    windows = [measure_window(cfg, num_tokens, cfg.rounds, like) for num_tokens in cfg.window.num_tokens]
    steps = []
    if cfg.step.durations_seconds:
        unet = instantiate(cfg.unet).eval().to(like)
        steps = [measure_step(cfg, unet, seconds, like) for seconds in cfg.step.durations_seconds]
    chosen = OmegaConf.masked_copy(
        cfg, ["rounds", "dtype", "attention", "window", "local_global", "step", "accelerators", "unet"]
    )
    return {
        "settings": OmegaConf.to_container(chosen, resolve=True),
        "device": str(like.device),
        "attention": attention,
        "window": windows,
        "break_even": break_even(windows),
        "denoising_step": steps,
        "provenance": provenance(),
    }


@command("bench/attention")
def main(cfg: DictConfig) -> None:
    result = measure(cfg)
    write_json(Path(cfg.results_file), result)
    sys.stdout.write("".join(f"{json.dumps(row)}\n" for part in PARTS for row in result[part]))
    sys.stdout.write(f"{json.dumps({'break_even': result['break_even']})}\n")


if __name__ == "__main__":
    main()
