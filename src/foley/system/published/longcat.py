"""`LongCatAudioDiTPipeline`: a flow over the latents of a waveform VAE; mono, 24 kHz, up to half a minute."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from foley.system.published.audio_pipelines import AudioPipeline, decode_each, each_prompt


class LongCat(AudioPipeline):
    """Guidance takes two calls of the transformer an evaluation. Prompts of different lengths are denoised apart.

    The convolutions over the text, and their norms, read the padding.
    """

    @property
    def sample_rate_hz(self) -> int:
        return int(self.pipeline.sample_rate)

    @property
    def max_duration_seconds(self) -> float:
        return float(self._frames(self.pipeline.max_wav_duration) * self._hop / self.sample_rate_hz)

    @property
    def _hop(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    def _frames(self, seconds: float) -> int:
        return int(seconds * self.sample_rate_hz // self._hop)

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        frames = -(-round(duration_seconds * self.sample_rate_hz) // self._hop)
        # The pipeline rounds down; half a frame more, so that no rounding makes it one fewer.
        seconds = (frames + 0.5) * self._hop / self.sample_rate_hz

        def make(alike: Sequence[str], **others: Any) -> Tensor:
            latents: Tensor = self.pipeline(
                list(alike), negative_prompt, audio_duration_s=seconds, output_type="latent", **others
            ).audios
            return latents

        return each_prompt(make, prompts, **options)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_each(self.pipeline.vae, latents.transpose(1, 2))
