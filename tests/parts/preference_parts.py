"""A folder of pairs made without a generation, and the tuning of a small system on pairs."""

from functools import partial
from pathlib import Path

import torch
from distillation_parts import tiny_teacher
from latent_parts import latent_cache_writer
from training_parts import CHANNELS, FRAMES

from foley.core.seeding import torch_generator
from foley.data.latents import LatentCacheIndex
from foley.data.preferences import PairBatch, Preference, PreferenceDataModule, Preferences, hash_of_latents
from foley.diffusion.dpo import DiffusionDPO
from foley.training.preference import PreferenceTuning

RATE_HZ, HOP = 1000, 10
SECONDS = FRAMES * HOP / RATE_HZ


def write_pairs(folder: Path, prompts: int = 10, seed: int = 0, frames: int = FRAMES) -> Path:
    """Latents of two sounds of each prompt, the last two prompts for validation, and the pairs."""
    with latent_cache_writer(folder, "c0dec", RATE_HZ, HOP) as writer:
        for row in range(prompts):
            split = "val" if row >= prompts - 2 else "train"
            for n in range(2):
                mean = torch.randn(CHANNELS, frames, generator=torch_generator("pair", seed, row, n))
                text = f"{row:06d}/{n}", "x" * (row % 7), "", split, frames * HOP / RATE_HZ
                writer.add(mean, torch.full_like(mean, 0.1), *text)
    index = LatentCacheIndex.read(folder)
    pairs = [Preference(f"{row:06d}/{row % 2}", f"{row:06d}/{1 - row % 2}", 1.0, 0.0) for row in range(prompts)]
    Preferences(hash_of_latents(index), pairs, {"reward": {"reward": "a coin"}}).write(folder)
    return folder


def pair_data(folder: Path, **options) -> PreferenceDataModule:
    return PreferenceDataModule(str(folder), SECONDS, **{"batch_size": 4, **options})


def pair_batch(size: int = 4, padded: int = 0) -> PairBatch:
    winner, loser = torch.randn(2, size, CHANNELS, FRAMES, generator=torch_generator("pairs")).unbind()
    mask = torch.arange(FRAMES).expand(size, FRAMES) < FRAMES - padded
    names = [f"{row}" for row in range(size)]
    about = {"frame_mask": mask, "is_padded": bool(padded), "caption": ["a", "bb"] * (size // 2)}
    return PairBatch(latent=winner, loser=loser, label=names, id=names, **about)


def tuning(prediction: str = "v", lr: float = 1e-3, **options) -> PreferenceTuning:
    optimizer = partial(torch.optim.AdamW, lr=lr)
    return PreferenceTuning(
        tiny_teacher(prediction), **{"objective": DiffusionDPO(), "optimizer": optimizer, **options}
    )
