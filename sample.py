"""Generate audio from text: `python sample.py prompt="a dog barks"`; `--help` lists the options."""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

import foley.config  # noqa: F401  (registers the resolvers that the configs use)
from foley.editing import EditMask
from foley.generation import Generation
from foley.logs import get_logger
from foley.pipeline import TextToAudio, resolve_device
from foley.prompts import quote_overrides, request_clips
from foley.published import Hub
from foley.system import System, load_system


def choose_system(cfg: DictConfig) -> System:
    """The published system of `model=`, or else the trained one at `ckpt=`."""
    if cfg.published is None:
        return load_system(Path(cfg.ckpt))
    if cfg.ckpt is not None:
        raise ValueError(f"model= names a published system and ckpt={cfg.ckpt} another one: give only one of them")
    hub = Hub(Path(cfg.hub_dir).expanduser() if cfg.hub_dir else None)
    system: System = hydra.utils.instantiate(cfg.published).load(hub, Path(cfg.cache_dir).expanduser())
    return system


def choose_method(cfg: DictConfig) -> Callable[..., Generation]:
    """What makes the clips: the method of `TextToAudio` for an edit, a variation, or plain generation."""
    if cfg.edit is not None and cfg.init is not None:
        raise ValueError(f"edit={cfg.edit} and init={cfg.init} exclude each other; give one of them")
    if cfg.edit is None and (cfg.mask_start_seconds, cfg.mask_length_seconds) != (None, None):
        raise ValueError("mask_start_seconds and mask_length_seconds say what to replace: give edit=FILE too")
    if cfg.edit is not None:
        mask = EditMask(cfg.mask_start_seconds, cfg.mask_length_seconds, cfg.boundary_seconds)
        return partial(TextToAudio.edit, file=cfg.edit, mask=mask)
    if cfg.init is not None:
        return partial(TextToAudio.vary, file=cfg.init, strength=cfg.strength)
    return partial(TextToAudio.generate, duration_seconds=cfg.duration_seconds)


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Generate every clip asked for and write the folder."""
    clips = request_clips(cfg.prompt, cfg.prompts, cfg.seed, cfg.num)
    make = choose_method(cfg)
    result = make(
        TextToAudio(choose_system(cfg), resolve_device(cfg.device), cfg.max_duration_seconds),
        [clip.prompt for clip in clips],
        seeds=[clip.seed for clip in clips],
        guidance=hydra.utils.instantiate(cfg.guidance, scale=cfg.guidance_scale, rescale=cfg.guidance_rescale),
        solver=cfg.solver.name,
        num_steps=cfg.steps,
        accelerator=hydra.utils.instantiate(cfg.accel),
        negative_prompt=cfg.negative_prompt,
        batch_size=cfg.batch_size,
        progress=partial(track, description="denoising"),
    )
    model = HydraConfig.get().runtime.choices["published"]
    settings = {"accelerator": OmegaConf.to_container(cfg.accel), "ckpt": cfg.ckpt, "model": model}
    page, _ = result.write(Path(cfg.output_dir), notes=[clip.notes for clip in clips], more_settings=settings)
    get_logger(__name__).info("%d clips: open %s", len(clips), page)


if __name__ == "__main__":
    arguments = [re.sub("^model=", "published=", argument) for argument in sys.argv]  # configs/model is for training
    sys.argv = quote_overrides(arguments, ("prompt", "negative_prompt", "edit", "init"))
    main()
