"""DAC as a codec: latents before the quantiser in two spaces, by the package's own model and from its own files."""

from math import prod
from types import SimpleNamespace

import pytest
import soundfile
import torch
from commands import compose_command, run_command
from dac_parts import SIZES, save_dac
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foley.core.components import CheckpointError, load_component
from foley.core.config import CONFIG_DIR
from foley.core.hashing import hash_module
from foley.data.latents import LatentCacheIndex
from foley.generation.decoding import LatentDecoder
from foley.models.codec.dac import DACCodec, architecture, baseline
from foley.system.checkpoint import load_trained, trained_config
from foley.system.convert.conversion import convert_checkpoint
from foley.training.codecs import DACTraining
from foley.training.run import train

HOPS = {24000: 320, 44100: 512}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The package's model at 24 kHz and its file."""
    path = tmp_path_factory.mktemp("dac") / "weights.pth"
    return save_dac(path, 24000), path


@pytest.fixture
def audio():
    return 0.3 * torch.randn(2, 1, 512 * 9 - 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sample_rate_hz", HOPS)
@torch.no_grad()
def test_latents_and_audio_are_those_of_the_package(sample_rate_hz, tmp_path, audio):
    path = tmp_path / "weights.pth"
    model = save_dac(path, sample_rate_hz)
    padded = model.preprocess(audio, model.sample_rate)
    z, _, projected, *_ = model.encode(padded)
    for latent, expected in (("encoder", model.encoder(padded)), ("projected", projected)):
        codec = DACCodec.from_file(path, latent=latent, quantised=True)
        assert (codec.sample_rate_hz, codec.hop_samples) == (model.sample_rate, HOPS[model.sample_rate])
        assert codec.kilobits_per_second == pytest.approx(3 * 4 * sample_rate_hz / HOPS[sample_rate_hz] / 1000)
        encoded = codec.encode(audio)
        torch.testing.assert_close(encoded, expected)
        assert encoded.shape[1] == codec.latent_channels == {"encoder": 64, "projected": 24}[latent]
        decoded = codec.decode(encoded)
        assert decoded.shape[-1] == padded.shape[-1]
        heard = model(audio, model.sample_rate)["audio"]
        torch.testing.assert_close(decoded[..., : heard.shape[-1]], heard)
        assert codec.reconstruct(audio).shape == audio.shape
    # Unquantised, the encoder's latents go straight to the decoder; the sum over codebooks of what they would round
    # misses z by what the last of them leaves over, and by their rounding of one another.
    straight = DACCodec.from_file(path).decode(model.encoder(padded))
    end = model.decoder(model.encoder(padded))
    torch.testing.assert_close(straight[..., : end.shape[-1]], end)
    shares = [q.out_proj(part) for q, part in zip(model.quantizer.quantizers, projected.split(8, 1), strict=True)]
    summed = DACCodec.from_file(path, latent="projected").decode(projected)
    torch.testing.assert_close(summed[..., : end.shape[-1]], model.decoder(sum(shares)))
    assert (model.decoder(z) - end).abs().max() > 1e-3  # rounding is heard


@torch.no_grad()
def test_its_posterior_is_a_point(published, audio):
    codec = DACCodec.from_file(published[1])
    posterior = codec.posterior(audio)
    assert posterior.std.count_nonzero() == 0
    torch.testing.assert_close(codec.encode(audio, torch.Generator().manual_seed(3)), posterior.mean)


@torch.no_grad()
def test_chunks_are_decoded_without_seams(published):
    codec = DACCodec.from_file(published[1])
    decoder = LatentDecoder(codec)
    latent = torch.randn(1, 64, 3 * codec.context_frames + 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(decoder(latent, chunk_frames=codec.context_frames), codec.decode(latent))


def test_a_file_is_a_codec_by_its_path_and_converted_by_its_own_metadata(published, tmp_path, monkeypatch):
    model, path = published
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "cache"))
    direct = load_trained(path, "codec")
    assert hash_module(direct) == hash_module(DACCodec.from_file(path))
    assert trained_config(path, "codec")["sample_rate_hz"] == model.sample_rate
    small = ["codec=dac_tiny", "codec.latent=projected", "codec.latent_channels=24"]
    run_command("script/convert_checkpoint", "source=dac", f"ckpt={path}", *small, f"out={tmp_path / 'out'}")
    loaded = load_component(tmp_path / "out")
    assert (loaded.latent, loaded.latent_channels) == ("projected", 24)
    assert hash_module(loaded) == hash_module(DACCodec.from_file(path, latent="projected"))
    assert hash_module(loaded) != hash_module(direct)  # whose latents it must not take for its own


def test_the_configs_have_the_published_sizes_and_refuse_another_model(published, tmp_path):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        names = ("dac_44khz", "dac_44khz_projected", "dac_24khz", "dac_24khz_projected")
        configs = [OmegaConf.to_container(compose("train", [f"codec={name}"]).codec, resolve=True) for name in names]
    assert [config["latent_channels"] for config in configs] == [1024, 72, 1024, 256]
    assert [prod(config["encoder_rates"]) for config in configs] == [512, 512, 320, 320]
    for config in configs:
        assert config["latent_dim"] == config["encoder_dim"] * 2 ** len(config["encoder_rates"])
    with pytest.raises(
        ValueError, match=r"another model than codec= says: .*sample_rate_hz is 24000 in the file and 4"
    ):
        convert_checkpoint("dac", published[1], configs[0], tmp_path / "out")


def test_what_is_no_such_codec_is_refused(tmp_path):
    with pytest.raises(ValueError, match="latent=codes is no space of DAC's latents: encoder or projected"):
        DACCodec(**SIZES, encoder_rates=(2,), decoder_rates=(2,), latent="codes")
    with pytest.raises(ValueError, match="latent_channels=8: latent=projected of this model has 24"):
        DACCodec(**SIZES, encoder_rates=(2,), decoder_rates=(2,), latent="projected", latent_channels=8)
    torch.save({"state_dict": {}, "metadata": {"kwargs": {"sample_rate": 24000}}}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match=r"bare\.pth: its metadata do not say encoder_dim, encoder_rates"):
        architecture(tmp_path / "bare.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth is none of the published files of descript-audio-codec"):
        DACCodec.from_file(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"dac_weights=None: no such file"):
        baseline(None)


def test_a_file_that_does_not_hold_what_it_says_is_refused(published, tmp_path):
    content = torch.load(published[1], weights_only=True)
    content["state_dict"].pop("quantizer.quantizers.2.codebook.weight")
    torch.save(content, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: quantizer\.quantizers\.2\.codebook\.weight"):
        DACCodec.from_file(tmp_path / "cut.pth")


@torch.no_grad()
def encoded_clips(folder, codec):
    """The latents of the training's clips, at the level of training."""
    names = [clip.stem for clip in sorted(folder.glob("*.wav"))[:4]]
    clips = torch.stack(
        [torch.from_numpy(soundfile.read(folder / f"{name}.wav", dtype="float32")[0]) for name in names]
    )
    return codec.encode((clips / clips.abs().amax(1, keepdim=True) * 10 ** (-1 / 20))[:, None])


@pytest.mark.slow
def test_a_denoiser_is_trained_on_its_latents_and_heard(published, tmp_path, monkeypatch):
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "cache"))
    rows = ["path,caption,split"]
    for number in range(6):
        clip = 0.2 * torch.randn(24000, generator=torch.Generator().manual_seed(number))
        soundfile.write(tmp_path / f"{number}.wav", clip.numpy(), 24000)
        rows.append(f"{number}.wav,a dog barks,{'train' if number < 4 else 'val'}")
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    clips = [f"codec_path={published[1]}", "data=manifest", f"data.splits.manifest={tmp_path / 'clips.csv'}"]
    encoding = [
        *clips,
        "data.duration_seconds=1",
        "store=mean",
        "max_duration_seconds=1",
    ]
    folder = f"output_dir={tmp_path / 'latents'}"
    with pytest.raises(ValueError, match="is at 44100 Hz and the codec at 24000 Hz; set the data's sample_rate_hz"):
        run_command("script/encode_latents", *encoding, folder, "data.sample_rate_hz=44100")
    run_command("script/encode_latents", *encoding, folder)
    index = LatentCacheIndex.read(tmp_path / "latents")
    assert (index.sample_rate_hz, index.hop_samples, len(index.latent_mean)) == (24000, 320, 64)
    assert index.codec_hash == hash_module(DACCodec.from_file(published[1]))
    latents = encoded_clips(tmp_path, DACCodec.from_file(published[1]))
    torch.testing.assert_close(index.statistics[0], latents.mean((0, 2)), atol=1e-4, rtol=2e-2)
    torch.testing.assert_close(index.statistics[1], latents.std((0, 2)), atol=1e-4, rtol=2e-2)
    small = ["model.width=16", "model.depth=2", "model.num_heads=2", "data.batch_size=2", "trainer.max_steps=2"]
    quick = [
        "trainer.val_check_interval=2",
        "callbacks.checkpoint.every_n_train_steps=2",
        "callbacks.progress=null",
        "lr_schedule.warmup_steps=1",
    ]
    data = [
        "codec=dac_24khz",
        "codec.latent_channels=64",
        f"codec_path={published[1]}",
        f"data.cache_dir={tmp_path / 'latents'}",
    ]
    run = f"paths.output_dir={tmp_path / 'run'}"
    train(
        compose_command("train", "name=test", "experiment=tiny", *small, *quick, *data, "data.duration_seconds=1", run)
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    out = tmp_path / "samples"
    run_command("sample", f"system={last}", "prompt=a dog barks", "steps=2", "duration_seconds=1", f"output_dir={out}")
    (sample,) = out.glob("*.wav")
    audio, rate = soundfile.read(sample)
    assert (len(audio), rate) == (24000, 24000)


def test_codebooks_are_dropped_by_the_seed_of_the_step():
    """Not by a generator that a resumed run has elsewhere, and that is the same on all processes."""
    sizes = {"encoder_dim": 4, "decoder_dim": 16, "n_codebooks": 8, "codebook_size": 8}
    codec = DACCodec(**sizes, encoder_rates=(2, 4), decoder_rates=(4, 2), quantizer_dropout=1.0)
    training = SimpleNamespace(codec=codec)

    def generated(seed):
        noise = torch.Generator().manual_seed(seed)
        return DACTraining.render(training, {"audio": audio}, noise).generated

    audio = torch.randn(8, 1, 160, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    first = generated(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(generated(1), first)
    assert not torch.equal(generated(2), first)
