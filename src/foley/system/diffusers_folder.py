"""A system as the folder of a pipeline of diffusers, and back.

Denoiser, codec and normaliser are models of diffusers around the modules of ours, a T5 encoder is that of transformers,
and the scheduler is diffusers' own: DDIM, or Euler along a flow, which take the steps that ours take. The folder names
the class of its pipeline in a file of one line, so that diffusers opens it where foley is installed:
`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from foley.core.components import CheckpointError, build_component, current_config, rebuild_component, written_out
from foley.core.config import PIPELINE_INDEX, locate
from foley.core.files import write_json, write_text
from foley.core.pipelines import OUR_PIPELINE
from foley.core.rates import clip_size
from foley.core.reading import read_json, reading
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.models.text import FrozenT5Conditioner
from foley.models.text.frozen_t5 import token_ids
from foley.system.checkpoint import CAPTIONS_FILE
from foley.system.system import System

_model: Any = ModelMixin
_output: Any = AudioPipelineOutput  # whose type knows arrays alone
_CODE_FILE = "pipeline"
_ASSET = "asset:"
_WRAPPED = ("denoiser", "codec", "normaliser")
_PREDICTION_TYPES = {"v": "v_prediction", "epsilon": "epsilon", "x0": "sample"}
_A_FOLDER, _EXPORT_AGAIN = "the folder of a pipeline", "export it again (foley export format=diffusers)"


class WrappedComponent(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A component of ours as a model of diffusers; called as the component is.

    Args:
        component: its plain config, with Hydra's `_target_`, of which only classes of this package are built.
    """

    # What the base classes set, which have no types of their own.
    config: Any

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, component: Mapping[str, Any]) -> None:
        super().__init__()
        self.module: Any = build_component(current_config(component))

    @classmethod
    def of(cls, module: nn.Module, config: Mapping[str, Any]) -> Self:
        """A copy of `module`, which `config` describes."""
        wrapped = cls(dict(config))
        wrapped.module.load_state_dict(module.state_dict())
        return wrapped.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers does, and copy the files that the component names."""
        _model.save_pretrained(self, save_directory, *args, **kwargs)
        stored = Path(save_directory) / str(self.config_name)
        config = json.loads(stored.read_text(encoding="utf-8"))
        for option in getattr(self.module, "asset_options", ()):
            if config["component"].get(option) is None:
                continue
            file = locate(config["component"][option])
            shutil.copyfile(file, Path(save_directory) / file.name)
            config["component"][option] = _ASSET + file.name
        write_json(stored, config)

    @classmethod
    def load_config(  # type: ignore[override]  # it returns a config alone as well
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """As diffusers does, with the files that lie beside the config named where they are."""
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        component = (loaded[0] if isinstance(loaded, tuple) else loaded)["component"]
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        for option, value in component.items():
            if isinstance(value, str) and value.startswith(_ASSET):
                component[option] = str(folder.absolute() / Path(value.removeprefix(_ASSET)).name)
        return loaded


class FoleyPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text to audio by a system of ours in the manner of diffusers.

    Args:
        text_encoder, tokenizer: a T5 of transformers with its tokenizer; or a wrapped encoder of ours, and None.
        text: the config of the system's text encoder.
        process: that of its process, by which it becomes a system again.
        trained_seconds: the length of its training's clips.
    """

    model_cpu_offload_seq = "text_encoder->denoiser->normaliser->codec"
    _optional_components: ClassVar = ["tokenizer"]

    # What `register_modules` and the base class set, which have no types of their own.
    register_modules: Callable[..., None]
    register_to_config: Callable[..., None]
    progress_bar: Callable[[Tensor], Iterable[Tensor]]
    save_pretrained: Callable[..., None]
    _execution_device: torch.device
    config: Any
    denoiser: Any
    codec: Any
    normaliser: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(
        self,
        denoiser: WrappedComponent,
        codec: WrappedComponent,
        normaliser: WrappedComponent,
        scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler,
        text_encoder: Any,
        tokenizer: Any = None,
        text: Mapping[str, Any] | None = None,
        process: Mapping[str, Any] | None = None,
        trained_seconds: float | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            denoiser=denoiser,
            codec=codec,
            normaliser=normaliser,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(text=text, process=process, trained_seconds=trained_seconds)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        duration_seconds: float | None = None,
        negative_prompt: str = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        guidance_rescale: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "np",
    ) -> AudioPipelineOutput:
        """Audio `[B, channels, T]` as `audios`, or normalised latents `[B, C, L]` where `output_type` is "latent".

        Args:
            duration_seconds: of each clip; None is the training's.
            generator: one in all or one per prompt.
            latents: standard normal noise `[B, C, L]` to begin with, instead of the generator's.
            output_type: "np", "pt" or "latent".
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        codec = self.codec.module
        seconds = duration_seconds or self.config.trained_seconds or 5.0
        num_samples, num_frames = clip_size(seconds, codec.sample_rate_hz, codec.hop_samples)
        guidance = ClassifierFreeGuidance(guidance_scale, guidance_rescale)
        negative = self._encode([negative_prompt]) if guidance.needs_negative else None
        denoise = guidance.wrap(self.denoiser, self._encode(prompts), negative)
        shape = (len(prompts), self.denoiser.module.latent_channels, num_frames)
        place = {"device": self._execution_device, "dtype": self.denoiser.dtype}
        noisy = randn_tensor(shape, generator=generator, **place) if latents is None else latents.to(**place)
        for time in self.progress_bar(self._timesteps(num_inference_steps)):
            prediction = denoise(noisy, time.expand(len(noisy)))
            noisy = self.scheduler.step(prediction, time, noisy, return_dict=False)[0]
        if output_type == "latent":
            return _output(audios=noisy)
        audio = codec.decode(self.normaliser.module.denormalise(noisy))[..., :num_samples].float()
        return _output(audios=audio if output_type == "pt" else audio.cpu().numpy())

    def _timesteps(self, num_steps: int) -> Tensor:
        asked: dict[str, Any] = {"num_inference_steps": num_steps}
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):  # from 1 to 1 / n: it appends the 0
            asked = {"sigmas": torch.linspace(1, 1 / num_steps, num_steps).tolist()}
        scheduler: Any = self.scheduler
        scheduler.set_timesteps(**asked, device=self._execution_device)
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def _encode(self, prompts: list[str]) -> Conditioning:
        if self.tokenizer is None:
            text = self.text_encoder(prompts)
            return Conditioning(text.embeddings, text.mask)
        ids = [token_ids(self.tokenizer, each, self.config.text["max_length"]) for each in prompts]
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self._execution_device)
        mask = batch["attention_mask"].bool()
        hidden = self.text_encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        return Conditioning((hidden * mask[..., None]).to(self.denoiser.dtype), mask)


# ---------------------------------------------------------------- there


def save_pipeline(system: System, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `system` as the folder of a pipeline, weights of our components as `dtype` (None keeps float32).

    Raises ValueError for a student, and for a process or a text encoder that diffusers has no scheduler or model for.
    """
    directory, pipeline = Path(directory), as_pipeline(system)
    if dtype is not None:
        for part in (getattr(pipeline, name) for name in (*_WRAPPED, "text_encoder")):
            if isinstance(part, WrappedComponent):
                part.to(dtype)
    pipeline.save_pretrained(directory)
    if pipeline.tokenizer is not None:  # beside the encoder too, where encoder and tokenizer are read as one
        pipeline.tokenizer.save_pretrained(directory / "text_encoder")
    if system.captions:
        write_text(directory / CAPTIONS_FILE, "\n".join(system.captions) + "\n")
    write_text(directory / f"{_CODE_FILE}.py", f"from {__name__} import {OUR_PIPELINE}  # noqa: F401\n")
    index = json.loads((directory / PIPELINE_INDEX).read_text(encoding="utf-8"))
    write_json(directory / PIPELINE_INDEX, {**index, "_class_name": [_CODE_FILE, OUR_PIPELINE]})


def as_pipeline(system: System) -> FoleyPipeline:
    """The pipeline of a system, with copies of its components; raises as `save_pipeline` does."""
    if system.consistency is not None:
        raise ValueError(
            "a student samples in steps of its own, for which diffusers has no scheduler: export its teacher"
        )
    configs, text = system.configs, system.modules["text"]
    parts = {name: WrappedComponent.of(system.modules[name], configs[name]) for name in _WRAPPED}
    if isinstance(text, FrozenT5Conditioner):
        encoder, tokenizer = text.encoder, text.tokenizer
    elif text.trainable:
        encoder, tokenizer = WrappedComponent.of(text, configs["text"]), None
    else:
        raise ValueError(f"a pipeline of ours takes T5 or a text encoder that trained along, not {type(text).__name__}")
    return FoleyPipeline(
        **parts,
        scheduler=scheduler_of(system.process, configs["process"]),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text=dict(configs["text"]),
        process=dict(configs["process"]),
        trained_seconds=system.trained_seconds,
    )


def scheduler_of(
    process: DiffusionProcess, config: Mapping[str, Any]
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """Of diffusers, for a process that `config` describes; raises ValueError where it has none."""
    if type(process) is not DiffusionProcess:
        raise ValueError(f"diffusers' schedulers do not take the steps of {type(process).__name__}")
    if process.is_flow:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=process.num_train_steps)
    options = written_out(config)
    return DDIMScheduler(
        num_train_timesteps=process.num_train_steps,
        beta_start=options["beta_start"],
        beta_end=options["beta_end"],
        beta_schedule="scaled_linear",
        prediction_type=_PREDICTION_TYPES[process.prediction],
        rescale_betas_zero_snr=process.zero_terminal_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )


# ---------------------------------------------------------------- and back


def load_pipeline(directory: str | Path, with_codec: bool = True) -> System:
    """The system of a folder that `save_pipeline` wrote; raises CheckpointError, and DamagedFileError.

    Args:
        with_codec: False leaves the codec out.
    """
    directory = Path(directory)
    index = directory / PIPELINE_INDEX
    with reading(index, _A_FOLDER, _EXPORT_AGAIN):
        described = read_json(index, _A_FOLDER, _EXPORT_AGAIN)
        configs: dict[str, Any] = {name: current_config(described[name]) for name in ("process", "text")}
        parts = [*_WRAPPED, *(["text_encoder"] if described["tokenizer"][0] is None else [])]
    modules: dict[str, nn.Module] = {}
    for name in parts:
        if name == "codec" and not with_codec:
            continue
        component = "text" if name == "text_encoder" else name
        modules[component], configs[component] = _unwrapped(directory / name)
    if "text" not in modules:
        modules["text"] = _frozen_text(directory, configs["text"])
    captions = directory / CAPTIONS_FILE
    lines = captions.read_text(encoding="utf-8").splitlines() if captions.is_file() else []
    process = rebuild_component(configs["process"], str(index))
    return System(modules, process, configs, captions=lines, trained_seconds=described.get("trained_seconds"))


def _unwrapped(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The component in `folder`, and its config."""
    try:
        wrapped = WrappedComponent.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no component of a pipeline of ours ({error}); {_EXPORT_AGAIN}"
        ) from error
    module: nn.Module = wrapped.module.float().eval()
    return module, dict(wrapped.config["component"])


def _frozen_text(directory: Path, config: Mapping[str, Any]) -> nn.Module:
    """The T5 of the folder, with the tokenizer that lies beside it."""
    folder = directory.absolute() / "text_encoder"
    text: nn.Module = build_component({**config, "name_or_path": str(folder)}, str(directory / PIPELINE_INDEX))
    return text.eval()
