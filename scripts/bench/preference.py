"""Systems before and after preference tuning, on prompts that are new to them: reward, and distance to real sounds.

All make the same prompts from the same seeds, so that a gain is the mean over pairs of clips. Intervals are of 95 %, by
bootstrap over the prompts; the Frechet distance is of equally many clips each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.prompts import LabelledPrompts
from foley.generation.result import Generation
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import Judge
from foley.metrics.rewards import Reward
from foley.metrics.scores import draw_counts, estimate
from foley.reporting.tables import provenance
from foley.system.checkpoint import noted_source

Row = dict[str, Any]
RESAMPLES = 1000


def generate(source: str, prompts: LabelledPrompts, cfg: DictConfig) -> Generation:
    """Every prompt once, from the same seeds for each system."""
    guidance = None if cfg.guidance_scale is None else ClassifierFreeGuidance(cfg.guidance_scale)
    return TextToAudio.load(source, resolve_device(cfg.device)).generate(
        prompts.captions, cfg.duration_seconds, guidance=guidance, num_steps=cfg.steps, batch_size=cfg.batch_size
    )


def mean(name: str, values: Tensor) -> Row:
    """The mean of `values [N]` with the ends of its interval."""
    counts = draw_counts(len(values), RESAMPLES, "preference")
    found = estimate(counts @ values / counts.sum(dim=1), str(len(values)))
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def score(result: Generation, prompts: LabelledPrompts, reward: Reward, judge: Judge) -> tuple[Tensor, Row]:
    """The reward of each clip `[N]`, and scores of all."""
    audio, rate_hz = result.audio, result.sample_rate_hz
    rewards = torch.tensor(reward(audio, rate_hz, prompts.captions, prompts.labels), dtype=torch.float64)
    clips = judge.clips(audio, rate_hz, prompts.labels)
    return rewards, {**mean("reward", rewards), **({} if clips is None else judge.assess(clips))}


@command("bench/preference")
def main(cfg: DictConfig) -> None:
    prompts = LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts)
    reward, judge = instantiate(cfg.reward, _convert_="all"), Judge.load(Path(cfg.extractor_dir), cfg.reference)
    rows: list[Row] = []
    before: Tensor | None = None
    for name, source in cfg.systems.items():
        rewards, scores = score(generate(source, prompts, cfg), prompts, reward, judge)
        gain = {} if before is None else mean("gain", rewards - before)
        before = rewards if before is None else before
        rows.append({"system": name, "n": len(rewards), **scores, **gain})
        sys.stdout.write(f"{json.dumps(rows[-1])}\n")
    settings = {
        "systems": {name: noted_source(source) for name, source in cfg.systems.items()},
        "reward": dict(reward.identity),
        **{name: cfg[name] for name in ("steps", "guidance_scale", "duration_seconds")},
    }
    write_json(
        Path(cfg.output_dir) / "preference.json", {"settings": settings, "provenance": provenance(), "rows": rows}
    )


if __name__ == "__main__":
    main()
