"""What a codec is, and the Gaussian bottleneck of the VAEs."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

INITIAL_SCALE = -5.0
"""What an encoder gives for the scale at first: softplus makes it a standard deviation of 0.007.

From a wide posterior the decoder learns nothing for a long time: noise hides the latent from it.
"""

_SMALLEST_STD = 1e-4  # no variance of 0, whose logarithm is infinite


@dataclass(frozen=True)
class GaussianPosterior:
    """A diagonal Gaussian over latents: `mean` and `std`, each `[B, C, L]`."""

    mean: Tensor
    std: Tensor

    @classmethod
    def from_moments(cls, mean: Tensor, scale: Tensor) -> "GaussianPosterior":
        """From the encoder's raw output: `std = softplus(scale) + 1e-4` (Stable Audio)."""
        return cls(mean, softplus(scale) + _SMALLEST_STD)

    def sample(self, generator: torch.Generator) -> Tensor:
        """One reparameterised draw `[B, C, L]`; the noise is drawn where the generator lives, then moved."""
        # mean + std * noise: gradients reach both (Kingma and Welling 2014, section 2.4).
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return torch.addcmul(self.mean, self.std, noise.to(self.mean))

    def kl(self) -> Tensor:
        """`sum_c(mean^2 + var - log var - 1)`, averaged over batch and frames: twice the divergence from N(0, 1)."""
        # Summed over channels and averaged over the rest: the divergence of a frame.
        variance = self.std.square()  # [B, C, L]
        return (self.mean.square() + variance - variance.log() - 1).sum(1).mean()


class AudioVAE(nn.Module):
    """Base of the codecs; they give `encode_moments`, `decode`, `hop_samples`, and set the attributes.

    Attributes:
        latent_channels: C.
        sample_rate_hz: rate of the audio.
        audio_channels: A of the audio; 1 is mono.
    """

    latent_channels: int
    sample_rate_hz: int
    audio_channels: int = 1

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame."""
        raise NotImplementedError

    @property
    def kilobits_per_second(self) -> float:
        """Of its latents in half precision, for a table beside codecs that send bits."""
        return 16 * self.latent_channels * self.sample_rate_hz / self.hop_samples / 1000  # 16 bits a number

    @property
    def context_frames(self) -> int | None:
        """How many latent frames before a frame, and after it, its audio hears; None where that is not known."""
        return None

    def encode_moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, A, T]` to the raw (mean, scale), each `[B, C, L]` with L = ceil(T / hop); the end is zero-padded.

        Raises:
            ValueError: where the audio has other channels than the codec, or none, or no samples.
        """
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to audio `[B, A, L * hop]`; not clipped."""
        raise NotImplementedError

    def freeze_encoder(self) -> None:
        """Hold what encodes: latents stay what they are while the decoder learns."""
        cast(nn.Module, self.encoder).requires_grad_(False)

    def posterior(self, audio: Tensor) -> GaussianPosterior:
        """The distribution of the latent given `audio` `[B, A, T]`."""
        return GaussianPosterior.from_moments(*self.encode_moments(audio))

    def encode(self, audio: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`[B, A, T]` to a latent `[B, C, L]`: drawn with `generator`, or the mean without one."""
        return self.encode_moments(audio)[0] if generator is None else self.posterior(audio).sample(generator)

    def reconstruct(self, audio: Tensor) -> Tensor:
        """`[B, A, T]` to `[B, A, T]` through the mean of the posterior, on the codec's device."""
        device = next(self.parameters()).device
        # The padding of the last frame is cut off.
        return self.decode(self.encode(audio.to(device)))[..., : audio.shape[-1]]

    def _whole_frames(self, audio: Tensor) -> Tensor:
        """`audio` checked, and zero-padded at its end to a whole number of latent frames."""
        if audio.ndim != 3 or audio.shape[1] != self.audio_channels or audio.shape[2] == 0:
            kind = "mono " if self.audio_channels == 1 else ""
            raise ValueError(
                f"audio must be {kind}[B, {self.audio_channels}, T] with T > 0, got shape {list(audio.shape)}; "
                f"data.channels={self.audio_channels} gives clips that this codec takes"
            )
        # -T % hop more samples, up to a whole frame.
        return nn.functional.pad(audio, (0, -audio.shape[-1] % self.hop_samples))
