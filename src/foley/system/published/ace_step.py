"""`AceStepPipeline`: ACE-Step 1.5, music from a caption and lyrics; repainting and covers; 48 kHz stereo."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foley.diffusion.process import DiffusionProcess
from foley.system.published.audio_pipelines import (
    OfOobleck,
    decode_each,
    each_length,
    each_prompt,
    stacked,
    whole_frames,
)

_TIMBRE_SECONDS = 30  # of the recording whose timbre is heard
_PEAK = 10 ** (-1 / 20)  # of full scale, -1 dB: to it the pipeline brings every clip


class AceStep(OfOobleck):
    """A flow in time, guided by APG with a learned embedding in the place of a negative prompt, or distilled (turbo).

    Prompts and lyrics of different lengths are denoised apart: the transformer reads the padding.
    """

    takes_negative_prompt = False
    takes_lyrics = True
    edits = True
    varies = True
    trains = True

    @property
    def is_distilled(self) -> bool:
        return bool(self.pipeline.is_turbo)

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
        if self.is_distilled and scale != 1:
            raise ValueError(
                f"guidance_scale={scale:g}: this ACE-Step is a turbo model, distilled with its guidance; "
                "give guidance_scale=1"
            )

    @property
    def process(self) -> DiffusionProcess:
        """A flow, whose timesteps are a thousand times those of the transformer."""
        return DiffusionProcess("flow")

    @torch.no_grad()
    def tokens(self, prompts: list[str], duration_seconds: float) -> tuple[Tensor, Tensor]:
        """Of prompts without lyrics, `[B, S, D]`, and which are no padding `[B, S]`; the empty one's are learned."""
        return stacked([self._condition(prompt, duration_seconds) for prompt in prompts])

    def _condition(self, prompt: str, duration_seconds: float) -> Tensor:
        """Lyrics, timbre and text as the pipeline joins them, `[1, S, D]`: no recording, whose silence is learned."""
        pipeline, device = self.pipeline, self.pipeline._execution_device
        instruction = pipeline._get_task_instruction(task_type="text2music")
        names = ("text_hidden_states", "text_attention_mask", "lyric_hidden_states", "lyric_attention_mask")
        encoded = pipeline.encode_prompt(
            [prompt], [""], device, audio_duration=duration_seconds, instruction=instruction
        )
        encoder = pipeline.condition_encoder
        frames = math.ceil(_TIMBRE_SECONDS * pipeline.latents_per_second)
        text: Tensor = encoder(
            **dict(zip(names, encoded, strict=True)),
            refer_audio_acoustic_hidden_states_packed=encoder.silence_latent[:, :frames].to(encoded[0]),
            refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=device),
        )[0]
        return text if prompt else encoder.null_condition_emb.to(text).expand_as(text)

    def predict(
        self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, duration_seconds: float
    ) -> Tensor:
        """The transformer in training, on latents of any number of frames."""
        return each_length(self._velocity, noisy, timestep / self.process.num_train_steps, context, context_mask)

    def _velocity(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        frames, time = noisy.transpose(1, 2).to(text.dtype), time.to(text.dtype)  # [B, L, C], [B]
        silence, _ = self.pipeline.prepare_src_latents(
            text.device, text.dtype, len(frames), latent_length=frames.shape[1]
        )
        velocity: Tensor = self.denoiser(
            hidden_states=frames,
            timestep=time,
            timestep_r=time,
            encoder_hidden_states=text,
            context_latents=torch.cat([silence, torch.ones_like(silence)], dim=-1),  # all of it is to be made
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).to(noisy.dtype)
