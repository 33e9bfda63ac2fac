"""A waveform VAE of two channels: middle and side, its fast decoder, and what judges it channel by channel."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foley.core.channels import to_left_right, to_mid_side
from foley.core.components import build_component, load_component, save_component
from foley.core.config import CONFIG_DIR
from foley.generation.decoding import LatentDecoder
from foley.losses.spectral import LogMelLoss, MultiResolutionSTFTLoss
from foley.metrics.reconstruction import GriffinLim, mel_distance, si_sdr, stft_distance
from foley.models.codec.discriminators import (
    DACDiscriminator,
    MultiScaleSTFTDiscriminator,
    PeriodResolutionDiscriminator,
)
from foley.models.codec.mel_vae import MelSpectrogram
from foley.models.codec.waveform_vae import WaveformVAE

SIZES = {"channels": 4, "multipliers": (2, 3), "strides": (4, 6), "latent_channels": 4, "num_units": (1, 1)}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codec(**options):
    torch.manual_seed(0)
    return WaveformVAE(**SIZES, **options).eval()


@torch.no_grad()
def test_middle_and_side_are_what_the_networks_hear_and_make():
    plain, changed = codec(audio_channels=2), codec(audio_channels=2, mid_side=True)
    audio = noise(2, 2, 480)
    torch.testing.assert_close(changed.encode(audio), plain.encode(to_mid_side(audio)))
    latent = noise(2, 4, 20)
    torch.testing.assert_close(changed.decode(latent), to_left_right(plain.decode(latent)))
    assert changed.reconstruct(audio[..., :470]).shape == (2, 2, 470)


@pytest.mark.parametrize("mid_side", [False, True])
@torch.no_grad()
def test_the_decoder_of_inference_makes_both_channels_in_chunks_too(mid_side):
    stereo = codec(audio_channels=2, mid_side=mid_side)
    latent = noise(2, 4, 3 * stereo.context_frames + 5)
    expected = stereo.decode(latent)
    assert expected.shape == (2, 2, latent.shape[-1] * 24)
    torch.testing.assert_close(LatentDecoder(stereo)(latent), expected, atol=1e-4, rtol=1e-3)
    chunked = LatentDecoder(stereo)(latent, chunk_frames=stereo.context_frames)
    torch.testing.assert_close(chunked, expected, atol=1e-4, rtol=1e-3)
    half = LatentDecoder(stereo, "bf16")(latent)
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0.1)


def test_a_codec_refuses_channels_that_it_does_not_have():
    with pytest.raises(ValueError, match=r"must be mono \[B, 1, T\] .* \[1, 2, 48\]; data.channels=1 gives clips"):
        codec().encode(noise(1, 2, 48))
    with pytest.raises(ValueError, match=r"must be \[B, 2, T\] with T > 0, got shape \[1, 1, 48\]; data.channels=2"):
        codec(audio_channels=2).encode(noise(1, 1, 48))
    with pytest.raises(ValueError, match=r"mid_side=true takes audio_channels=2, left and right; got 1"):
        codec(mid_side=True)
    with pytest.raises(ValueError, match=r"a mel spectrogram is of mono audio \[B, 1, T\], got shape \[1, 2, 4800\]"):
        MelSpectrogram(24000)(noise(1, 2, 4800))


@pytest.mark.parametrize(("name", "channels"), [("waveform_24khz", 1), ("waveform_44khz_stereo", 2)])
def test_the_configs_build_what_they_say(name, channels):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", [f"codec={name}"]).codec, resolve=True)
    with torch.device("meta"):
        built = build_component(config)
    assert (built.audio_channels, built.decoder.head.weight.shape[0]) == (channels, channels)
    assert 44.0 < built.sample_rate_hz / built.hop_samples <= 50.0


def test_a_stereo_codec_comes_back_from_its_folder(tmp_path):
    options = {"audio_channels": 2, "mid_side": True}
    saved = codec(**options)
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in SIZES.items()}
    config = {"_target_": "foley.models.codec.waveform_vae.WaveformVAE", **sizes, **options}
    save_component(saved, config, tmp_path)
    loaded = load_component(tmp_path)
    assert torch.equal(loaded.encode(audio := noise(1, 2, 48)), saved.encode(audio))
    assert loaded.mid_side


# ---------------------------------------------------------------- channel by channel


@pytest.mark.parametrize(
    "discriminator",
    [
        MultiScaleSTFTDiscriminator((160, 80), 4),
        PeriodResolutionDiscriminator((2, 3), ((128, 32, 128),), 4),
        DACDiscriminator(24000, (2,), (256,)),
    ],
    ids=lambda module: type(module).__name__,
)
@torch.no_grad()
def test_discriminators_judge_each_channel_by_itself(discriminator):
    audio = noise(2, 2, 960)
    both, apart = discriminator(audio), discriminator(audio.flatten(0, 1)[:, None])
    for scale, alone in zip(both, apart, strict=True):
        for one, other in zip(scale, alone, strict=True):
            assert torch.equal(one, other)


DISTANCES = {
    "si_sdr": si_sdr,
    "mel": lambda estimate, reference: mel_distance(estimate, reference, 24000),
    "stft": stft_distance,
}


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_of_stereo_is_the_mean_of_its_channels(name):
    distance, estimate, reference = DISTANCES[name], noise(3, 2, 4800, seed=1), noise(3, 2, 4800)
    apart = [distance(estimate[:, [side]], reference[:, [side]]) for side in (0, 1)]
    torch.testing.assert_close(distance(estimate, reference), torch.stack(apart).mean(0))
    equal = [signal[:, :1].expand(-1, 2, -1) for signal in (estimate, reference)]
    torch.testing.assert_close(distance(*equal), apart[0])


LOSSES = {"mel": LogMelLoss, "stft": lambda rate, **options: MultiResolutionSTFTLoss(rate, (256, 64), **options)}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_equal_channels_are_those_of_mono(name):
    loss, estimate, reference = LOSSES[name](24000), noise(2, 1, 2400, seed=1), noise(2, 1, 2400)
    doubled = loss(estimate.expand(-1, 2, -1), reference.expand(-1, 2, -1))
    torch.testing.assert_close(doubled, loss(estimate, reference))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_hear_middle_and_side_where_asked(name):
    plain, both = (LOSSES[name](24000, mid_side=mid_side) for mid_side in (False, True))
    estimate, reference = noise(2, 2, 2400, seed=1), noise(2, 2, 2400)
    heard = [torch.cat([signal, to_mid_side(signal)], 1) for signal in (estimate, reference)]
    torch.testing.assert_close(both(estimate, reference), plain(*heard))
    with pytest.raises(ValueError, match=r"mid_side=true compares middle and side of \[B, 2, T\], got shape \[1, 1"):
        both(noise(1, 1, 2400), noise(1, 1, 2400))


def test_griffin_lim_gives_every_channel_back():
    audio = 0.1 * noise(2, 2, 4800)
    restored = GriffinLim(24000, iterations=2).reconstruct(audio)
    assert restored.shape == audio.shape
    torch.testing.assert_close(restored[:, [1]], GriffinLim(24000, iterations=2).reconstruct(audio[:, [1]]))
