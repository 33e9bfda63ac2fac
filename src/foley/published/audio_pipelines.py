"""The text-to-audio pipelines of diffusers, each with what is particular to it."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class AudioPipeline(Protocol):
    """A pipeline of diffusers whose latents are asked for, and decoded, apart from each other."""

    pipeline: Any

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def sample_rate_hz(self) -> int: ...

    @property
    def max_duration_seconds(self) -> float:
        """What the model can make at all."""

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        """One latent per prompt, of clips as long or longer; `options` are those of the pipeline's call."""

    def decode(self, latents: Tensor) -> Tensor:
        """Audio `[B, channels, T or more]`."""


class StableAudio:
    """`StableAudioPipeline` (Evans et al. 2024): stereo; every clip takes the model's full length, and is cut."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = self.pipeline.transformer
        return module

    @property
    def sample_rate_hz(self) -> int:
        return int(self.pipeline.vae.config.sampling_rate)

    @property
    def max_duration_seconds(self) -> float:
        num_frames: int = self.pipeline.transformer.config.sample_size
        return float(num_frames * self.pipeline.vae.hop_length / self.sample_rate_hz)

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        latents: Tensor = self.pipeline(
            list(prompts),
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
            audio_end_in_s=duration_seconds,
            output_type="latent",
            **options,
        ).audios
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        # One by one: at full length an item takes gigabytes.
        return torch.cat([self.pipeline.vae.decode(latent[None]).sample for latent in latents])


class AudioLDM2:
    """`AudioLDM2Pipeline` (Liu et al. 2023): mono, through a mel spectrogram and a vocoder; of any length."""

    max_duration_seconds = math.inf

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = self.pipeline.unet
        return module

    @property
    def sample_rate_hz(self) -> int:
        return int(self.pipeline.vocoder.config.sampling_rate)

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        frame_samples = math.prod(self.pipeline.vocoder.config.upsample_rates)
        multiple = self.pipeline.vae_scale_factor
        num_frames = math.ceil(round(duration_seconds * self.sample_rate_hz) / frame_samples / multiple) * multiple
        guided = options["guidance_scale"] > 1
        latents: Tensor = self.pipeline(
            # Half a frame more, so that no rounding makes it one fewer.
            audio_length_in_s=(num_frames + 0.5) * frame_samples / self.sample_rate_hz,
            output_type="latent",
            **self._text(prompts, negative_prompt, guided),
            **options,
        ).audios
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        mel = self.pipeline.vae.decode(1 / self.pipeline.vae.config.scaling_factor * latents).sample
        audio: Tensor = self.pipeline.mel_spectrogram_to_waveform(mel)
        return audio[:, None]

    @torch.no_grad()
    def _text(self, prompts: Sequence[str], negative_prompt: str | None, guided: bool) -> dict[str, Tensor]:
        """Embedded one by one: the language model reads the padding of a batch, and an item must ignore its batch."""
        device = self.pipeline._execution_device
        rows = [
            self.pipeline.encode_prompt(text, device, 1, guided, negative_prompt=negative_prompt) for text in prompts
        ]
        tokens = max(mask.shape[1] for _, mask, _ in rows)
        text = [pad(embeds, (0, 0, 0, tokens - embeds.shape[1])) for embeds, _, _ in rows]
        masks = [pad(mask, (0, tokens - mask.shape[1])) for _, mask, _ in rows]
        generated = [embeds for _, _, embeds in rows]
        columns = {"prompt_embeds": text, "attention_mask": masks, "generated_prompt_embeds": generated}
        named = {name: torch.cat([row[-1:] for row in column]) for name, column in columns.items()}
        if guided:  # the negative prompt comes first
            named |= {f"negative_{name}": torch.cat([row[:1] for row in column]) for name, column in columns.items()}
        return named
