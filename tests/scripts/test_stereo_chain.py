"""Stereo at 44.1 kHz through every stage: files, codec, latents, denoiser, system, sounds, edits and scores."""

import json

import numpy as np
import pytest
import soundfile
import torch
from commands import compose_command, run_command

from foley.data.latents import LatentCacheIndex
from foley.generation.text_to_audio import TextToAudio
from foley.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]  # Lightning's, of short runs

RATE = 44100
CODECS = {
    "left and right": ["codec=tiny_stereo"],
    "middle and side": ["codec=tiny_stereo", "codec.mid_side=true"],
    "oobleck": ["codec=oobleck_tiny"],
}
QUICK = ["trainer=cpu", "trainer.val_check_interval=2", "callbacks.progress=null", "data.batch_size=2"]
SMALL = ["size.width=16", "size.depth=2", "size.num_heads=2", "lr_schedule.warmup_steps=0"]
DATA = ["data.sample_rate_hz=44100", "data.channels=2"]


@pytest.fixture
def manifest(tmp_path):
    """Stereo clips of one second, a tone on the left and noise on the right, and a mono one."""
    rows, random = ["path,caption,split,label"], np.random.default_rng(0)
    for number in range(6):
        tone = 0.5 * np.sin(np.arange(RATE) * (0.02 + 0.01 * number))
        stereo = np.stack([tone, 0.2 * random.standard_normal(RATE)], axis=1)
        soundfile.write(tmp_path / f"{number}.wav", stereo if number else tone, RATE)
        rows.append(f"{number}.wav,a sound,{'train' if number < 4 else 'val'},tone")
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    return ["data=manifest", f"data.splits.manifest={tmp_path / 'clips.csv'}"]


def channels_of(folder, pattern="*.wav"):
    found = sorted(folder.glob(pattern))
    assert found
    return {(soundfile.info(file).channels, soundfile.info(file).samplerate) for file in found}


def trained_codec(tmp_path, manifest, chosen):
    adversarial = ["trainer.max_steps=4", "task.adversarial_start_step=2", "discriminator=stft_tiny"]
    run = [
        "name=test",
        "experiment=waveform_vae_stereo",
        "data.duration_seconds=0.3",
        f"paths.output_dir={tmp_path}/vae",
    ]
    train(compose_command("train", *run, *manifest, *chosen, *adversarial, *QUICK))
    assert channels_of(tmp_path / "vae/reconstructions/step_000004") == {(2, RATE)}
    return f"codec_path={tmp_path / 'vae'}"


def trained_system(tmp_path, manifest, chosen, codec):
    clips = [*manifest, "min_duration_seconds=1", "max_duration_seconds=1", f"output_dir={tmp_path / 'latents'}"]
    with pytest.raises(ValueError, match=r"clips of 1 channels, the codec takes 2: give data\.channels=2"):
        run_command("script/encode_latents", codec, *clips, "data.sample_rate_hz=44100")
    run_command("script/encode_latents", codec, *clips, *DATA)
    index = LatentCacheIndex.read(tmp_path / "latents")
    assert (index.sample_rate_hz, index.hop_samples, len(index.splits)) == (RATE, 960, 2)
    run = ["name=test", "experiment=tiny", f"data.cache_dir={tmp_path / 'latents'}", f"paths.output_dir={tmp_path}/run"]
    steps = ["trainer.max_steps=2", "data.duration_seconds=1", "callbacks.checkpoint.every_n_train_steps=2"]
    train(compose_command("train", *run, *chosen, codec, *SMALL, *steps, *QUICK))
    assert channels_of(tmp_path / "run/samples", "*/*.wav") == {(2, RATE)}
    run_command("script/export_system", f"ckpt={tmp_path / 'run'}", f"output_dir={tmp_path / 'system'}")
    return f"system={tmp_path / 'system'}"


def edited_only_inside(tmp_path, out):
    (file,) = out.glob("*.wav")
    before, after = (soundfile.read(path, dtype="int16")[0] for path in (tmp_path / "1.wav", file))
    changed = np.flatnonzero((before != after).any(axis=1))
    inside = {*range(round(0.2 * RATE), round(0.3 * RATE)), *range(round(0.6 * RATE), round(0.7 * RATE))}
    assert set(changed) <= inside
    assert len(changed) > 0.9 * len(inside)


@pytest.mark.parametrize("name", CODECS)
def test_both_channels_go_from_the_manifest_to_the_header_of_the_wav(tmp_path, manifest, name):
    chosen = CODECS[name]
    codec = trained_codec(tmp_path, manifest, chosen)
    system = trained_system(tmp_path, manifest, chosen, codec)
    asked = [system, "prompt=a sound", "steps=2"]
    run_command("sample", *asked, "num=2", "duration_seconds=0.5", f"output_dir={tmp_path / 'made'}")
    assert channels_of(tmp_path / "made") == {(2, RATE)}
    assert TextToAudio.load(tmp_path / "system").codec.audio_channels == 2
    edit = [f"edit={tmp_path / '1.wav'}", "masks=[[0.2,0.1],[0.6,0.1]]", "boundary_seconds=0.1"]
    run_command("sample", *asked, *edit, f"output_dir={tmp_path / 'edited'}")
    edited_only_inside(tmp_path, tmp_path / "edited")
    for number in (0, 1):  # a mono file and a stereo one
        run_command(
            "sample", *asked, f"init={tmp_path / f'{number}.wav'}", f"output_dir={tmp_path / f'varied{number}'}"
        )
        assert channels_of(tmp_path / f"varied{number}") == {(2, RATE)}
    scored = [
        f"samples={tmp_path / 'made'}",
        f"reference={tmp_path / 'clips.csv'}",
        f"output_dir={tmp_path / 'scores'}",
    ]
    run_command("evaluate", *scored)
    scores = json.loads((tmp_path / "scores/evaluation.json").read_text())
    assert scores["embedded"]["protocol"]["channel_rule"] == "mean of all"
    run_command("script/score_codec", codec, *manifest, *DATA, "split=val", f"output_dir={tmp_path / 'codec'}")
    assert channels_of(tmp_path / "codec/pairs", "*.flac") == {(2, RATE)}
    run_command("script/reconstruct", codec, f"manifest={tmp_path / 'clips.csv'}", f"output_dir={tmp_path / 'rebuilt'}")
    assert channels_of(tmp_path / "rebuilt") == {(2, RATE)}


def test_adapters_of_a_stereo_system_are_trained_on_stereo_sounds(tmp_path, manifest):
    codec = trained_codec(tmp_path, manifest, CODECS["left and right"])
    trained_system(tmp_path, manifest, CODECS["left and right"], codec)
    run = ["name=test", "experiment=lora", f"ckpt={tmp_path / 'system'}", f"paths.output_dir={tmp_path}/lora"]
    prior = ["task.prior.captions=[a sound]", "task.prior.count=2", "task.prior.num_steps=2"]
    own = [*manifest, *DATA, *prior, "data.duration_seconds=1", "trainer.max_steps=2", "data.augmentation=null"]
    train(compose_command("train", *run, *own, *QUICK, "lr_schedule.warmup_steps=0"))
    adapters = [{"path": str(tmp_path / "lora/adapter"), "scale": 1.0}]
    made = TextToAudio.load(tmp_path / "system", adapters=adapters).generate(["a sound"], 0.5, num_steps=2)
    assert made.audio.shape == (1, 2, RATE // 2)
    assert bool(torch.isfinite(made.audio).all())
