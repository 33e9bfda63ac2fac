"""`AceStepPipeline`: ACE-Step 1.5, music from a caption and lyrics; repainting and covers; 48 kHz stereo."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foley.system.published.audio_pipelines import AudioPipeline, decode_each, each_prompt, whole_frames

_PEAK = 10 ** (-1 / 20)  # of full scale, -1 dB: to it the pipeline brings every clip


class AceStep(AudioPipeline):
    """A flow in time, guided by APG with a learned embedding in the place of a negative prompt, or distilled (turbo).

    Prompts and lyrics of different lengths are denoised apart: the transformer reads the padding.
    """

    takes_negative_prompt = False
    takes_lyrics = True
    edits = True
    varies = True

    @property
    def sample_rate_hz(self) -> int:
        return int(self.pipeline.sample_rate)

    @property
    def channels(self) -> int:
        return int(self.pipeline.vae.config.audio_channels)

    @property
    def max_duration_seconds(self) -> float:
        """Of the silence that stands where there is no recording."""
        return float(self.pipeline.condition_encoder.silence_latent.shape[1] / self.pipeline.latents_per_second)

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        return self._make(prompts, audio_duration=duration_seconds, **options)

    def inpaint(self, prompts: Sequence[str], recording: Tensor, start: int, end: int, **options: Any) -> Tensor:
        rate = self.sample_rate_hz
        mask = {"repainting_start": start / rate, "repainting_end": end / rate}
        return self._make(prompts, task_type="repaint", **self._source(recording), **mask, **options)

    def vary(self, prompts: Sequence[str], recording: Tensor, strength: float, **options: Any) -> Tensor:
        """A cover: what the recording's tokens of meaning say, made anew; `strength` is the share of the caption."""
        if self.pipeline.audio_tokenizer is None or self.pipeline.audio_token_detokenizer is None:
            raise ValueError("init=: this ACE-Step came without the audio tokenizer that covers need; leave it out")
        source = self._source(recording)
        return self._make(prompts, task_type="cover", audio_cover_strength=1 - strength, **source, **options)

    def _source(self, recording: Tensor) -> dict[str, Any]:
        whole = whole_frames(recording, self.pipeline.vae.hop_length)
        return {"src_audio": whole, "audio_duration": recording.shape[-1] / self.sample_rate_hz}

    def _make(self, prompts: Sequence[str], **options: Any) -> Tensor:
        def make(alike: Sequence[str], generator: Sequence[Any], **others: Any) -> Tensor:
            lyrics = [others.pop("lyrics", "")] * len(alike)
            # The VAE draws the recording's latent from PyTorch's own stream: here always the same.
            with torch.random.fork_rng():
                torch.manual_seed(0)
                latents: Tensor = self.pipeline(
                    list(alike), lyrics, generator=list(generator), output_type="latent", **others
                ).audios
            return latents

        return each_prompt(make, prompts, **options)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_each(self.pipeline.vae, latents.transpose(1, 2))

    def level(self, audio: Tensor) -> Tensor:
        return audio * (_PEAK / audio.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-6))

    def check_guidance(self, scale: float, edits: bool) -> None:
        if self.pipeline.is_turbo and scale != 1:
            raise ValueError(
                f"guidance_scale={scale:g}: this ACE-Step is a turbo model, distilled with its guidance; "
                "give guidance_scale=1"
            )
