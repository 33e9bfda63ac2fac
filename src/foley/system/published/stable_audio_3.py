"""`StableAudio3Pipeline` and the two that edit with its components: inpainting and audio-to-audio; stereo."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foley.diffusion.process import DiffusionProcess
from foley.system.published.audio_pipelines import OfOobleck, decode_each, whole_frames


class StableAudio3(OfOobleck):
    """A rectified flow (Stable Audio 3): distilled, sampled in 8 steps without guidance; or its base model, with it."""

    edits = True
    varies = True
    trains = True

    @property
    def max_duration_seconds(self) -> float:
        return float(self.pipeline.duration_embedder.config.max_val)

    @property
    def is_distilled(self) -> bool:
        return bool(self.pipeline.scheduler.config.stochastic_sampling)

    @property
    def hop_samples(self) -> int:
        return int(self.pipeline.vae.downsampling_ratio)

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.vae.config.latent_dim)

    def encode(self, audio: Tensor, generator: torch.Generator | None) -> Tensor:
        """Always the same: this codec has no posterior."""
        latent: Tensor = self.pipeline.vae.encode(audio).latents
        return latent

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        latents: Tensor = self.pipeline(
            list(prompts), duration_seconds, negative_prompt=negative_prompt, output_type="latent", **options
        ).audios
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return decode_each(self.pipeline.vae, latents).clamp(-1, 1)  # as the pipeline does

    def inpaint(self, prompts: Sequence[str], recording: Tensor, start: int, end: int, **options: Any) -> Tensor:
        from diffusers import StableAudio3InpaintPipeline

        hop = self.hop_samples
        frames = -(-recording.shape[-1] // hop)
        # Every frame that holds a masked sample is made anew; the pipeline's own seconds leave out the last of them.
        mask = recording.new_ones(len(prompts), 1, frames)
        mask[..., start // hop : -(-end // hop)] = 0
        return self._from_recording(StableAudio3InpaintPipeline, prompts, recording, mask=mask, **options)

    def vary(self, prompts: Sequence[str], recording: Tensor, strength: float, **options: Any) -> Tensor:
        from diffusers import StableAudio3AudioToAudioPipeline

        kind = partial(self._from_recording, StableAudio3AudioToAudioPipeline)
        return kind(prompts, recording, init_noise_level=strength, **options)

    def _from_recording(self, kind: Any, prompts: Sequence[str], recording: Tensor, **options: Any) -> Tensor:
        pipeline = kind(**self.pipeline.components)
        pipeline.progress_bar = self.pipeline.progress_bar
        del options["guidance_scale"]  # 1, which `check_guidance` has seen to
        latents: Tensor = pipeline(
            list(prompts),
            # Half a sample less, so that no rounding makes it one frame more.
            (recording.shape[-1] - 0.5) / self.sample_rate_hz,
            audio=whole_frames(recording, self.hop_samples).expand(len(prompts), -1, -1),
            output_type="latent",
            **options,
        ).audios
        return latents

    def check_guidance(self, scale: float, edits: bool) -> None:
        if edits and scale != 1:
            raise ValueError(
                f"guidance_scale={scale:g}: Stable Audio 3 edits and varies a recording without guidance; "
                "give guidance_scale=1"
            )

    @property
    def process(self) -> DiffusionProcess:
        """A flow, whose timesteps are a thousand times those of the transformer."""
        return DiffusionProcess("flow")

    @torch.no_grad()
    def tokens(self, prompts: list[str], duration_seconds: float) -> tuple[Tensor, Tensor]:
        """Of the prompts and the duration, `[B, S, D]`, and which are no padding `[B, S]`."""
        text, valid = self.pipeline.encode_prompt(prompts, self.pipeline._execution_device, 1)
        context, valid = self.pipeline.prepare_cross_attention(
            text, valid, self._duration(len(prompts), duration_seconds)
        )
        return context, valid.bool()

    def predict(
        self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, duration_seconds: float
    ) -> Tensor:
        """The transformer in training, on latents of any number of frames."""
        velocity: Tensor = self.denoiser(
            noisy.to(context.dtype),
            timestep.to(context.dtype) / self.process.num_train_steps,
            encoder_hidden_states=context,
            global_hidden_states=self._duration(len(noisy), duration_seconds),
            encoder_attention_mask=context_mask.long(),
            return_dict=False,
        )[0]
        return velocity.to(noisy.dtype)

    @torch.no_grad()
    def _duration(self, count: int, seconds: float) -> Tensor:
        """What the transformer is told of it, `[count, D]`."""
        told: Tensor = self.pipeline.encode_duration(seconds, self.pipeline._execution_device, 1, count)
        return told
