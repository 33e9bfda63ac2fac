"""Published files to component directories, by script and through the cache."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from published_files import CODEC, DENOISER, read_published

from foley.core.components import CheckpointError, load_component
from foley.core.config import PROJECT_ROOT
from foley.core.hashing import hash_file, hash_module
from foley.system.convert import (
    SOURCES,
    convert_checkpoint,
    ezaudio_denoiser,
    load_converted,
    read_model_config,
    waveform_vae,
)
from foley.system.convert.files import read_weights

WRAPPINGS = {
    "flat": lambda weights: weights,
    "model": lambda weights: {"model": weights, "step": 3},
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 1},
}


@pytest.fixture
def weights_and_config(shared):
    return read_published(shared, DENOISER)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_however_they_are_wrapped(weights_and_config, tmp_path, wrapping):
    weights, _ = weights_and_config
    torch.save(WRAPPINGS[wrapping](weights), tmp_path / "a.pt")
    torch.save(WRAPPINGS[wrapping](weights), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.pt"):
        found = read_weights(tmp_path / name)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("write", [yaml.safe_dump, json.dumps])
@pytest.mark.parametrize("section", [None, "model", "config"])
def test_configs_are_found_however_they_are_wrapped(weights_and_config, tmp_path, write, section):
    _, config = weights_and_config
    document = {"name": "tiny", section: config} if section else config
    (tmp_path / "config").write_text(write(document))
    found = read_model_config(tmp_path / "config")
    assert {key: found[key] for key in config} == config


@pytest.mark.slow
def test_the_script_writes_a_component_and_its_card(weights_and_config, tmp_path):
    weights, config = weights_and_config
    ckpt, out = tmp_path / "tiny.pt", tmp_path / "out"
    torch.save({"model": weights}, ckpt)
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump({"model": config}))
    script = str(PROJECT_ROOT / "scripts" / "convert_checkpoint.py")
    overrides = ["source=ezaudio", f"ckpt={ckpt}", f"config={tmp_path / 'tiny.yml'}", f"out={out}"]
    command = [sys.executable, script, *overrides, f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    expected = ezaudio_denoiser(weights, config)
    assert hash_module(load_component(out)) == hash_module(expected)
    card = (out / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in expected.parameters())
    for fact in ("tiny.pt", hash_file(ckpt), f"{parameters:,}", "licence", "load_component"):
        assert fact in card


def test_a_codec_is_taken_out_of_a_training_save(shared, tmp_path):
    weights, config = read_published(shared, CODEC)
    save = {f"autoencoder.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": save | {"discriminator.weight": torch.ones(2)}}, tmp_path / "1m.pt")
    converted = convert_checkpoint("waveform_vae", tmp_path / "1m.pt", config, tmp_path / "out")
    assert hash_module(converted) == hash_module(waveform_vae(weights, config))
    assert hash_module(load_component(tmp_path / "out")) == hash_module(converted)
    assert codec_rate({**config, "sample_rate": 16000}) == 16000


def codec_rate(config):
    return SOURCES["waveform_vae"].component_config(config, "test")["sample_rate_hz"]


def test_half_precision_weights_become_float32(weights_and_config, tmp_path):
    weights, config = weights_and_config
    denoiser = ezaudio_denoiser({key: value.half() for key, value in weights.items()}, config)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}


def test_each_content_is_converted_once(weights_and_config, tmp_path, monkeypatch):
    weights, config = weights_and_config
    ckpt, cache, written = tmp_path / "tiny.pt", tmp_path / "cache", []
    monkeypatch.setattr(
        "foley.system.convert.conversion.convert_checkpoint",
        lambda *arguments: written.append(arguments) or convert_checkpoint(*arguments),
    )
    torch.save(weights, ckpt)
    first = load_converted("ezaudio", ckpt, config, cache)
    again = load_converted("ezaudio", ckpt, config, cache)
    assert len(written) == 1
    assert hash_module(first) == hash_module(again)
    assert not again.training
    torch.save({**weights, "mask_embed": torch.zeros_like(weights["mask_embed"])}, ckpt)
    other = load_converted("ezaudio", ckpt, config, cache)
    assert len(written) == 2
    assert hash_module(other) != hash_module(first)


def test_a_damaged_cache_says_what_to_delete(weights_and_config, tmp_path):
    weights, config = weights_and_config
    torch.save(weights, tmp_path / "tiny.pt")
    load_converted("ezaudio", tmp_path / "tiny.pt", config, tmp_path / "cache")
    stored = next((tmp_path / "cache").glob("*/model.safetensors"))
    stored.write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=f"{stored.parent} cannot be read.*delete it"):
        load_converted("ezaudio", tmp_path / "tiny.pt", config, tmp_path / "cache")


def damage(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_files_that_are_no_weights_are_refused(weights_and_config, tmp_path):
    weights, _ = weights_and_config
    torch.save(weights, tmp_path / "tiny.pt")
    whole = (tmp_path / "tiny.pt").read_bytes()
    unreadable = [whole[: len(whole) // 2], b"", b"<html>not found</html>", b"PK\x03\x04" + bytes(200)]
    for content in unreadable:
        with pytest.raises(CheckpointError, match=r"bad\.pt cannot be read safely"):
            read_weights(damage(tmp_path / "bad.pt", content))
    with pytest.raises(CheckpointError, match=r"absent\.pt does not exist"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        read_weights(tmp_path)
    for content, message in [({"epoch": 1}, "epoch are no tensors"), ([1], "no weights but list"), ({}, "no weights")]:
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=rf"other\.pt.*{message}"):
            read_weights(tmp_path / "other.pt")


def test_weights_configs_and_sources_that_do_not_belong_together_are_refused(shared, tmp_path):
    (denoiser, config), (codec, codec_config) = read_published(shared, DENOISER), read_published(shared, CODEC)
    torch.save(denoiser, tmp_path / "dit.pt")
    torch.save(codec, tmp_path / "vae.pt")
    convert = lambda source, name, options: convert_checkpoint(source, tmp_path / name, options, tmp_path / "out")  # noqa: E731
    with pytest.raises(CheckpointError, match=r"vae\.pt does not fit(.|\n)*mask_embedding(.|\n)*encoder\.layers"):
        convert("ezaudio", "vae.pt", config)
    with pytest.raises(CheckpointError, match=r"dit\.pt does not fit(.|\n)*mask_embed"):
        convert("waveform_vae", "dit.pt", codec_config)
    with pytest.raises(
        ValueError, match=r"dit\.pt as source=ezaudio: the config does not say out_chans.*only bottleneck"
    ):
        convert("ezaudio", "dit.pt", codec_config)
    with pytest.raises(ValueError, match=r"vae\.pt as source=waveform_vae.*does not say latent_dim"):
        convert("waveform_vae", "vae.pt", config)
    with pytest.raises(ValueError, match="the config does not say embed_dim, qk_norm;"):
        convert(
            "ezaudio", "dit.pt", {key: value for key, value in config.items() if key not in ("embed_dim", "qk_norm")}
        )
    with pytest.raises(CheckpointError, match="shape of"):
        convert("ezaudio", "dit.pt", config | {"context_dim": 99})
    with pytest.raises(
        ValueError, match="one of ezaudio, ezaudio_controlnet, waveform_vae, bigvgan, dac, oobleck, got 'bark'"
    ):
        convert("bark", "dit.pt", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "just words", "[1, 2]", "{broken: ["])
def test_files_that_are_no_config_are_refused(tmp_path, text):
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(ValueError, match=r"config=.*config\.yml"):
        read_model_config(tmp_path / "config.yml")
    with pytest.raises(ValueError, match=r"config=.*absent\.yml"):
        read_model_config(tmp_path / "absent.yml")
