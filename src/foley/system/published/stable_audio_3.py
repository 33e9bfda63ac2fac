"""`StableAudio3Pipeline` and the two that edit with its components: inpainting and audio-to-audio; stereo."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from foley.system.published.audio_pipelines import OfOobleck, decode_each, whole_frames


class StableAudio3(OfOobleck):
    """A rectified flow (Stable Audio 3): distilled, sampled in 8 steps without guidance; or its base model, with it."""

    edits = True
    varies = True

    @property
    def max_duration_seconds(self) -> float:
        return float(self.pipeline.duration_embedder.config.max_val)

    @property
    def _hop(self) -> int:
        return int(self.pipeline.vae.downsampling_ratio)

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

        hop = self._hop
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
            audio=whole_frames(recording, self._hop).expand(len(prompts), -1, -1),
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
