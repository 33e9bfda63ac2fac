"""Peak memory, TMACs and seconds of long clips: in one piece, in windows, with sparse attention; of untrained parts.

Each case runs in a process of its own, whose peak is then that of this case alone. Peaks are of resident memory on a
CPU, and of allocated memory on a GPU.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from foley.accel.cost import CostMeter, tmacs
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.rates import clip_size
from foley.diffusion.guidance import Conditioning
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.generation.decoding import LatentDecoder
from foley.generation.settings import GenerationSettings
from foley.metrics.latency import RealTimeFactor
from foley.reporting.tables import provenance

Case = Mapping[str, Any]
_ONE_CASE = "--one-case"


def peak_gigabytes(device: torch.device) -> float:
    """The most memory that this process has held, in units of 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(case: Case) -> dict[str, Any]:
    """One clip of `duration_seconds` generated in the `way` of the case: peaks after each stage, and their seconds."""
    way, device = case["way"], resolve_device(case["device"])
    torch.manual_seed(0)
    codec, denoiser = (instantiate(case[name]).eval().to(device) for name in ("codec", "model"))
    _, num_frames = clip_size(case["duration_seconds"], codec.sample_rate_hz, codec.hop_samples)
    settings = GenerationSettings(
        window_seconds=way["window_seconds"],
        overlap_seconds=case["overlap_seconds"],
        decode_chunk_seconds=way["decode_chunk_seconds"],
    )
    frames_per_second = codec.sample_rate_hz / codec.hop_samples
    tokens = torch.randn(1, case["num_tokens"], case["model"]["context_dim"], device=device)
    text = Conditioning(tokens, torch.ones(1, case["num_tokens"], dtype=torch.bool, device=device))
    row = {"way": way["name"], "duration_seconds": case["duration_seconds"], "parts_gigabytes": peak_gigabytes(device)}
    meter = CostMeter(instantiate(way["accelerator"]))
    start = time.perf_counter()
    latent = generate_latents(
        denoiser,
        instantiate(case["process"]),
        text,
        text,
        [0],
        num_frames,
        instantiate(case["guidance"]),
        Solver("ddim", case["steps"]),
        meter,
        device,
        windows=settings.windows(num_frames, frames_per_second),
    ).cpu()
    row |= {"denoise_seconds": time.perf_counter() - start, "denoise_gigabytes": peak_gigabytes(device)}
    cost = meter.cost_per_item()
    start = time.perf_counter()
    LatentDecoder(codec)(latent.to(device), settings.chunk_frames(frames_per_second)).cpu()
    row |= {"decode_seconds": time.perf_counter() - start, "peak_gigabytes": peak_gigabytes(device)}
    computing = row["denoise_seconds"] + row["decode_seconds"]
    row |= {"tmacs": None if cost is None else tmacs(cost.macs_cached)}
    return row | RealTimeFactor.of(computing, case["duration_seconds"], device).to_json()


def measure_apart(case: Case) -> dict[str, Any]:
    """`measure` in a process of its own; raises CalledProcessError where that fails."""
    command = [sys.executable, __file__, _ONE_CASE]
    done = subprocess.run(command, input=json.dumps(case), stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


@command("bench/long_audio")
def main(cfg: DictConfig) -> None:
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    ways, durations = settings.pop("ways"), settings.pop("durations_seconds")
    rows = []
    for duration_seconds, name in product(durations, ways):
        case = {**settings, "duration_seconds": duration_seconds, "way": {"name": name, **ways[name]}}
        rows.append(measure_apart(case))
        sys.stdout.write(f"{json.dumps(rows[-1])}\n")
    parts = ("model", "codec", "process", "guidance", "steps", "num_tokens", "overlap_seconds", "device")
    result = {"settings": {"ways": ways, **{name: settings[name] for name in parts}}, "rows": rows}
    write_json(Path(cfg.results_file), {**result, "provenance": provenance()})


if __name__ == "__main__":
    if sys.argv[1:] == [_ONE_CASE]:
        sys.stdout.write(json.dumps(measure(json.load(sys.stdin))))
    else:
        main()
