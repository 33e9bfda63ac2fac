"""The Descript Audio Codec (Kumar et al. 2023) by its own package, as a codec whose latents a denoiser is trained on.

    audio [B, 1, T] -> encoder -> z [B, D, L] -> quantiser: residual codebooks of projections of z -> decoder -> audio

Its latents are continuous, from before the quantiser, in either of two spaces (`LATENTS`):

    encoder:    z itself, D = 1024 channels of the published models
    projected:  what each codebook rounds, the projections of what those before it left over; 9 or 32 times 8 channels

Decoding takes them as they are, or rounds them first (`quantised`), as the published codec always does.
"""

from collections.abc import Mapping, Sequence
from math import log2, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from foley.core.components import CheckpointError, load_state, read_pickle
from foley.models.codec.base import AudioVAE, GaussianPosterior
from foley.models.codec.waveform_vae import heard_frames

LATENTS = ("encoder", "projected")
RELEASES = "https://github.com/descriptinc/descript-audio-codec/releases"
_SIZES = (
    *("encoder_dim", "encoder_rates", "latent_dim", "decoder_dim", "decoder_rates"),
    *("n_codebooks", "codebook_size", "codebook_dim"),
)
"""Options under the names that the package gives them."""


class DACCodec(AudioVAE):
    """The package's model; it is deterministic, so its posterior is a point.

    Args:
        encoder_dim, encoder_rates, latent_dim, decoder_dim, decoder_rates, n_codebooks, codebook_size, codebook_dim:
            of the package's model, by its names; `latent_dim` is D, by default what the encoder is wide at its end.
        sample_rate_hz: of the audio.
        latent: the space of the latents, out of `LATENTS`.
        quantised: round latents to the codebooks before they are decoded.
        latent_channels: C, for configs that refer to it; it follows from the others.
        quantizer_dropout: share of a training's clips that take the first few codebooks alone.

    Raises:
        ValueError: for another space, or channels that are not its own.

    Example:
        >>> sizes = {"encoder_dim": 4, "decoder_dim": 16, "n_codebooks": 2, "codebook_size": 8}
        >>> codec = DACCodec(**sizes, encoder_rates=(2, 4), decoder_rates=(4, 2), latent="projected").eval()
        >>> latent = codec.encode(torch.randn(1, 1, 800))
        >>> latent.shape, codec.decode(latent).shape  # 2 codebooks of 8 channels, a hop of 8 samples
        (torch.Size([1, 16, 100]), torch.Size([1, 1, 800]))
    """

    space: Tensor  # among what is hashed: latents of one space are refused by a codec of the other

    def __init__(
        self,
        encoder_dim: int = 64,
        encoder_rates: Sequence[int] = (2, 4, 8, 8),
        latent_dim: int | None = None,
        decoder_dim: int = 1536,
        decoder_rates: Sequence[int] = (8, 8, 4, 2),
        n_codebooks: int = 9,
        codebook_size: int = 1024,
        codebook_dim: int | Sequence[int] = 8,
        sample_rate_hz: int = 44100,
        latent: str = "encoder",
        quantised: bool = False,
        latent_channels: int | None = None,
        quantizer_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        from dac import DAC  # slow to import, and of no use to other codecs

        self.register_buffer("space", space_index(latent))
        self.published = DAC(
            encoder_dim,
            _plain(encoder_rates),
            latent_dim,
            decoder_dim,
            _plain(decoder_rates),
            n_codebooks,
            codebook_size,
            _plain(codebook_dim),
            quantizer_dropout,
            sample_rate=sample_rate_hz,
        )
        self._codebook_dims = list(self.published.quantizer.codebook_dim)
        channels = self.published.latent_dim if latent == "encoder" else sum(self._codebook_dims)
        if latent_channels not in (None, channels):
            raise ValueError(f"latent_channels={latent_channels}: latent={latent} of this model has {channels}")
        self.latent_channels, self.sample_rate_hz = channels, sample_rate_hz
        self.latent, self.quantised = latent, quantised
        self._hop_samples = prod(encoder_rates)

    @classmethod
    def from_file(cls, path: Path, latent: str = "encoder", quantised: bool = False) -> "DACCodec":
        """The codec in a published file, its sizes and rate those of the file's metadata, in eval mode.

        Raises CheckpointError where the file cannot be read, is no such file, or does not hold what it says.
        """
        codec = cls(**architecture(path), latent=latent, quantised=quantised)
        load_state(codec.published, read_pickle(path, mmap=True)["state_dict"], str(path))
        return codec.eval()

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame: 512 at 44.1 kHz, 320 at 24 kHz, of the published models."""
        return self._hop_samples

    @property
    def kilobits_per_second(self) -> float:
        """Of its codes where it rounds to them, else of its latents."""
        if not self.quantised:
            return super().kilobits_per_second
        bits = sum(log2(book.codebook_size) for book in self.published.quantizer.quantizers)  # of a frame
        return bits * self.sample_rate_hz / self.hop_samples / 1000

    @property
    def context_frames(self) -> int:
        """See `AudioVAE.context_frames`."""
        return heard_frames(self.published.decoder)

    def encode_moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """See `AudioVAE.encode_moments`; the scale says that nothing is left to chance."""
        encoded = self.published.encoder(self._whole_frames(audio))  # [B, D, L]
        mean = encoded if self.latent == "encoder" else self.published.quantizer(encoded)[2]
        return mean.float(), torch.full_like(mean, -torch.inf, dtype=torch.float32)

    def posterior(self, audio: Tensor) -> GaussianPosterior:
        """The latent of `audio` `[B, 1, T]`, of no spread."""
        mean, _ = self.encode_moments(audio)
        return GaussianPosterior(mean, torch.zeros_like(mean))

    def decode(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to audio `[B, 1, L * hop]`, within [-1, 1].

        Odd strides, such as that of 5 at 24 kHz, end some samples early (8 there): silence stands in for them.
        """
        audio: Tensor = self.published.decoder(self._decoded(latent))
        return pad(audio, (0, latent.shape[-1] * self.hop_samples - audio.shape[-1]))

    def train_through(self, audio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Audio `[B, 1, T]` through encoder, quantiser and decoder, and the two terms that the quantiser adds."""
        rounded, _, _, commitment, codebook = self.published.quantizer(
            self.published.encoder(self._whole_frames(audio))
        )
        restored: Tensor = self.published.decoder(rounded)
        whole = pad(restored, (0, max(audio.shape[-1] - restored.shape[-1], 0)))  # see `decode`
        return whole[..., : audio.shape[-1]], {"commitment": commitment, "codebook": codebook}

    def _decoded(self, latent: Tensor) -> Tensor:
        """What the decoder takes, `[B, D, L]`."""
        quantiser = self.published.quantizer
        if self.latent == "encoder":
            return quantiser(latent)[0] if self.quantised else latent
        if self.quantised:
            return quantiser.from_latents(latent)[0]
        # Each codebook gives back its share of z; rounding apart, they sum to it.
        parts = zip(quantiser.quantizers, latent.split(self._codebook_dims, dim=1), strict=True)
        return torch.stack([book.out_proj(part) for book, part in parts]).sum(0)


def space_index(latent: str) -> Tensor:
    """Where a space is in `LATENTS`, as a codec keeps it beside its weights; raises ValueError for another."""
    if latent not in LATENTS:
        raise ValueError(f"latent={latent} is no space of DAC's latents: {' or '.join(LATENTS)}")
    return torch.tensor(LATENTS.index(latent))


def is_published(path: Path) -> bool:
    """Whether a file is one of the package's, with its state dict and metadata; raises CheckpointError."""
    content = read_pickle(path, mmap=True)
    return isinstance(content, Mapping) and {"state_dict", "metadata"} <= set(content)


def architecture(path: Path) -> dict[str, Any]:
    """The options of `DACCodec` that the metadata of a published file name; raises CheckpointError."""
    if not is_published(path):
        raise CheckpointError(f"{path} is none of the published files of descript-audio-codec ({RELEASES})")
    options: Mapping[str, Any] = dict(read_pickle(path, mmap=True)["metadata"]).get("kwargs", {})
    wanted = (*(name for name in _SIZES if name != "latent_dim"), "sample_rate")
    if missing := [name for name in wanted if name not in options]:
        raise CheckpointError(f"{path}: its metadata do not say {', '.join(missing)}; give the file as published")
    sizes = {name: _plain(options[name]) for name in _SIZES if name in options}
    return {**sizes, "sample_rate_hz": int(options["sample_rate"])}


def baseline(dac_weights: str | None) -> DACCodec:
    """The published codec as it is, quantised, for comparisons; raises CheckpointError where the file is missing."""
    if dac_weights is None or not Path(dac_weights).is_file():
        raise CheckpointError(f"dac_weights={dac_weights}: no such file; it is one of descript-audio-codec's releases")
    return DACCodec.from_file(Path(dac_weights), quantised=True)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else value
