"""Brings latents to zero mean and unit variance per channel, as the noise schedule assumes."""

import torch
from torch import Tensor, nn

_LARGEST_COMPRESSED = 6.0  # sinh(6) = 202 standard deviations


def require_channels(given: int, expected: int) -> None:
    """Raise ValueError, which names the options that choose a codec, for latents of another number of channels."""
    if given != expected:
        raise ValueError(
            f"the latents have {given} channels, but the model takes {expected}: choose the codec that made them "
            "(codec=..., codec_path=CODEC), or latents of the model's codec (data.cache_dir=...)"
        )


class LatentNormaliser(nn.Module):
    """Holds the mean and standard deviation `[C]` measured over a latent cache; identity until set.

    Args:
        channels: latent channels C.
        compressed: also take the inverse hyperbolic sine, which leaves the bulk nearly as it is and brings heavy tails
            in: a latent 60 standard deviations out becomes one of 5. For codecs whose latents have such outliers, which
            would otherwise dominate the squared error.

    Example:
        >>> normaliser = LatentNormaliser(channels=4)
        >>> normaliser.set(mean=torch.full((4,), 2.0), std=torch.full((4,), 3.0))
        >>> latent = normaliser.normalise(torch.full((1, 4, 10), 5.0))
        >>> latent.mean().item(), normaliser.denormalise(latent).mean().item()
        (1.0, 5.0)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, compressed: bool = False) -> None:
        super().__init__()
        self.compressed = compressed
        self.register_buffer("mean", torch.zeros(channels))  # [C]; zero and one are the identity
        self.register_buffer("std", torch.ones(channels))  # buffers, so that a checkpoint holds how to undo it

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Adopt measured statistics, each `[C]`; raises ValueError for another C, or a deviation not above 0."""
        require_channels(len(mean), len(self.mean))
        if not bool((std > 0).all()):
            raise ValueError(f"latent standard deviations must be positive, got a minimum of {std.min():.3g}")
        self.mean.copy_(mean)  # in place: buffers keep their device and type
        self.std.copy_(std)

    def normalise(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` codec latent to `[B, C, L]` diffusion latent."""
        # [C, 1] against [B, C, L]; asinh is x near zero and sign(x) log(2 |x|) far from it.
        standard = (latent - self.mean[:, None]) / self.std[:, None]
        return standard.asinh() if self.compressed else standard

    def denormalise(self, latent: Tensor) -> Tensor:
        """The inverse of `normalise`; what no codec gives, a guided overshoot, is held at 200 standard deviations."""
        standard = latent.clamp(-_LARGEST_COMPRESSED, _LARGEST_COMPRESSED).sinh() if self.compressed else latent
        return standard * self.std[:, None] + self.mean[:, None]
