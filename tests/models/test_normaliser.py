"""Normalised latents, with and without compression, and back."""

import pytest
import torch

from foley.models.codec.normaliser import LatentNormaliser


@pytest.mark.parametrize("compressed", [False, True])
def test_denormalise_is_the_inverse(compressed: bool) -> None:
    normaliser, latent = LatentNormaliser(3, compressed), 5 * torch.randn(2, 3, 50)
    normaliser.set(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.2, 3.0]))
    torch.testing.assert_close(normaliser.denormalise(normaliser.normalise(latent)), latent, atol=1e-4, rtol=1e-4)


def test_compression_brings_outliers_in_and_leaves_the_bulk() -> None:
    normaliser = LatentNormaliser(1, compressed=True)
    latent = torch.tensor([0.1, -0.2, 60.0])[None, None]
    assert normaliser.normalise(latent)[0, 0].tolist() == pytest.approx([0.0998, -0.1987, 4.7876], abs=1e-4)


def test_a_deviation_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="minimum of 0"):
        LatentNormaliser(1).set(torch.zeros(1), torch.zeros(1))


def test_an_overshoot_does_not_explode() -> None:
    normaliser = LatentNormaliser(1, compressed=True)
    assert normaliser.denormalise(torch.full((1, 1, 1), 30.0)).item() == pytest.approx(201.7, abs=0.1)
