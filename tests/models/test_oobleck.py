"""Diffusers' Oobleck as a codec of our own: the same latents and audio, from the folder that diffusers wrote."""

import json

import pytest
import torch
from commands import run_command
from diffusers import AutoencoderOobleck
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foley.core.components import CheckpointError, build_component, load_component
from foley.core.config import CONFIG_DIR
from foley.core.hashing import hash_module
from foley.generation.decoding import LatentDecoder
from foley.models.codec.oobleck import OobleckCodec
from foley.system.checkpoint import load_trained, trained_config
from foley.system.system import read_weights

HOP = 8


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model of random weights, and the folder of a pipeline that it lies in as `vae`."""
    torch.manual_seed(0)
    model = AutoencoderOobleck(8, [2, 4], [1, 2], 8, 4, audio_channels=2, sampling_rate=44100).eval()
    folder = tmp_path_factory.mktemp("stable-audio-open")
    model.save_pretrained(folder / "vae")
    return model, folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def test_latents_and_audio_are_those_of_diffusers(published):
    model, folder = published
    codec = load_trained(folder / "vae", "codec")
    assert isinstance(codec, OobleckCodec)
    assert (codec.audio_channels, codec.sample_rate_hz, codec.hop_samples, codec.latent_channels) == (2, 44100, HOP, 4)
    audio = torch.randn(2, 2, 20 * HOP, generator=torch.Generator().manual_seed(1))
    expected = model.encode(audio).latent_dist
    posterior = codec.posterior(audio)
    torch.testing.assert_close(posterior.mean, expected.mean)
    torch.testing.assert_close(posterior.std, expected.std)
    torch.testing.assert_close(codec.decode(expected.mean), model.decode(expected.mean).sample)
    assert codec.reconstruct(audio[..., :-3]).shape == (2, 2, 20 * HOP - 3)
    latent = torch.randn(1, 4, 3 * codec.context_frames + 5, generator=torch.Generator().manual_seed(2))
    decoder = LatentDecoder(codec)
    torch.testing.assert_close(decoder(latent, chunk_frames=codec.context_frames), codec.decode(latent))


def test_the_folder_of_the_pipeline_names_it_too_and_it_is_converted(published, tmp_path):
    _, folder = published
    whole, part = (hash_module(load_trained(path, "codec")) for path in (folder, folder / "vae"))
    assert whole == part
    assert trained_config(folder, "codec")["sample_rate_hz"] == 44100
    given = f"ckpt={folder}/vae/diffusion_pytorch_model.safetensors", f"config={folder}/vae/config.json"
    run_command("script/convert_checkpoint", "source=oobleck", *given, f"out={tmp_path / 'out'}")
    assert hash_module(load_component(tmp_path / "out")) == whole
    begun = read_weights(
        tmp_path / "out", {"codec": trained_config(folder, "codec")}, None
    )  # as ckpt= starts a training
    assert {name.partition(".")[0] for name in begun["state_dict"]} == {"codec"}


def test_the_config_is_that_of_stable_audio_open():
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", ["codec=oobleck"]).codec, resolve=True)
    with torch.device("meta"):
        codec, published = build_component(config), AutoencoderOobleck()
    assert (codec.hop_samples, codec.latent_channels, codec.audio_channels) == (2048, 64, 2)
    assert sum(parameter.numel() for parameter in codec.parameters()) == sum(
        parameter.numel() for parameter in published.parameters()
    )


def test_what_does_not_fit_is_refused_in_words(published, tmp_path):
    with pytest.raises(ValueError, match=r"encoder_hidden_size=8: .* must be twice latent_channels=3"):
        OobleckCodec(encoder_hidden_size=8, latent_channels=3)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    with pytest.raises(CheckpointError, match=r"but not its diffusion_pytorch_model.safetensors; download it"):
        load_trained(tmp_path, "codec")
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_bytes(
        (published[1] / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=r"does not say encoder_hidden_size, .*sampling_rate; give the config.json"):
        load_trained(tmp_path, "codec")


def test_ratios_with_which_frames_would_not_be_whole_are_refused():
    with pytest.raises(ValueError, match=r"downsampling_ratios=\[3, 4\]: .* whole frames of even ones"):
        OobleckCodec(8, (3, 4), (1, 2), 8, 4)
