"""What the options of sample.py ask for; the impossible is refused before anything is loaded."""

from functools import partial
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from foley.accel.accelerators import require_calibrations
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.editing import EditMask
from foley.pipeline import TextToAudio, resolve_device
from foley.published import PipelineToAudio, PublishedPipeline, open_generator
from foley.published.pipeline import PUBLISHED_SOLVER, pipeline_settings


def choose_method(cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """What makes the clips: `edit`, `vary` or plain `generate`, and its particular arguments.

    Raises ValueError for options that do not go together.
    """
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
    if cfg.guidance_scale is not None or cfg.guidance_rescale:
        scale = ClassifierFreeGuidance().scale if cfg.guidance_scale is None else cfg.guidance_scale
        named["guidance"] = instantiate(cfg.guidance, scale=scale, rescale=cfg.guidance_rescale)
    return {key: value for key, value in named.items() if value is not None}


def choose_options(cfg: DictConfig) -> dict[str, Any]:
    """How to generate: the fields of `GenerationSettings`.

    Raises FileNotFoundError where the accelerator lacks its calibration.
    """
    accelerator = instantiate(cfg.accel)
    solver = None if cfg.solver.name == PUBLISHED_SOLVER else cfg.solver.name
    require_calibrations(accelerator, solver, cfg.steps, cfg.guidance_scale)
    return {
        **choose_settings(cfg),
        "any_guidance_scale": cfg.any_guidance_scale,
        "accelerator": accelerator,
        "negative_prompt": cfg.negative_prompt,
        "batch_size": cfg.batch_size,
        "window_seconds": cfg.window_seconds,
        "overlap_seconds": cfg.overlap_seconds,
        "decode_chunk_seconds": cfg.decode_chunk_seconds,
        "progress": partial(track, description="denoising"),
    }


def open_requested(cfg: DictConfig, method: str, options: dict[str, Any]) -> TextToAudio | PipelineToAudio:
    """The system or pipeline asked for, ready for `method` with `options`.

    Raises CheckpointError as `open_generator` does, and ValueError for what a pipeline of diffusers cannot do.
    """
    published = instantiate(cfg.published)
    if isinstance(published, PublishedPipeline):
        _check_pipeline(cfg, method)
        pipeline_settings(options)
    device = resolve_device(cfg.device)
    generator = open_generator(cfg.ckpt, published, cfg.hub_dir, cfg.cache_dir, device, cfg.max_duration_seconds)
    if isinstance(generator, TextToAudio):
        generator.optimise(cfg.precision, cfg.compile)
        generator.set_decoder_precision(cfg.decoder_precision)
        if cfg.text_cache_dir is not None:
            generator.keep_text_embeddings(cfg.text_cache_dir)
        if cfg.rotary_extension is not None:
            generator.extend_rotary(cfg.rotary_extension, cfg.trained_seconds)
    return generator


def describe_source(cfg: DictConfig) -> dict[str, Any]:
    """What the JSON of each clip says besides how it was generated."""
    accelerator = OmegaConf.to_container(cfg.accel, resolve=True)
    return {"accelerator": accelerator, "ckpt": cfg.ckpt, "model": cfg.model_name}


def _check_pipeline(cfg: DictConfig, method: str) -> None:
    precisions, others = {cfg.precision, cfg.decoder_precision}, {cfg.rotary_extension, cfg.text_cache_dir}
    if method != "generate" or cfg.compile or (precisions, others) != ({"float32"}, {None}):
        raise ValueError(
            "edit, init, precision, decoder_precision, compile, rotary_extension and text_cache_dir need a system of "
            "ours: the pipelines of diffusers only generate"
        )
