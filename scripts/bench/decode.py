"""Seconds to decode a latent: the codec as it is trained, its weight norm folded, the fast decoder, and in chunks."""

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from foley.accel.cost import count_macs, tmacs
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.generation.decoding import LatentDecoder
from foley.metrics.latency import RealTimeFactor, measure_rounds
from foley.models.codec.fast_decoder import FastDecoder
from foley.nn.conv import folded_copy
from foley.reporting.tables import provenance

REFERENCE = "unfolded_float32"


def compare(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Least wall-clock and processor seconds of each way."""
    measured = measure_rounds(ways, rounds)
    return {
        name: {"seconds": min(measured.seconds[name]), "processor_seconds": min(measured.processor_seconds[name])}
        for name in ways
    }


def with_ratios(times: dict[str, dict[str, float]], reference: str) -> dict[str, dict[str, float]]:
    """Each way's times, and how many times faster it is than the reference, by either clock."""
    base = times[reference]
    return {
        name: {**row, **{key.replace("seconds", "speedup"): base[key] / row[key] for key in base}}
        for name, row in times.items()
    }


def decoders(codec: Any, chunk_frames: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """All ways to decode, by name; the first is the reference."""
    fast, chosen, half = FastDecoder(codec.decoder), LatentDecoder(codec), LatentDecoder(codec, "bf16")
    return {
        REFERENCE: codec.decode,
        "folded_float32": folded_copy(codec.decoder),
        "fast_float32": fast,
        "pipeline_float32_in_chunks": lambda latent: chosen(latent, chunk_frames),
        "folded_bfloat16": half,
        "folded_bfloat16_in_chunks": lambda latent: half(latent, chunk_frames),
    }


def measure_stages(codec: Any, num_frames: int, rounds: int) -> list[dict[str, Any]]:
    """What minimal filtering over rows gains in each stage of the decoder, over the folded one."""
    folded, fast = folded_copy(codec.decoder), FastDecoder(codec.decoder)
    device = next(codec.parameters()).device
    length, rows = num_frames, []
    for direct, filtered in zip(folded.stages, fast.stages, strict=True):  # type: ignore[arg-type, call-overload]
        signal = torch.randn(1, direct.resample.in_channels, length, device=device)
        by_rows = signal[0].T.contiguous()
        ways = {
            "folded": partial(direct, signal),
            "fast": partial(filtered, by_rows),
        }
        times = with_ratios(compare(ways, rounds), "folded")
        length *= direct.resample.stride[0]
        rows.append({"channels": direct.resample.out_channels, "length": length, **times})
    return rows


@torch.inference_mode()
def measure_codec(codec: Any, cfg: DictConfig) -> dict[str, Any]:
    """All ways to decode one random latent of the duration asked for."""
    num_frames = round(cfg.duration_seconds * codec.sample_rate_hz / codec.hop_samples)
    chunk_frames = max(1, round(cfg.decode_chunk_seconds * codec.sample_rate_hz / codec.hop_samples))
    latent = torch.randn(1, codec.latent_channels, num_frames, device=next(codec.parameters()).device)
    ways = decoders(codec, chunk_frames)
    expected = codec.decode(latent)
    times = compare({name: partial(decode, latent) for name, decode in ways.items()}, cfg.rounds)
    result = with_ratios(times, REFERENCE)
    for name, decode in ways.items():
        result[name] |= RealTimeFactor.of(result[name]["seconds"], cfg.duration_seconds, latent.device).to_json()
        result[name] |= {
            "tmacs": tmacs(count_macs(partial(decode, latent))),
            "largest_difference": (decode(latent) - expected).abs().max().item(),
        }
    return {
        "parameters": sum(parameter.numel() for parameter in codec.parameters()),
        "num_frames": num_frames,
        "chunk_frames": chunk_frames,
        "context_frames": codec.decoder.context_frames,
        "output_std": expected.std().item(),
        "decoders": result,
        "stages": measure_stages(codec, num_frames, cfg.rounds),
    }


@command("bench/decode")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(0)
    device = resolve_device(cfg.device)
    codecs = {name: instantiate(node).eval().to(device) for name, node in cfg.codecs.items()}
    result: dict[str, Any] = {
        "device": str(device),
        "num_threads": cfg.num_threads,
        "duration_seconds": cfg.duration_seconds,
        "codecs": {str(name): measure_codec(codec, cfg) for name, codec in codecs.items()},
    }
    write_json(Path(cfg.results_file), {**result, "provenance": provenance()})
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
