"""Generate several sounds of each prompt and let a reward rank them: pairs of best and worst, for preference tuning.

python scripts/make_preferences.py system=SYSTEM prompts=FILE reward=clap output_dir=FOLDER
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command

if TYPE_CHECKING:
    from foley.core.sharding import Shard
    from foley.generation.preferences import Candidates
    from foley.generation.text_to_audio import TextToAudio


@cache
def load_system(system: str, device: str) -> "TextToAudio":
    """Once, for the shards of this process and for what ranks them."""
    from foley.core.devices import resolve_device
    from foley.generation.text_to_audio import TextToAudio

    return TextToAudio.load(system, resolve_device(device))


def asked_for(cfg: DictConfig) -> "Candidates":
    """The sounds to generate."""
    from foley.generation.preferences import Candidates
    from foley.generation.prompts import LabelledPrompts

    prompts = LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts)
    return Candidates(prompts, cfg.num, cfg.seed, cfg.val_fraction)


def generate(cfg: DictConfig, shard: "Shard") -> None:
    """A shard of the sounds."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.diffusion.guidance import ClassifierFreeGuidance
    from foley.generation.preferences import generate_candidates
    from foley.generation.settings import GenerationSettings

    chosen: dict[str, Any] = {"solver": cfg.solver, "num_steps": cfg.steps, "batch_size": cfg.batch_size}
    if cfg.guidance_scale is not None:
        chosen["guidance"] = ClassifierFreeGuidance(cfg.guidance_scale)
    settings = GenerationSettings(duration_seconds=cfg.duration_seconds, **chosen)
    output = cfg.output_dir, cfg.overwrite, shard, cfg.shard_minutes
    generate_candidates(load_system(cfg.system, cfg.device), asked_for(cfg), settings, *output)


def rank(cfg: DictConfig) -> None:
    """Complete the folder, score what has no score yet, and write the pairs."""
    from foley.core.logs import get_logger
    from foley.generation.preferences import merge_candidates, rank_candidates

    reward = instantiate(cfg.reward, _convert_="all")
    merge_candidates(cfg.output_dir, asked_for(cfg))
    rank_candidates(load_system(cfg.system, cfg.device), reward, cfg.output_dir, cfg.batch_size, cfg.least_gap)
    get_logger(__name__).info(
        "tune with: foley train experiment=crpo system=%s data.cache_dir=%s", cfg.system, cfg.output_dir
    )


@command("script/make_preferences")
def main(cfg: DictConfig) -> None:
    from foley.cli.launching import run_shards

    run_shards(cfg, generate, rank)


if __name__ == "__main__":
    main()
