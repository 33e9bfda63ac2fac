"""From the options of sample.py to clips, settings and a generator; what cannot be is refused before loading."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from foley.accel.caching.calibration import require_calibrations
from foley.cli.sampling_checks import RECORDINGS, check_numbers, check_source, typed_options, warn_without_effect
from foley.core.components import CheckpointError
from foley.core.config import published_name, shipped
from foley.core.devices import resolve_device
from foley.core.logs import get_logger, process_rank
from foley.core.pipelines import system_config
from foley.data.ordering import evenly_spaced
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.solver import solver_label
from foley.generation.backends import EAGER
from foley.generation.editing import Control, Edit, EditMask, EditMasks, Variation, read_recording
from foley.generation.pipeline_to_audio import (
    PUBLISHED_SOLVER,
    PipelineToAudio,
    check_pipeline_settings,
    open_generator,
)
from foley.generation.prompts import Clip, PromptColumns, read_prompts, request_clips
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.models.text import feature_files
from foley.system.adapters import AdapterChoice, AdapterFiles, adapter_choices
from foley.system.checkpoint import fetched
from foley.system.published import PublishedPipeline
from foley.system.system import student_of

_NUM_DEMO_PROMPTS = 4
_log = get_logger(__name__)

# What may differ between two runs that make the clips of one folder: it changes no clip.
_INCIDENTAL = {"output_dir", "trainer", "paths", "ddp_strategy", "device", "batch_size"}
_INCIDENTAL |= {"shards", "shard", "merge", "gpus_per_job"}
_INCIDENTAL |= {"cuda_graphs", "overwrite", "provenance", "hub_dir", "cache_dir", "text_cache_dir", "eval_preset"}


def chosen_system(cfg: DictConfig) -> str:
    """What `system=` names, or the student inside it; raises CheckpointError where it has none."""
    if not cfg.student:
        return str(cfg.system)
    if system_config(cfg.system, hub_dir=cfg.hub_dir) is not None:
        raise CheckpointError(f"student=true: {cfg.system} is published without a student; give a system's folder")
    return str(student_of(Path(fetched(cfg.system, cfg.hub_dir))))


def requested_clips(cfg: DictConfig) -> list[Clip]:
    """Every clip that the command asks for; where it asks for nothing, some of the demo's prompts by its own system.

    Raises ValueError as `request_clips` does, for impossible prompts, and for numbers that are none.
    """
    check_numbers(cfg)
    resolve_device(cfg.device)  # before a word on what will be generated
    warn_without_effect(cfg, typed_options())
    if cfg.trainer is not None and cfg.prompts is None:
        raise ValueError("trainer= shares out the prompts of a file: give prompts=FILE, or leave it out")
    if cfg.shards != 1 and cfg.prompts is None:
        raise ValueError(f"shards={cfg.shards} shares out the prompts of a file: give prompts=FILE, or leave it out")
    if cfg.features is not None:
        return _clips_of_features(cfg)
    if asks_for_nothing(cfg):
        return _demo_clips(cfg.seed, cfg.num)
    columns = PromptColumns(cfg.caption_column, cfg.id_column, cfg.clip_column, cfg.split_column)
    chosen = cfg.captions, cfg.caption_seed, cfg.split
    return request_clips(cfg.prompt, cfg.prompts, cfg.seed, cfg.num, columns, *chosen)


def asks_for_nothing(cfg: DictConfig) -> bool:
    """No prompt, no recording, and the system that ships, whose world the demo's prompts are of."""
    named = {cfg.prompt, cfg.prompts, cfg.features, *(cfg[option] for option in RECORDINGS)}
    return named == {None} and Path(str(cfg.system)).resolve().is_relative_to(shipped("demo").resolve())


def _demo_clips(first_seed: int, num: int) -> list[Clip]:
    prompts = read_prompts(shipped("prompts/demo.jsonl"))
    chosen = [prompts[index] for index in evenly_spaced(len(prompts), _NUM_DEMO_PROMPTS)]
    _log.info('no prompt given (prompt="a dog barks"): these of the demo are generated: %s', ", ".join(chosen))
    repeated = [prompt for prompt in chosen for _ in range(num)]
    return [Clip(prompt, seed) for seed, prompt in enumerate(repeated, start=first_seed)]


def requested_settings(cfg: DictConfig) -> GenerationSettings:
    """How the command asks for its clips.

    Raises ValueError for options that do not go together, and FileNotFoundError where the accelerator lacks its
    calibration.
    """
    accelerator, source = instantiate(cfg.accel), chosen_source(cfg)
    named = cfg.solver.name not in (None, PUBLISHED_SOLVER)
    solver = solver_label(cfg.solver.name, cfg.eta) if named else None
    require_calibrations(accelerator, solver, cfg.steps, cfg.guidance_scale)
    return GenerationSettings(
        duration_seconds=cfg.duration_seconds if source is None else None,
        source=source,
        **chosen_sampling(cfg),
        any_guidance_scale=cfg.any_guidance_scale,
        accelerator=accelerator,
        negative_prompt=cfg.negative_prompt,
        lyrics=cfg.lyrics,
        batch_size=cfg.batch_size,
        window_seconds=cfg.window_seconds,
        overlap_seconds=cfg.overlap_seconds,
        decode_chunk_seconds=cfg.decode_chunk_seconds,
        loudness_lufs=cfg.loudness_lufs,
        fade_seconds=cfg.fade_seconds,
        provenance=cfg.provenance,
        watermark=cfg.watermark,
        # The clips of a file have a bar of their own.
        progress=partial(track, description="denoising") if cfg.prompts is None else iter,
        facts=describe_source(cfg),
    )


def of_request(settings: GenerationSettings, request_hash: str) -> GenerationSettings:
    """The settings, with what tells in the JSON of each clip which request it is of."""
    return replace(settings, facts={**settings.facts, "request": request_hash})


def chosen_source(cfg: DictConfig) -> Edit | Variation | Control | None:
    """The recording to start from; raises ValueError for options that do not go together."""
    check_source(cfg)
    if cfg.edit is not None:
        return Edit(cfg.edit, chosen_mask(cfg), cfg.downmix)
    if cfg.control is not None:
        return Control(cfg.control, cfg.control_scale, cfg.downmix)
    return None if cfg.init is None else Variation(cfg.init, cfg.strength, cfg.downmix)


def chosen_mask(cfg: DictConfig) -> EditMask | EditMasks:
    """What of the recording is replaced; raises ValueError as the masks do."""
    if cfg.masks is not None:
        return EditMasks(_plain(cfg.masks), cfg.boundary_seconds)
    return EditMask(cfg.mask_start_seconds, cfg.mask_length_seconds, cfg.boundary_seconds)


def chosen_sampling(cfg: DictConfig) -> dict[str, Any]:
    """Solver, steps and guidance, as fields of `GenerationSettings`; None is the system's own choice."""
    guidance = None
    rule = set(cfg.guidance) - {"_target_", "scale", "rescale"}  # one with options of its own, such as an interval
    if cfg.guidance_scale is not None or cfg.guidance_rescale or rule:
        scale = ClassifierFreeGuidance().scale if cfg.guidance_scale is None else cfg.guidance_scale
        guidance = instantiate(cfg.guidance, scale=scale, rescale=cfg.guidance_rescale)
    return {"solver": cfg.solver.name, "eta": cfg.eta, "num_steps": cfg.steps, "guidance": guidance}


def chosen_adapters(cfg: DictConfig) -> list[AdapterChoice]:
    """What `adapters=` names; raises ValueError for an entry that is none, and CheckpointError as reading them does."""
    choices = adapter_choices(_plain(cfg.adapters) or ())
    for choice in choices:
        AdapterFiles.read(choice.path)  # what cannot be read is refused before a model is loaded
    return choices


def open_requested(
    cfg: DictConfig, settings: GenerationSettings, device: torch.device | None = None
) -> TextToAudio | PipelineToAudio:
    """The system or pipeline asked for, on `device` instead of the command's.

    Raises CheckpointError as `open_generator` does, and ValueError for what a pipeline of diffusers cannot do.
    """
    if loader := _pipeline_loader(cfg):
        check_pipeline_settings(settings, loader.family)
    for option in RECORDINGS:
        if cfg[option] is not None:
            read_recording(Path(cfg[option]), option)  # what cannot be read is refused before a model is loaded
    generator = open_system(cfg, device)
    if cfg.features is not None and not _takes_features(generator):
        raise ValueError(f"features={cfg.features}: this system takes captions, not features; give prompt= instead")
    return generator


def _pipeline_loader(cfg: DictConfig) -> PublishedPipeline | None:
    """What loads `system=` where it is a pipeline of diffusers."""
    described = None if cfg.codec_path else system_config(cfg.system, cfg.system_overrides, cfg.hub_dir)
    loader = None if described is None else instantiate(described.published)
    return loader if isinstance(loader, PublishedPipeline) else None


def open_system(cfg: DictConfig, device: torch.device | None = None) -> TextToAudio | PipelineToAudio:
    """What `system=` names, made ready as the options of inference say, on `device` instead of the command's.

    Raises CheckpointError as `open_generator` does, and ValueError for what a pipeline of diffusers cannot do.
    """
    if _pipeline_loader(cfg):
        _check_pipeline(cfg)
    device, places = device or resolve_device(cfg.device), (cfg.hub_dir, cfg.cache_dir, cfg.system_overrides)
    opened = cfg.system, device, cfg.max_duration_seconds, *places, cfg.codec_path
    generator = open_generator(*opened, chosen_adapters(cfg))
    if isinstance(generator, PipelineToAudio):
        generator.optimise(cfg.precision, cfg.quantise)
    if isinstance(generator, TextToAudio):
        precision, recorded = cfg.precision, cfg.cuda_graphs
        if cfg.backend != EAGER:  # graphs are exact, and start by themselves, whatever a device does best
            precision = "float32" if precision == "auto" else precision
            recorded = False if recorded == "auto" else recorded
        generator.optimise(precision, cfg.compile, recorded, cfg.quantise)
        generator.set_decoder_precision(cfg.decoder_precision)
        if cfg.text_cache_dir is not None:
            generator.keep_text_embeddings(cfg.text_cache_dir)
        if cfg.rotary_extension is not None:
            generator.extend_rotary(cfg.rotary_extension, cfg.trained_seconds)
        if cfg.backend != EAGER:  # after what it does not go with
            generator.use_backend(cfg.backend, fetched(cfg.system, cfg.hub_dir))
    return generator


def describe_source(cfg: DictConfig) -> dict[str, Any]:
    """What the JSON of each clip says besides how it was generated."""
    name = published_name(cfg.system)
    path = cfg.system if name is None else None
    return {"accelerator": OmegaConf.to_container(cfg.accel, resolve=True), "ckpt": path, "model": name}


def describe_request(cfg: DictConfig, clips: Sequence[Clip], model_hash: str) -> dict[str, Any]:
    """What the clips depend on, for the record of their folder."""
    options = {key: cfg[key] for key in map(str, cfg) if key not in _INCIDENTAL}
    wanted: Any = {key: _plain(value) for key, value in options.items()}
    content = json.dumps([[clip.prompt, clip.seed, dict(clip.notes)] for clip in clips])
    return {**wanted, "model_hash": model_hash, "clips_hash": hashlib.sha256(content.encode()).hexdigest()}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _clips_of_features(cfg: DictConfig) -> list[Clip]:
    """`num` clips of each file of features: these stand in the place of prompts."""
    if (cfg.prompt, cfg.prompts) != (None, None):
        raise ValueError("features= stands in the place of prompt= and prompts=: give one of the three")
    files = [str(file) for file in feature_files(Path(cfg.features).expanduser()) for _ in range(cfg.num)]
    return [Clip(file, seed) for seed, file in enumerate(files, start=cfg.seed)]


def _takes_features(generator: TextToAudio | PipelineToAudio) -> bool:
    return isinstance(generator, TextToAudio) and generator.text.prompt_field == "id"


def _check_pipeline(cfg: DictConfig) -> None:
    asked = {cfg.compile, cfg.cuda_graphs is True, cfg.decoder_precision != "float32", cfg.backend != EAGER}
    if asked != {False} or {cfg.rotary_extension, cfg.text_cache_dir} != {None}:
        raise ValueError(
            "decoder_precision, compile, backend, cuda_graphs, rotary_extension and text_cache_dir need a system of "
            "ours: the pipelines of diffusers only generate"
        )


_LISTENING_STEPS = 10  # of the solver: the page is to be there at once


def write_listening_page(cfg: DictConfig) -> Path | None:
    """Generate the prompts `cfg.listen` with what a run has trained, into `listen` of its folder.

    Args:
        cfg: of `train.py`. `codec_path` must have been given, since sounds are made with it.

    Returns the page; None on other ranks than zero. Raises ValueError where no codec was given, and CheckpointError
    where the run left no checkpoint that generates.
    """
    if process_rank() != 0:
        return None
    if not cfg.codec_path:
        raise ValueError("listen= makes sounds: give codec_path=, the codec that made the latents")
    folder = Path(cfg.paths.output_dir)
    last = folder / "checkpoints/last.ckpt"
    sounds = TextToAudio.load(last).generate(list(cfg.listen), cfg.data.duration_seconds, num_steps=_LISTENING_STEPS)
    sounds.write(folder / "listen")
    page = folder / "listen/index.html"
    _log.info("listen: %s; what has trained for minutes sounds like noise with a shape", page)
    _log.info('other sounds: foley sample system=%s prompt="a cat meows"', last)
    _log.info("next: foley train experiment=tiny for half an hour, as docs/your-own-sounds.md has it")
    return page
