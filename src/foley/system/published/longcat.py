"""`LongCatAudioDiTPipeline`: a flow over the latents of a waveform VAE; mono, 24 kHz, up to half a minute."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foley.diffusion.process import DiffusionProcess
from foley.system.published.audio_pipelines import AudioPipeline, decode_each, each_length, each_prompt, stacked


class LongCat(AudioPipeline):
    """Guidance takes two calls of the transformer an evaluation. Prompts of different lengths are denoised apart.

    The convolutions over the text, and their norms, read the padding.
    """

    trains = True

    @property
    def sample_rate_hz(self) -> int:
        return int(self.pipeline.sample_rate)

    @property
    def max_duration_seconds(self) -> float:
        return float(self._frames(self.pipeline.max_wav_duration) * self.hop_samples / self.sample_rate_hz)

    @property
    def hop_samples(self) -> int:
        """Samples of a latent frame."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.latent_dim)

    def _frames(self, seconds: float) -> int:
        return int(seconds * self.sample_rate_hz // self.hop_samples)

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        frames = -(-round(duration_seconds * self.sample_rate_hz) // self.hop_samples)
        # The pipeline rounds down; half a frame more, so that no rounding makes it one fewer.
        seconds = (frames + 0.5) * self.hop_samples / self.sample_rate_hz

        def make(alike: Sequence[str], **others: Any) -> Tensor:
            latents: Tensor = self.pipeline(
                list(alike), negative_prompt, audio_duration_s=seconds, output_type="latent", **others
            ).audios
            return latents

        return each_prompt(make, prompts, **options)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_each(self.pipeline.vae, latents.transpose(1, 2))

    def encode(self, audio: Tensor, generator: torch.Generator | None) -> Tensor:
        """A latent `[B, C, L]` of `[B, 1, T]`: drawn with `generator`, or the mean without one."""
        drawn = {"sample_posterior": generator is not None, "generator": generator}
        latent: Tensor = self.pipeline.vae.encode(audio, **drawn).latents
        return latent

    @property
    def process(self) -> DiffusionProcess:
        """A flow, whose time the transformer counts from noise (0) to data (1)."""
        return DiffusionProcess("flow")

    @torch.no_grad()
    def tokens(self, prompts: list[str], duration_seconds: float) -> tuple[Tensor, Tensor]:
        """Of the text encoder, `[B, S, D]`, and which are no padding `[B, S]`; those of the empty prompt are zero."""
        from diffusers.pipelines.longcat_audio_dit.pipeline_longcat_audio_dit import _normalize_text  # its call's own

        rows = []
        for prompt in prompts:
            text, _ = self.pipeline.encode_prompt([_normalize_text(prompt)], self.pipeline._execution_device)
            rows.append(text if prompt else torch.zeros_like(text))
        return stacked(rows)

    def predict(
        self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, duration_seconds: float
    ) -> Tensor:
        """The transformer in training, on latents of any number of frames."""
        time = 1 - timestep / self.process.num_train_steps
        return each_length(self._velocity, noisy, time, context, context_mask)

    def _velocity(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """From data to noise, `[B, C, L]`: the transformer's own leads from noise to data."""
        frames = noisy.transpose(1, 2).to(text.dtype)  # [B, L, C]
        velocity: Tensor = self.denoiser(
            hidden_states=frames,
            encoder_hidden_states=text,
            encoder_attention_mask=torch.ones_like(text[..., 0], dtype=torch.bool),
            timestep=time.to(text.dtype),
            attention_mask=torch.ones_like(frames[..., 0], dtype=torch.bool),
            latent_cond=torch.zeros_like(frames),
        ).sample
        return -velocity.transpose(1, 2).to(noisy.dtype)
