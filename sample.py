"""Generate audio from text: `python sample.py prompt="a dog barks"`; `--help` lists the options."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

import foley.config  # noqa: F401  (registers the resolvers that the configs use)
from foley.editing import EditMask
from foley.logs import get_logger
from foley.pipeline import TextToAudio, resolve_device
from foley.prompts import name_model, quote_overrides, request_clips
from foley.published import open_generator


def choose_method(cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """What makes the clips: `edit`, `vary` or plain `generate`, and its particular arguments."""
    if cfg.edit is not None and cfg.init is not None:
        raise ValueError(f"edit={cfg.edit} and init={cfg.init} exclude each other; give one of them")
    if cfg.edit is None and (cfg.mask_start_seconds, cfg.mask_length_seconds) != (None, None):
        raise ValueError("mask_start_seconds and mask_length_seconds say what to replace: give edit=FILE too")
    if cfg.edit is not None:
        mask = EditMask(cfg.mask_start_seconds, cfg.mask_length_seconds, cfg.boundary_seconds)
        return "edit", {"file": cfg.edit, "mask": mask}
    if cfg.init is not None:
        return "vary", {"file": cfg.init, "strength": cfg.strength}
    return "generate", {"duration_seconds": cfg.duration_seconds}


def choose_settings(cfg: DictConfig) -> dict[str, Any]:
    """Solver, steps and guidance where the command names them; the rest is the system's own choice."""
    named: dict[str, Any] = {"solver": cfg.solver.name, "num_steps": cfg.steps}
    scale = {} if cfg.guidance_scale is None else {"scale": cfg.guidance_scale}
    if scale or cfg.guidance_rescale:
        named["guidance"] = hydra.utils.instantiate(cfg.guidance, **scale, rescale=cfg.guidance_rescale)
    return {key: value for key, value in named.items() if value is not None}


def set_up(generator: TextToAudio, cfg: DictConfig) -> None:
    """Precision, compilation and rotary extension, as asked for."""
    generator.optimise(cfg.precision, cfg.compile)
    if cfg.rotary_extension is not None:
        generator.extend_rotary(cfg.rotary_extension, cfg.trained_seconds)


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Generate every clip asked for and write the folder."""
    clips = request_clips(cfg.prompt, cfg.prompts, cfg.seed, cfg.num)
    method, arguments = choose_method(cfg)
    published = hydra.utils.instantiate(cfg.published)
    device = resolve_device(cfg.device)
    generator = open_generator(cfg.ckpt, published, cfg.hub_dir, cfg.cache_dir, device, cfg.max_duration_seconds)
    if isinstance(generator, TextToAudio):
        set_up(generator, cfg)
    elif method != "generate" or cfg.compile or (cfg.precision, cfg.rotary_extension) != ("float32", None):
        raise ValueError(
            "edit, init, precision, compile and rotary_extension need a system of ours: the pipelines of diffusers "
            "only generate"
        )
    result = getattr(generator, method)(
        [clip.prompt for clip in clips],
        seeds=[clip.seed for clip in clips],
        **choose_settings(cfg),
        any_guidance_scale=cfg.any_guidance_scale,
        accelerator=hydra.utils.instantiate(cfg.accel),
        negative_prompt=cfg.negative_prompt,
        batch_size=cfg.batch_size,
        window_seconds=cfg.window_seconds,
        overlap_seconds=cfg.overlap_seconds,
        **arguments,
        progress=partial(track, description="denoising"),
    )
    model = HydraConfig.get().runtime.choices["published"]
    settings = {"accelerator": OmegaConf.to_container(cfg.accel), "ckpt": cfg.ckpt, "model": model}
    page, _ = result.write(Path(cfg.output_dir), notes=[clip.notes for clip in clips], more_settings=settings)
    get_logger(__name__).info("%d clips: open %s", len(clips), page)


if __name__ == "__main__":
    sys.argv = quote_overrides(name_model(sys.argv), ("prompt", "negative_prompt", "edit", "init"))
    main()
