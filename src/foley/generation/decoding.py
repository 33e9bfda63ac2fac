"""Latents to audio in inference: weight norm folded, the fast decoder where it pays, long audio in chunks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foley.accel.precision import PRECISIONS
from foley.core.logs import get_logger
from foley.models.codec.fast_decoder import FastDecoder
from foley.models.codec.mel_codec import MelCodec
from foley.models.codec.waveform_vae import WaveformVAE
from foley.nn.conv import folded_copy

_LARGEST_SPREAD = 3.0  # standard deviation of normalised latents; guidance makes it 1.5 at most
_log = get_logger(__name__)


def warn_of_blow_up(latent: Tensor, solver: str, num_steps: int, guidance_scale: float) -> None:
    """Warn of normalised latents `[B, C, L]` far beyond the unit variance that the model was trained on."""
    spread = latent.float().flatten(1).std(dim=1)  # [B]
    count = int((spread > _LARGEST_SPREAD).sum())
    if count:
        _log.warning(
            "solver %s blew up in %d of %d clips: latents of standard deviation %.1f, in training 1; take more "
            "than %d steps, another solver, or a lower guidance scale than %g",
            *(solver, count, len(latent), float(spread.max()), num_steps, guidance_scale),
        )


class LatentDecoder:
    """Decodes as `codec` does, within rounding: a snapshot of its decoder, so that the codec stays what it is.

    A waveform VAE is decoded by `FastDecoder` on a CPU in float32, and elsewhere by its own decoder, its weight norm
    folded; so is the vocoder of a mel codec, whose chunks are of the mel spectrogram. Other codecs decode themselves.

    Args:
        codec: has `decode` and `hop_samples`.
        precision: of a waveform VAE's or a vocoder's weights, a name in `foley.accel.precision.PRECISIONS`; audio is
            float32 all the same.

        decode: what decodes in the place of the codec's own, such as an exported graph.

    Raises ValueError for an unknown precision, or one that the codec cannot take.
    """

    def __init__(
        self, codec: Any, precision: str = "float32", decode: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"decoder precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self._prepare: Callable[[Tensor], Tensor] = nn.Identity()
        self._decode: Callable[[Tensor], Tensor] = decode or codec.decode
        self._frames_per_latent = 1
        self._hop_samples: int = codec.hop_samples
        self._context_frames: int | None = getattr(codec, "context_frames", None)
        if decode is not None:
            return
        if isinstance(codec, WaveformVAE):
            self._decode = _fastest(codec, PRECISIONS[precision])
        elif isinstance(codec, MelCodec):
            self._prepare, self._decode = codec.mel_vae.decode, _FoldedDecoder(codec.vocoder, PRECISIONS[precision])
            self._frames_per_latent = codec.mel_vae.frames_per_latent
            self._hop_samples = codec.vocoder.spectrogram.hop_samples
            self._context_frames = codec.vocoder.context_frames
        elif precision != "float32":
            raise ValueError(f"decoder precision {precision!r}: {type(codec).__name__} only decodes in float32")

    @torch.no_grad()
    def __call__(self, latent: Tensor, chunk_frames: int | None = None) -> Tensor:
        """`[B, C, L]` to audio `[B, channels, L * hop]`.

        Args:
            chunk_frames: decode so many frames at a time where there are more, to bound the memory. Each chunk sees
                all the frames that its audio depends on, so there are no seams; codecs whose reach is not known
                ignore it.
        """
        frames = self._prepare(latent)
        num_frames = frames.shape[-1]
        if self._context_frames is None or chunk_frames is None or chunk_frames >= latent.shape[-1]:
            return self._decode(frames)
        size = chunk_frames * self._frames_per_latent
        return torch.cat([self._chunk(frames, start, size) for start in range(0, num_frames, size)], -1)

    def _chunk(self, frames: Tensor, start: int, size: int) -> Tensor:
        """The audio `[B, channels, ...]` of the frames from `start` on."""
        context, end = self._context_frames or 0, min(start + size, frames.shape[-1])
        first = max(0, start - context)
        audio = self._decode(frames[..., first : end + context])
        return audio[..., (start - first) * self._hop_samples : (end - first) * self._hop_samples]


def _fastest(codec: WaveformVAE, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if dtype == torch.float32 and next(codec.parameters()).device.type == "cpu":
        decoder: nn.Module = FastDecoder(codec.decoder)
    else:
        decoder = _FoldedDecoder(codec.decoder, dtype)
    return lambda latent: codec.from_decoder(decoder(latent))


class _FoldedDecoder(nn.Module):
    """A copy of a decoder with its weight norm folded, in `dtype`; takes and returns float32."""

    def __init__(self, decoder: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.decoder = folded_copy(decoder).to(dtype)
        self.dtype = dtype

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(latent.to(self.dtype)).to(latent.dtype)
