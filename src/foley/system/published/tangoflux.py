"""TangoFlux (Hung et al. 2024): diffusers' Flux transformer on the latents of Stable Audio's codec; 44.1 kHz stereo.

Every clip takes the model's full length, half a minute, and is cut. Diffusers has no pipeline for it: ours is here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    ConfigMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioNumberConditioner
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from foley.core.components import CheckpointError
from foley.core.config import PIPELINE_INDEX
from foley.core.hub import Hub, load_pretrained
from foley.core.reading import read_json, reading
from foley.diffusion.process import DiffusionProcess
from foley.system.convert.tangoflux import load_part, to_ours, transformer_config
from foley.system.published.audio_pipelines import (
    AudioPipeline,
    OfOobleck,
    PublishedPipeline,
    decode_each,
    each_prompt,
)

_TRAIN_STEPS = 1000


class TangoFluxConditioner(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """What goes to the transformer beside the text: its mean, and a token of the duration.

    Args:
        text_dim: of the text encoder.
        joint_dim: of the transformer's joint attention, which is that of the text.
        max_duration_seconds: that the duration's embedding knows.
        num_frames: of each clip.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, text_dim: int, joint_dim: int, max_duration_seconds: float, num_frames: int) -> None:
        super().__init__()
        self.pooled = nn.Sequential(nn.Linear(text_dim, joint_dim), nn.ReLU())
        self.duration = StableAudioNumberConditioner(text_dim, 0, max_duration_seconds)

    def forward(self, text: Tensor, valid: Tensor, duration_seconds: float) -> tuple[Tensor, Tensor]:
        """Tokens `[B, S + 1, D]` and the pooled text `[B, D]`, of text `[B, S, D]` valid `[B, S]`."""
        weights = valid[..., None].to(text.dtype)
        pooled = self.pooled((text * weights).sum(1) / weights.sum(1))
        duration = self.duration(torch.tensor([duration_seconds], device=text.device))  # [1, 1, D]
        return torch.cat([text, duration.expand(len(text), -1, -1)], dim=1), pooled


class TangoFluxPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A call makes latents `[B, frames, channels]`, as `output_type="latent"` does in the pipelines of diffusers.

    The scheduler counts time from 1 to 0, which is what the transformer takes.
    """

    model_cpu_offload_seq = "text_encoder->conditioner->transformer->vae"

    # What `register_modules` and the base class set, which have no types of their own.
    register_modules: Callable[..., None]
    progress_bar: Callable[[Tensor], Iterable[Tensor]]
    _execution_device: torch.device
    text_encoder: Any
    tokenizer: Any
    conditioner: Any
    transformer: Any
    scheduler: Any

    def __init__(
        self,
        vae: AutoencoderOobleck,
        text_encoder: T5EncoderModel,
        tokenizer: Any,
        conditioner: TangoFluxConditioner,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            conditioner=conditioner,
            transformer=transformer,
            scheduler=scheduler,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        negative_prompt: str,
        duration_seconds: float,
        num_inference_steps: int,
        guidance_scale: float,
        generator: Sequence[torch.Generator],
    ) -> Tensor:
        """Raises nothing of its own; the prompts of a call should be alike, for padding is attended to."""
        guided = guidance_scale > 1
        condition = self._condition(prompts, negative_prompt if guided else None, duration_seconds)
        shape = (len(prompts), self.conditioner.config.num_frames, self.transformer.config.in_channels)
        place = {"device": self._execution_device, "dtype": self.transformer.dtype}
        latents = randn_tensor(shape, generator=list(generator), **place)
        # From 1 to 1 / n: the scheduler appends 0.
        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        for time in self.progress_bar(self.scheduler.timesteps):
            joint = torch.cat([latents, latents]) if guided else latents
            velocity = self.transformer(joint, timestep=time.expand(len(joint)), return_dict=False, **condition)[0]
            if guided:
                away, towards = velocity.chunk(2)
                velocity = away + guidance_scale * (towards - away)
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
        result: Tensor = latents
        return result

    def _condition(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float
    ) -> dict[str, Tensor]:
        """Arguments of the transformer; the negative prompt's rows come first."""
        text, valid = self._encode(prompts, padding=True)
        if negative_prompt is not None:
            others = [negative_prompt] * len(prompts)
            away, present = self._encode(others, padding="max_length", max_length=text.shape[1])
            text, valid = torch.cat([away, text]), torch.cat([present, valid])
        return self.arguments(text, valid, duration_seconds, self.conditioner.config.num_frames)

    def arguments(self, text: Tensor, valid: Tensor, duration_seconds: float, num_frames: int) -> dict[str, Tensor]:
        """What the transformer is given beside latent and time, of text `[B, S, D]` valid `[B, S]`."""
        tokens, pooled = self.conditioner(text, valid, duration_seconds)
        frames = torch.arange(num_frames, device=text.device, dtype=text.dtype)
        return {
            "encoder_hidden_states": tokens,
            "pooled_projections": pooled,
            "txt_ids": text.new_zeros(tokens.shape[1], 3),
            "img_ids": frames[:, None].expand(-1, 3),  # the frame's number on all three axes
        }

    def _encode(self, texts: Sequence[str], **length: Any) -> tuple[Tensor, Tensor]:
        """Text `[B, S, D]` and which of it is no padding `[B, S]`."""
        length = {"max_length": self.tokenizer.model_max_length, **length}
        batch = self.tokenizer(list(texts), truncation=True, return_tensors="pt", **length).to(self._execution_device)
        return self.text_encoder(batch.input_ids, attention_mask=batch.attention_mask)[0], batch.attention_mask


class TangoFlux(OfOobleck):
    """Prompts of different lengths are denoised apart: the transformer reads the padding."""

    trains = True

    @classmethod
    def load(cls, folder: Path, options: Any) -> AudioPipeline:
        return cls(TangoFluxPipeline.from_pretrained(folder, **options))

    @property
    def max_duration_seconds(self) -> float:
        config = self.pipeline.conditioner.config
        whole = config.num_frames * self.pipeline.vae.hop_length / self.sample_rate_hz
        return float(min(config.max_duration_seconds, whole))

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        def make(alike: Sequence[str], **others: Any) -> Tensor:
            latents: Tensor = self.pipeline(alike, negative_prompt or "", duration_seconds, **others)
            return latents

        return each_prompt(make, prompts, **options)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_each(self.pipeline.vae, latents.transpose(1, 2))

    @property
    def process(self) -> DiffusionProcess:
        """A flow, whose timesteps are a thousand times those of the transformer."""
        return DiffusionProcess("flow", num_train_steps=_TRAIN_STEPS)

    def tokens(self, prompts: list[str], duration_seconds: float) -> tuple[Tensor, Tensor]:
        """Of the text encoder, `[B, S, D]`, and which are no padding `[B, S]`."""
        text, valid = self.pipeline._encode(prompts, padding=True)
        return text, valid.bool()

    def predict(
        self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, duration_seconds: float
    ) -> Tensor:
        """The transformer in training, on latents of any number of frames."""
        condition = self.pipeline.arguments(context, context_mask, duration_seconds, noisy.shape[-1])
        inputs = noisy.transpose(1, 2).to(context.dtype), timestep.to(context.dtype) / _TRAIN_STEPS
        velocity: Tensor = self.denoiser(inputs[0], timestep=inputs[1], return_dict=False, **condition)[0]
        return velocity.transpose(1, 2).to(noisy.dtype)


@dataclass(frozen=True)
class PublishedTangoFlux(PublishedPipeline):
    """TangoFlux as its authors publish it: `config.json`, `tangoflux.safetensors` and `vae.safetensors`.

    Args:
        vae: arguments of `AutoencoderOobleck`; by default the codec of Stable Audio Open.
    """

    pipeline: str = "TangoFluxPipeline"
    vae: Any = None

    def open(self, hub: Hub) -> AudioPipeline:
        if (Path(self.repository) / PIPELINE_INDEX).is_file():  # saved by the pipeline itself
            return super().open(hub)
        config_file, weights, vae_file = (
            hub.file(self.repository, name) for name in ("config.json", "tangoflux.safetensors", "vae.safetensors")
        )
        with reading(config_file, "the config of TangoFlux", "download it again"):
            config = read_json(config_file, "the config of TangoFlux", "download it again")
            text_name = config.get("text_encoder_name", "google/flan-t5-large")
        text_config = hub.file(text_name, "config.json")  # at once where there is no network
        place = text_name if hub.directory is None else text_config.parent
        encoder, tokenizer = (
            load_pretrained(kind.from_pretrained, place, {}, CheckpointError, "give hub_dir=DIR", text_name)
            for kind in (T5EncoderModel, AutoTokenizer)
        )
        transformer, conditioner = self._denoiser(config, encoder.config.d_model, weights)
        vae = AutoencoderOobleck(**(self.vae or {}))
        load_part(vae, {f"vae.{key}": value for key, value in load_file(vae_file).items()}, "vae", str(vae_file))
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
        pipeline = TangoFluxPipeline(vae, encoder, tokenizer, conditioner, transformer, scheduler)
        parts: tuple[Any, ...] = (vae, encoder, transformer, conditioner)
        for part in parts:
            part.eval().to(getattr(torch, self.dtype))
        return TangoFlux(pipeline)

    def _denoiser(
        self, config: Any, text_dim: int, weights: Path
    ) -> tuple[FluxTransformer2DModel, TangoFluxConditioner]:
        ours = to_ours(load_file(weights), str(weights))
        transformer = FluxTransformer2DModel(**transformer_config(config, text_dim, str(weights)))
        lengths = config["max_duration"], config["audio_seq_len"]
        conditioner = TangoFluxConditioner(text_dim, config["joint_attention_dim"], *lengths)
        for name, part in (("transformer", transformer), ("conditioner", conditioner)):
            load_part(part, ours, name, str(weights))
        return transformer, conditioner
