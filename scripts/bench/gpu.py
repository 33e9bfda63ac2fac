"""What the pieces of EzAudio cost on a GPU: products, a training step, text, a sampling step, decoding, a whole clip.

Each part is measured by itself into a file of its own, which is written after every row, so that one that is cut short
keeps what it has.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from foley.accel.combined import NoAcceleration
from foley.accel.precision import compile_blocks, set_precision
from foley.cli.command import command
from foley.core.devices import float32_products, resolve_device
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.solver import Solver
from foley.generation.decoding import LatentDecoder
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.latency import RealTimeFactor, measure_latency, peak_memory_bytes, reset_peak_memory
from foley.reporting.tables import provenance
from foley.system.system import untrained_system
from foley.training.callbacks.cost import StepFlops, peak_flops

Row = dict[str, Any]
log = get_logger(__name__)
PROMPT = "a dog barks while rain falls on a tin roof"


PRECISIONS: Mapping[str, tuple[torch.dtype, bool]] = {
    "float32": (torch.float32, False),
    "TF32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}
"""By name: the type, and whether products of float32 may be in TF32."""


def fill(module: nn.Module) -> Any:
    """With weights none of which is zero: nothing may be skipped because it starts so."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module


def build_denoiser(cfg: DictConfig, device: torch.device) -> Any:
    with device:  # hundreds of millions of weights are drawn where they stay
        return fill(instantiate(cfg.model))


def inputs(cfg: DictConfig, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`noisy [B, C, L]`, `context [B, S, Dc]`, its mask `[B, S]`, and the timesteps `[E]` of a generation."""
    noisy = torch.randn(rows, cfg.model.latent_channels, cfg.num_frames, device=device)
    context = torch.randn(rows, cfg.num_tokens, cfg.model.context_dim, device=device)
    mask = torch.arange(cfg.num_tokens, device=device) < cfg.num_words
    timesteps = Solver(cfg.solver.name, cfg.steps).build(instantiate(cfg.process)).timesteps.to(device)
    return noisy, context, mask.expand(rows, -1), timesteps


# ---------------------------------------------------------------- the parts


def matmul(cfg: DictConfig, device: torch.device) -> Iterator[Row]:
    """The most that a square matrix product reaches in each precision."""
    for precision, (dtype, tf32) in PRECISIONS.items():
        left, right = (torch.randn(cfg.matmul_size, cfg.matmul_size, device=device).to(dtype) for _ in range(2))
        with float32_products(tf32):
            seconds = measure_latency(partial(torch.matmul, left, right), cfg.repeats).minimum_seconds
        yield {"precision": precision, "size": cfg.matmul_size, "tflops": 2 * cfg.matmul_size**3 / seconds / 1e12}


def training_step(cfg: DictConfig, device: torch.device) -> Iterator[Row]:
    """Forward, backward and a fused AdamW of the denoiser under bfloat16 autocast, in four ways."""
    denoiser = build_denoiser(cfg, device).train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
    noisy, context, mask, timesteps = inputs(cfg, cfg.training_batch_size, device)
    timestep = timesteps[len(timesteps) // 2].expand(len(noisy))

    def step(forward: Callable[..., Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(noisy, timestep, context, mask).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    denoiser.gradient_checkpointing = False
    with StepFlops() as flops:
        step(denoiser)
    peak, source = peak_flops(device, "bf16-mixed" if device.type == "cuda" else "32-true")  # CPUs may only emulate it
    for compiled, checkpointing in product((False, True), repeat=2):
        denoiser.gradient_checkpointing = checkpointing
        torch.compiler.reset()
        forward = torch.compile(denoiser, fullgraph=True, dynamic=False, backend=cfg.backend) if compiled else denoiser
        reset_peak_memory(device)
        seconds = measure_latency(partial(step, forward), cfg.repeats, warmup=2).median_seconds
        yield {
            **{"compiled": compiled, "checkpointing": checkpointing, "batch_size": len(noisy), "seconds": seconds},
            "peak_gib": (peak_memory_bytes(device) or 0) / 2**30,
            "model_flops_utilisation": flops.model / seconds / peak,
            "peak_source": source,
        }


def text(cfg: DictConfig, device: torch.device) -> Iterator[Row]:
    """Captions a second through an untrained T5 encoder of the published shape."""
    from transformers import T5Config, T5EncoderModel

    with device:
        encoder: Any = T5EncoderModel(T5Config(**cfg.t5)).eval()
    tokens = torch.randint(2, cfg.t5.vocab_size, (cfg.text_batch_size, cfg.num_words), device=device)
    for precision, (dtype, tf32) in PRECISIONS.items():
        encoder.to(dtype)
        with float32_products(tf32):
            seconds = measure_latency(partial(encoder, input_ids=tokens), cfg.repeats).median_seconds
        yield {
            **{"precision": precision, "batch_size": len(tokens), "tokens": cfg.num_words, "seconds": seconds},
            "captions_per_second": len(tokens) / seconds,
            "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        }


def graphed(call: Callable[[], Tensor]) -> Callable[[], object]:
    """The kernels of `call` as one CUDA graph, which is replayed on the same memory."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # what a library sets up at its first use cannot be captured
        call()
    stream.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def sampling_step(cfg: DictConfig, device: torch.device) -> Iterator[Row]:
    """One guided evaluation in bfloat16, prompt and negative prompt in one batch."""
    denoiser = build_denoiser(cfg, device).eval()
    set_precision(denoiser, "bf16")
    for compiled in (False, True):
        if compiled:
            compile_blocks(denoiser, backend=cfg.backend, dynamic=False)
        for batch_size in cfg.sampling_batch_sizes:
            noisy, context, mask, timesteps = inputs(cfg, 2 * batch_size, device)
            timestep = timesteps[len(timesteps) // 2].expand(len(noisy)).clone()
            run = denoiser.prepare(timesteps, noisy.shape[-1], context, mask)
            hoisted = partial(denoiser, noisy, timestep, run=run)
            ways: dict[str, Callable[[], object]] = {"hoisted": hoisted}
            if not compiled:  # to compile what is not hoisted too would take the time of all the others
                ways = {"plain": partial(denoiser, noisy, timestep, context, mask), **ways}
            for way, call in ways.items():
                yield {**timed_step(cfg, call), "batch_size": batch_size, "compiled": compiled, "way": way}
            if device.type == "cuda":
                graph = timed_step(cfg, graphed(hoisted))
                yield {**graph, "batch_size": batch_size, "compiled": compiled, "way": "hoisted, one graph"}


def timed_step(cfg: DictConfig, call: Callable[[], object]) -> Row:
    return {"seconds": measure_latency(call, cfg.repeats, warmup=2).median_seconds}


def decode(cfg: DictConfig, device: torch.device) -> Iterator[Row]:
    """A batch of latents through the codec's decoder, as the pipeline decodes."""
    codec = instantiate(cfg.codec).eval().to(device)
    audio_seconds = cfg.num_frames * codec.hop_samples / codec.sample_rate_hz
    for batch_size, (precision, (dtype, tf32)) in product(cfg.sampling_batch_sizes, PRECISIONS.items()):
        latent = torch.randn(batch_size, codec.latent_channels, cfg.num_frames, device=device)
        decoder = LatentDecoder(codec, "bf16" if dtype == torch.bfloat16 else "float32")
        with float32_products(tf32):
            seconds = measure_latency(partial(decoder, latent), cfg.repeats).median_seconds
        rtf = RealTimeFactor.of(seconds, batch_size * audio_seconds, device, batch_size)
        yield {"precision": precision, "seconds": seconds, **rtf.to_json()}


def generation(cfg: DictConfig, device: torch.device) -> Iterator[Row]:
    """A clip from its prompt to its audio, in every way, with and without caching; the text is random."""
    pipeline = TextToAudio(untrained_system(cfg), device)
    fill(pipeline.denoiser)
    duration = cfg.num_frames / pipeline.frames_per_second
    for way, options in cfg.ways.items():
        pipeline.optimise(**options)
        for name, accelerator in {"none": None, **instantiate(cfg.accelerators)}.items():
            settings = {"guidance": ClassifierFreeGuidance(cfg.guidance.scale), "num_steps": cfg.steps}
            once = partial(pipeline.generate, [PROMPT], duration, **settings)
            counted = once(accelerator=accelerator or NoAcceleration())  # and warm
            runs = [once(accelerator=accelerator) for _ in range(cfg.repeats)]
            stages = {key: median(asdict(run.timings)[key] for run in runs) for key in asdict(counted.timings)}
            total = median(run.timings.total_seconds for run in runs)
            rtf = RealTimeFactor.median([run.rtf for run in runs]).to_json()
            yield {"way": way, "cache": name, "tmacs": counted.tmacs, **stages, "total_seconds": total, **rtf}


PARTS: Mapping[str, Callable[[DictConfig, torch.device], Iterator[Row]]] = {
    part.__name__: part for part in (matmul, training_step, text, sampling_step, decode, generation)
}


def measure(name: str, cfg: DictConfig, device: torch.device) -> list[Row]:
    """The rows of a part, which are in its file as soon as they are there."""
    rows: list[Row] = []
    part = PARTS[name](cfg, device)
    with torch.set_grad_enabled(name == "training_step"):
        for row in part:
            rows.append(row)
            log.info("%s", json.dumps(row))
            write_json(Path(cfg.output_dir) / f"{name}.json", {"rows": rows, "provenance": provenance()})
    return rows


@command("bench/gpu")
def main(cfg: DictConfig) -> None:
    """Raises ValueError for a part that there is not."""
    unknown = [name for name in cfg.parts if name not in PARTS]
    if unknown:
        raise ValueError(f"parts={','.join(unknown)}: there is no such part; the parts are {', '.join(PARTS)}")
    device = resolve_device(cfg.device)
    torch.manual_seed(0)
    result = {name: measure(name, cfg, device) for name in cfg.parts}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
