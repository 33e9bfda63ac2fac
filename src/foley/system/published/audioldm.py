"""AudioLDM, MusicLDM and AudioLDM2: mono, through a mel spectrogram and a vocoder; clips of any length."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from foley.system.published.audio_pipelines import AudioPipeline


class _MelPipeline(AudioPipeline):
    """A U-Net on latents `[B, C, frames, frequencies]` of a mel spectrogram."""

    max_duration_seconds = math.inf

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
        audio: Tensor = self.pipeline.vocoder(mel[:, 0])
        return audio[:, None]

    @abstractmethod
    def _text(self, prompts: Sequence[str], negative_prompt: str | None, guided: bool) -> dict[str, Tensor]:
        """What the pipeline's call takes of the prompts."""


class AudioLDM(_MelPipeline):
    """`AudioLDMPipeline` (Liu et al. 2023): text is one embedding of CLAP."""

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> AudioPipeline:
        from diffusers import AudioLDMPipeline

        class Undecoded(AudioLDMPipeline):
            """Ends with the latents, for which the published call has no option."""

            def decode_latents(self, latents: Tensor) -> Tensor:
                return latents

            def mel_spectrogram_to_waveform(self, mel_spectrogram: Tensor) -> Tensor:
                return mel_spectrogram

        return cls(Undecoded.from_pretrained(folder, **options))

    @torch.no_grad()
    def _text(self, prompts: Sequence[str], negative_prompt: str | None, guided: bool) -> dict[str, Tensor]:
        named = {"prompt_embeds": self._embed(prompts)}
        if guided:
            named["negative_prompt_embeds"] = self._embed([negative_prompt or ""] * len(prompts))
        return named

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """`[B, D]`, each of unit length."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        tokens = tokenizer(list(texts), return_tensors="pt", **length).to(self.pipeline._execution_device)
        return normalize(self._features(encoder, tokens.input_ids, tokens.attention_mask), dim=-1)

    @staticmethod
    def _features(encoder: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        embeds: Tensor = encoder(tokens, attention_mask=mask).text_embeds
        return embeds


class MusicLDM(AudioLDM):
    """`MusicLDMPipeline` (Chen et al. 2024): AudioLDM's architecture with the text half of a whole CLAP."""

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> AudioPipeline:
        return super(AudioLDM, cls).load(folder, options)

    @staticmethod
    def _features(encoder: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        # The pipeline takes what recent transformers give as an object for the embedding itself.
        features = encoder.get_text_features(tokens, attention_mask=mask)
        embeds: Tensor = features if isinstance(features, Tensor) else features.pooler_output
        return embeds


class AudioLDM2(_MelPipeline):
    """`AudioLDM2Pipeline` (Liu et al. 2023): text through CLAP, T5 and a language model."""

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> AudioPipeline:
        from diffusers import AudioLDM2Pipeline
        from transformers import GPT2LMHeadModel

        # The index names GPT2Model, which transformers has taken the pipeline's generation methods from.
        language_model = GPT2LMHeadModel.from_pretrained(folder / "language_model", dtype=options["dtype"])
        return cls(AudioLDM2Pipeline.from_pretrained(folder, language_model=language_model, **options))

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
