"""What a denoiser has learnt of the text, apart from how well it generates.

Noised clips are classified by the class caption under which the denoiser's error is least (the diffusion classifier of
Li et al. 2023), and errors under the right caption are compared with those under the empty one. Both need single
evaluations alone, so they follow a training run at little cost.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from foley.cli.command import command
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.core.seeding import torch_generator
from foley.data.dataset import LatentBatch
from foley.data.latents import LatentCacheIndex, LatentCollate, LatentDataset
from foley.data.procedural import CLASS_NAMES, captions_for
from foley.diffusion.guidance import Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import embed
from foley.models.codec.normaliser import LatentNormaliser
from foley.reporting.tables import provenance
from foley.system.system import load_system


def clips_of_each_class(cfg: DictConfig) -> LatentBatch:
    """The first clips of every procedural class in the split."""
    dataset = LatentDataset(LatentCacheIndex.read(cfg.cache_dir), cfg.split, cfg.num_frames, random=False)
    chosen: dict[str, list[int]] = defaultdict(list)
    for index, entry in enumerate(dataset.entries):
        if entry.label in CLASS_NAMES and len(chosen[entry.label]) < cfg.clips_per_class:
            chosen[entry.label].append(index)
    return LatentCollate(cfg.num_frames)([dataset[index] for indices in chosen.values() for index in indices])


def errors_by_caption(
    denoiser: nn.Module, process: DiffusionProcess, clean: Tensor, noise: Tensor, timestep: int, captions: Conditioning
) -> Tensor:
    """Mean squared errors `[N, K]` of N latents `[N, C, L]`, noised to `timestep`, under each of K captions."""
    times = torch.full((len(clean),), timestep)
    noisy, target = process.add_noise(clean, noise, times), process.target(clean, noise, times)
    columns = []
    for context, mask in zip(captions.context, captions.mask, strict=True):
        rows = Conditioning(context[None], mask[None]).expand(len(clean))
        prediction = denoiser(noisy, times, rows.context, context_mask=rows.mask)
        columns.append((prediction - target).square().mean(dim=(1, 2)))
    return torch.stack(columns, dim=1)


def summarise(errors: Tensor, classes: Tensor) -> dict[str, float]:
    """Of errors `[N, K + 1]`, the empty caption's last: how often the right caption of `classes [N]` is the best."""
    right = errors.gather(1, classes[:, None])
    rank = (errors[:, :-1] < right).sum(dim=1)
    return {
        "accuracy": (rank == 0).float().mean().item(),
        "among_best_five": (rank < 5).float().mean().item(),
        "error_right_caption": right.mean().item(),
        "error_empty_caption": errors[:, -1].mean().item(),
    }


@command("script/score_text_use")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    system, batch = load_system(Path(cfg.system)), clips_of_each_class(cfg)
    normaliser = cast(LatentNormaliser, system.modules["normaliser"])
    clean = normaliser.normalise(batch["latent"])
    noise = torch.randn(clean.shape, generator=torch_generator("text use", cfg.seed))
    captions = embed(system.modules["text"], [*(captions_for(name)[0] for name in CLASS_NAMES), ""])
    classes = torch.tensor([CLASS_NAMES.index(label) for label in batch["label"]])
    rows: dict[int, Any] = {}
    for timestep in cfg.timesteps:
        errors = errors_by_caption(system.modules["denoiser"], system.process, clean, noise, timestep, captions)
        rows[timestep] = summarise(errors, classes)
        get_logger(__name__).info("timestep %d: %s", timestep, rows[timestep])
    settings = {"system": str(cfg.system), "clips": len(clean), "classes": len(CLASS_NAMES)}
    write_json(Path(cfg.output_dir) / "text_use.json", {**settings, "timesteps": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
