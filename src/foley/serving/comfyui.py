"""Nodes of ComfyUI: load a system, generate, edit, vary. `docs/how-to/comfyui.md` says how they get there.

A node is a class with `INPUT_TYPES`, `RETURN_TYPES`, `FUNCTION` and `CATEGORY`; audio between nodes is a mapping of
`waveform` `[B, channels, T]` and `sample_rate`. ComfyUI computes a node again where one of its inputs has changed, so
that a seed stands for its sound; a system also where its files have (`LoadSystem.IS_CHANGED`).
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from foley.core.config import compose_aside, shipped
from foley.core.devices import resolve_device
from foley.core.numbers import NumberRange
from foley.data.audio import write_wav
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.editing import Edit, EditMask, EditMasks, Variation
from foley.generation.options import OPTION_NUMBERS
from foley.generation.pipeline_to_audio import PipelineToAudio, open_generator
from foley.generation.prompts import Clip
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio

Generator = TextToAudio | PipelineToAudio
Audio = dict[str, Any]

_CATEGORY = "foley"
_SYSTEM, _ADAPTERS = "FOLEY_SYSTEM", "FOLEY_ADAPTERS"
_UNBOUNDED = 1e6  # where an option has no end, a widget has
_OWN = {"steps": 0, "duration_seconds": 0.0, "guidance_scale": -1.0}
"""Below all that the option may be: the system's own choice. A widget cannot be left empty."""


def _number(name: str, default: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    """The widget of an option, with the limits of the command line."""
    numbers: NumberRange = OPTION_NUMBERS[name]
    least = _OWN.get(name, numbers.least or 0)
    most = _UNBOUNDED if numbers.most is None else numbers.most
    if numbers.whole:
        return "INT", {"default": int(default), "min": int(least), "max": int(most), "tooltip": tooltip}
    limits = {"default": float(default), "min": float(least), "max": float(most), "step": 0.05, "round": False}
    return "FLOAT", {**limits, "tooltip": tooltip}


def _text(default: str, tooltip: str, multiline: bool = False) -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": default, "multiline": multiline, "tooltip": tooltip}


def _devices() -> list[str]:
    """Names that this machine may take; auto is the first GPU."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["auto", "cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def _sampling() -> dict[str, Any]:
    """Inputs that all nodes which make sounds share."""
    seed, seed_widget = _number("seed", 0, "of all that is random: the same seed is the same sound")
    return {
        "system": (_SYSTEM,),
        "prompt": _text("a dog barks", "what is to be heard", multiline=True),
        "negative_prompt": _text("", "what guidance leads away from", multiline=True),
        "seed": (seed, {**seed_widget, "control_after_generate": True}),
        "steps": _number("steps", _OWN["steps"], "of the solver; 0 is the system's own choice"),
        "guidance_scale": _number("guidance_scale", _OWN["guidance_scale"], "w; -1 is the system's own choice"),
        "accelerator": (list(_accelerators()), {"default": "none", "tooltip": "reuses what was computed before"}),
    }


def _settings(options: Mapping[str, Any]) -> GenerationSettings:
    """Of the widgets' values; raises ValueError for one outside of its limits."""
    chosen = {name: None if options.get(name) == own else options.get(name) for name, own in _OWN.items()}
    scale = chosen["guidance_scale"]
    if scale is not None:
        OPTION_NUMBERS["guidance_scale"].check("guidance_scale", scale)
    return GenerationSettings(
        duration_seconds=chosen["duration_seconds"],
        num_steps=chosen["steps"],
        guidance=None if scale is None else ClassifierFreeGuidance(scale),
        negative_prompt=options["negative_prompt"],
        accelerator=_accelerator(options["accelerator"]),
        source=options.get("source"),
    )


def _accelerator(name: str) -> Any:
    """As its config makes it; what is not of ours by name is none of the choices that ComfyUI lets through."""
    return None if name == "none" else instantiate(_accelerators()[name])


@lru_cache
def _accelerators() -> Any:
    """Those that `foley serve` names: they need no calibration."""
    return compose_aside("script/serve").accelerators


class _Bar:
    """Wraps the evaluations of a run: moves ComfyUI's bar, and ends where its user interrupts."""

    def __init__(self, num_batches: int) -> None:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar

        self._look, self._bar, self._num_batches = throw_exception_if_processing_interrupted, ProgressBar, num_batches
        self._shown: Any = None
        self._done = 0

    def __call__(self, evaluations: Iterable[int]) -> Iterator[int]:
        numbers = list(evaluations)
        total = len(numbers) * self._num_batches
        self._shown = self._shown or self._bar(total)
        for number in numbers:
            self._look()
            yield number
            self._done += 1
            self._shown.update_absolute(min(self._done, total), total)


def _generate(system: Generator, clips: Sequence[Clip], options: Mapping[str, Any]) -> torch.Tensor:
    """`[B, channels, T]`; raises what `generate_clips` does, and ComfyUI's own where its user interrupts."""
    settings = _settings(options)
    bar = _Bar(ceil(len(clips) / settings.batch_size))
    # Outside of inference mode, in which ComfyUI calls its nodes: its tensors could not be written to elsewhere.
    with torch.inference_mode(False), torch.no_grad():
        return system.generate_clips(clips, GenerationSettings(**{**vars(settings), "progress": bar})).audio


def _from_recordings(audio: Audio, system: Generator, source: Any, options: Mapping[str, Any]) -> Audio:
    """Each sound of a batch made anew, as `source` of its file says; its seed is the first plus its place."""
    made = []
    with tempfile.TemporaryDirectory(prefix="foley-comfyui-") as folder:
        for row, waveform in enumerate(audio["waveform"]):
            file = Path(folder) / f"{row}.wav"
            write_wav(file, waveform.detach().cpu(), int(audio["sample_rate"]), peak_ceiling=inf)
            clip = Clip(options["prompt"], options["seed"] + row)
            made.append(_generate(system, [clip], {**options, "source": source(file)}))
    return {"waveform": torch.cat(made), "sample_rate": system.sample_rate_hz}


def _newest_seconds(path: Path) -> float:
    """When a file, or a folder or a file in it, was last written; 0 where there is none."""
    files = [path, *path.glob("*")] if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


class UseAdapter:
    """An adapter of `experiment=lora` for a system to be loaded with; several are chained, and add up."""

    RETURN_TYPES, RETURN_NAMES, FUNCTION, CATEGORY = (_ADAPTERS,), ("adapters",), "add", _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        scale = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05, "tooltip": "how much of it is added"}
        required = {"path": _text("", "the adapter's folder"), "scale": ("FLOAT", scale)}
        return {"required": required, "optional": {"adapters": (_ADAPTERS,)}}

    @classmethod
    def IS_CHANGED(cls, path: str, scale: float, adapters: Any = ()) -> float:  # noqa: N802 -- ComfyUI's name
        """As of a system: adapters that were trained further are another input of what loads them."""
        return _newest_seconds(Path(path).expanduser())

    def add(self, path: str, scale: float, adapters: Sequence[Mapping[str, Any]] = ()) -> tuple[list[Any]]:
        return ([*adapters, {"path": path, "scale": scale}],)


class LoadSystem:
    """A system of ours, a published one, or a pipeline of diffusers, on a device."""

    RETURN_TYPES, RETURN_NAMES, FUNCTION, CATEGORY = (_SYSTEM,), ("system",), "load", _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        name = _text("", "a folder, a checkpoint, OWNER/NAME on the hub, or a published name; empty: what ships")
        required = {"name": name, "device": (_devices(), {"default": "auto"})}
        return {"required": required, "optional": {"adapters": (_ADAPTERS,)}}

    @classmethod
    def IS_CHANGED(cls, name: str, device: str, adapters: Any = ()) -> float:  # noqa: N802 -- ComfyUI's name
        """The time of the newest file, so that a run which trains on is loaded again."""
        return _newest_seconds(Path(name).expanduser() if name else shipped("demo"))

    def load(self, name: str, device: str, adapters: Sequence[Mapping[str, Any]] = ()) -> tuple[Generator]:
        with torch.inference_mode(False):
            return (open_generator(name or shipped("demo"), resolve_device(device), adapters=list(adapters)),)


class Generate:
    """Sounds of a prompt; the first has the seed, the next the one after it."""

    RETURN_TYPES, RETURN_NAMES, FUNCTION, CATEGORY = ("AUDIO",), ("audio",), "generate", _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        own = "of each; 0 is the system's own choice"
        duration = _number("duration_seconds", _OWN["duration_seconds"], own)
        num = _number("num", 1, "sounds, one batch of audio")
        return {"required": {**_sampling(), "duration_seconds": duration, "num": num}}

    def generate(self, system: Generator, prompt: str, seed: int, num: int, **options: Any) -> tuple[Audio]:
        OPTION_NUMBERS["num"].check("num", num)
        clips = [Clip(prompt, seed + row) for row in range(num)]
        return ({"waveform": _generate(system, clips, options), "sample_rate": system.sample_rate_hz},)


class EditSound:
    """Parts of each sound made anew (`foley.generation.editing`); its other samples come back as they were."""

    RETURN_TYPES, RETURN_NAMES, FUNCTION, CATEGORY = ("AUDIO",), ("audio",), "edit", _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        start = _number("mask_start_seconds", 0.5, "where what is replaced begins")
        length = _number("mask_length_seconds", 0.5, "how long it is; past the end it goes on")
        boundary = _number("boundary_seconds", EditMask.boundary_seconds, "how much of each side of it the model sees")
        masks = {"mask_start_seconds": start, "mask_length_seconds": length, "boundary_seconds": boundary}
        several = _text("", "several parts in the place of start and length: [[START, LENGTH], ...] in seconds")
        return {"required": {"audio": ("AUDIO",), **_sampling(), **masks}, "optional": {"masks": several}}

    def edit(
        self,
        audio: Audio,
        system: Generator,
        mask_start_seconds: float,
        mask_length_seconds: float,
        boundary_seconds: float,
        masks: str = "",
        **options: Any,
    ) -> tuple[Audio]:
        one = EditMask(mask_start_seconds, mask_length_seconds, boundary_seconds)
        mask = EditMasks.parse(masks, boundary_seconds) if masks.strip() else one
        return (_from_recordings(audio, system, lambda file: Edit(file, mask), options),)


class VarySound:
    """Each sound noised and denoised again (`foley.generation.editing.Variation`)."""

    RETURN_TYPES, RETURN_NAMES, FUNCTION, CATEGORY = ("AUDIO",), ("audio",), "vary", _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        strength = _number("strength", Variation.strength, "0 is the sound through the codec, 1 another one")
        return {"required": {"audio": ("AUDIO",), **_sampling(), "strength": strength}}

    def vary(self, audio: Audio, system: Generator, strength: float, **options: Any) -> tuple[Audio]:
        return (_from_recordings(audio, system, lambda file: Variation(file, strength), options),)


NODE_CLASS_MAPPINGS = {
    "FoleyLoadSystem": LoadSystem,
    "FoleyUseAdapter": UseAdapter,
    "FoleyGenerate": Generate,
    "FoleyEdit": EditSound,
    "FoleyVariation": VarySound,
}
"""By the names that saved workflows know them by."""
NODE_DISPLAY_NAME_MAPPINGS = {
    "FoleyLoadSystem": "Foley: load a system",
    "FoleyUseAdapter": "Foley: adapter",
    "FoleyGenerate": "Foley: generate sounds",
    "FoleyEdit": "Foley: edit a sound",
    "FoleyVariation": "Foley: variation of a sound",
}
