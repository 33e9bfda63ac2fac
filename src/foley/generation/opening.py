"""One way to open whatever generates audio: a system of ours, trained or published, or a published pipeline."""

from pathlib import Path
from typing import Any

import torch

from foley.core.hub import Hub
from foley.generation.pipeline_to_audio import PipelineToAudio
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import System, load_system


def open_generator(
    ckpt: str | None,
    published: Any,
    hub_dir: str | None,
    cache_dir: str,
    device: str | torch.device = "cpu",
    max_duration_seconds: float = 60.0,
) -> TextToAudio | PipelineToAudio:
    """The published system or pipeline where there is one, or else the trained system at `ckpt`.

    Args:
        published: None, or what a config in configs/published makes: it has `load(hub, cache_dir)`.
        hub_dir: as `Hub` takes it.
        cache_dir: where converted weights are kept.

    Raises CheckpointError where something cannot be had, ValueError unless exactly one of the two is given.
    """
    if (published is None) == (ckpt is None):
        raise ValueError(f"model= names a published system and ckpt={ckpt} a trained one: give only one of them")
    if published is None:
        return TextToAudio(load_system(Path(str(ckpt))), device, max_duration_seconds)
    hub = Hub(Path(hub_dir).expanduser() if hub_dir else None)
    loaded = published.load(hub, Path(cache_dir).expanduser())
    if isinstance(loaded, System):
        return TextToAudio(loaded, device, max_duration_seconds)
    return PipelineToAudio(loaded, device, max_duration_seconds)
