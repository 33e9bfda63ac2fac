"""What it takes to prepare AudioSet, on paper: hours, GPUs and bytes of each stage, from measured rates.

Operations of networks are counted for one clip, reading one is timed here, and what a row of a table costs is what
`scripts/bench/scale.py` has measured.
"""

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import ClapConfig, ClapModel

from foley.accel.cost import count_macs
from foley.cli.command import command
from foley.core.config import compose_aside
from foley.core.reading import read_json
from foley.data.audio import read_audio
from foley.reporting.pages import write_results
from foley.reporting.scale import DataStage
from foley.reporting.tables import provenance


def read_seconds(cfg: DictConfig) -> float:
    """Processor seconds to read one recording as data sets have it: stereo FLAC, resampled to the codec's rate."""
    with TemporaryDirectory() as name:
        noise = np.random.default_rng(0).uniform(-0.3, 0.3, (round(cfg.clip_seconds * cfg.recording_rate_hz), 2))
        soundfile.write(f"{name}/clip.flac", noise, cfg.recording_rate_hz)
        read_audio(Path(name, "clip.flac"), cfg.rate_hz)
        start = time.process_time()
        for _ in range(cfg.readings):
            read_audio(Path(name, "clip.flac"), cfg.rate_hz)
        return (time.process_time() - start) / cfg.readings


def network_flops(cfg: DictConfig) -> dict[str, float]:
    """Of the networks of each stage, for one clip: two for each multiplication with its addition."""
    with torch.device("meta"):  # where nothing is computed
        codec, clap = instantiate(compose_aside("train", [f"codec={cfg.codec}"]).codec), ClapModel(ClapConfig())
        samples = torch.empty(1, 1, round(cfg.clip_seconds * codec.sample_rate_hz))
        mel, longer = torch.empty(1, 1, *cfg.clap_input), torch.empty(1, 1, dtype=torch.bool)
        encode = 2.0 * count_macs(partial(codec.posterior, samples))
        score = 2.0 * count_macs(partial(clap.audio_model, mel, is_longer=longer))
    depth, width, inner = cfg.text_encoder
    text = depth * (4 * width**2 + 3 * width * inner)  # projections of attention, and a gated feed-forward network
    caption = 2.0 * cfg.caption_parameters * cfg.caption_tokens
    return {"caption": caption, "filter": score, "encode": encode, "encode-text": 2.0 * text * cfg.text_tokens}


def seconds_per_row(scale: dict[str, Any], name: str) -> float:
    """Processor seconds for each of the most rows that were measured of a part of the data path."""
    costs = next(row["costs"] for row in scale["rows"] if row["row"] == name)
    return float([cost["processor_seconds"] / cost["size"] for cost in costs if "processor_seconds" in cost][-1])


def stages(cfg: DictConfig, scale: dict[str, Any], read: float) -> list[DataStage]:
    """From recordings to what a training reads."""
    flops, plan = network_flops(cfg), scale["plan"]
    parse, look = seconds_per_row(scale, "manifest: parse"), seconds_per_row(scale, "preflight, hot files")
    journal = [seconds_per_row(scale, f"encoding: {name}") for name in ("keys of the clips asked for", "merge")]
    row, result, latents = cfg.manifest_row_bytes, cfg.result_row_bytes, plan["latents"][0]["clip_bytes"]
    return [
        DataStage("a look at every file", "prepare", 0, parse + look, row),
        DataStage("and every sample", "prepare decode=true", 0, parse + look + read, row),
        DataStage("captions by Qwen2-Audio", "caption", flops["caption"], parse + read, result),
        DataStage("a filter by CLAP", "filter", flops["filter"], parse + read, result),
        DataStage("latents, mean and deviation", "encode", flops["encode"], read + sum(journal), latents),
        DataStage("embedded captions", "encode-text", flops["encode-text"], parse, plan["caption_bytes"]),
    ]


@command("bench/data_plan")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(1)
    about = {"provenance": provenance()}  # before the page is written, which is a change of the commit
    page = Path(cfg.page)
    scale, read = read_json(page.with_suffix("") / "scale.json", "the results of bench scale"), read_seconds(cfg)
    speed = cfg.peak_tflops * 1e12 * cfg.utilisation
    rows = [
        {
            **vars(stage),
            "gigaflops": stage.flops / 1e9,
            "gpu_hours": stage.flops * cfg.clips / speed / 3600,
            **{f"hours_on_{gpus}": stage.hours(cfg.clips, gpus, cfg.cores, speed) for gpus in cfg.gpus},
            "limit": stage.limit(cfg.cores, speed),
            "gigabytes": cfg.clips * stage.clip_bytes / 1e9,
        }
        for stage in stages(cfg, scale, read)
    ]
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    del plain["page"]  # where it is written is no part of the plan
    write_results(page, data_plan={"plan": plain, "read_seconds": read, "stages": rows, **about})


if __name__ == "__main__":
    main()
