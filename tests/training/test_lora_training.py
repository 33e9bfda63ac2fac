"""Adapters of a system, trained on a handful of sounds so that a new word calls them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from adapter_parts import small_system
from peft import PeftModel
from safetensors.torch import load_file
from test_recipes import config

from foley.core.hashing import hash_module
from foley.data.audio import write_wav
from foley.data.datamodule import AudioDataModule
from foley.data.dataset import AudioBatch, LatentBatch
from foley.data.splits import folder_splits
from foley.generation.text_to_audio import TextToAudio
from foley.models.lora import AdaptedDenoiser, without_adapters
from foley.system.adapters import AdapterChoice, AdapterStack
from foley.system.system import load_system, save_system
from foley.training.distillation import Teacher
from foley.training.lora import AdapterWriter, LoraTraining, Prior
from foley.training.run import train

RATE_HZ, SECONDS = 2000, 0.4
a_prior = partial(Prior, weight=0.5, follow_base=True, count=3, num_steps=2, guidance_scale=3.0)


def lora_training(system=None, captions=("rain", "wind"), **options) -> LoraTraining:
    base = Teacher(system or small_system(), set())
    object.__setattr__(base.system, "captions", captions)
    options = {"lora": partial(AdaptedDenoiser, rank=2), "caption": "a zorble"} | options
    return LoraTraining(base, optimizer=partial(torch.optim.AdamW, lr=1e-2), **options)


def audio_batch(captions=("", "rain")) -> AudioBatch:
    audio = torch.randn(2, 1, round(RATE_HZ * SECONDS), generator=torch.Generator().manual_seed(1))
    about = {"caption": list(captions), "label": ["", ""], "id": ["one.wav", "two.wav"]}
    return AudioBatch(audio=audio, length_samples=torch.tensor([800, 500]), **about)


def test_adapters_of_denoiser_and_text_train_and_nothing_else() -> None:
    system = small_system()
    hashes = {name: hash_module(system.modules[name]) for name in ("denoiser", "text")}
    module = lora_training(system)
    assert module.base_hashes == hashes
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert {name.partition(".")[0] for name in trained} == {"denoiser", "text"}
    assert set(module.saved_state(module.state_dict())) == set(trained)
    alone = lora_training(adapt_text=False)
    assert not any(parameter.requires_grad for parameter in alone.text.parameters())
    assert set(alone.adapted) == {"denoiser"}


def test_an_adapted_system_begins_as_it_was_and_can_be_told_so_later() -> None:
    plain, module = small_system(), lora_training(lora=partial(AdaptedDenoiser, rank=2, dora=True))
    text = plain.modules["text"](["rain"])
    inputs = {"timestep": torch.tensor([500]), "context": text.embeddings, "context_mask": text.mask}
    noisy = torch.randn(1, 4, 20)
    expected = plain.modules["denoiser"](noisy, **inputs)
    torch.testing.assert_close(module.denoiser(noisy, **inputs), expected)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.2 if ".lora_B." in name else 0.0)
    assert not torch.allclose(module.denoiser(noisy, **inputs), expected, atol=1e-3)
    with without_adapters(module.denoiser):
        torch.testing.assert_close(module.denoiser(noisy, **inputs), expected)


def test_audio_becomes_latents_and_clips_without_a_caption_get_the_word() -> None:
    module, generator = lora_training(), torch.Generator().manual_seed(0)
    batch = module.latents(audio_batch(), generator)
    assert batch["caption"] == ["a zorble", "rain"]
    assert batch["latent"].shape == (2, 4, 20)
    assert batch["frame_mask"].sum(dim=1).tolist() == [20, 13]  # 800 and 500 samples of 40 a frame
    assert module.latents(batch, generator)["latent"] is batch["latent"]
    with pytest.raises(ValueError, match=r"one\.wav.*give caption="):
        lora_training(caption=None).latents(audio_batch(), generator)


def test_the_prior_weighs_what_the_system_says_of_captions_that_it_knows() -> None:
    module = lora_training(prior=a_prior())
    latents, captions = module._generated(module.prior, SECONDS)
    assert captions == ["rain", "wind", "rain"]
    assert latents.shape == (3, 4, 20)
    assert torch.equal(latents, module._generated(module.prior, SECONDS)[0])  # by seeds
    module._kept = latents, captions
    generator = torch.Generator().manual_seed(0)
    both = module._with_prior(module.latents(audio_batch(), generator), generator)
    assert len(both["latent"]) == len(both["caption"]) == 4
    assert both["caption"][:2] == ["a zorble", "rain"]
    module._num_own, module.log = 2, lambda *args, **options: None
    loss = module.mean_error(torch.tensor([1.0, 3.0, 10.0, 20.0]))
    assert float(loss) == 2.0 + 0.5 * 15.0
    module.prior = None
    assert float(module.mean_error(torch.tensor([1.0, 3.0]))) == 2.0
    with pytest.raises(ValueError, match="keeps no captions"):
        lora_training(captions=())._generated(a_prior(), SECONDS)


def with_prior(follow_base: bool) -> tuple[LoraTraining, LatentBatch]:
    """A system whose adapters have learnt something, and two items of one's own before two of the prior."""
    module = lora_training(prior=a_prior(count=2, follow_base=follow_base), mask_padding=True)
    module._kept = module._generated(module.prior, SECONDS)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.2 if ".lora_B." in name else 0.0)
    generator = torch.Generator().manual_seed(0)
    module._num_own = 2
    return module, module._with_prior(module.latents(audio_batch(), generator), generator)


@pytest.mark.parametrize("dropped", [False, True])
def test_what_is_kept_is_what_the_system_predicted_without_adapters(dropped: bool) -> None:
    module, batch = with_prior(follow_base=True)
    drops = torch.tensor([False, False, dropped, False])
    clean = module.normaliser.normalise(batch["latent"])
    noise, times = torch.randn(clean.shape), torch.tensor([100, 300, 500, 900])
    noisy = module.process.add_noise(clean, noise, times)
    text = module.condition(batch, drops)
    inputs = {"context": text.embeddings, "context_mask": text.mask, "frame_mask": batch["frame_mask"]}
    target = module.target(clean, noise, noisy, times, inputs)
    plain = small_system()
    captions = ["" if drop else caption for drop, caption in zip(drops[2:], batch["caption"][2:], strict=True)]
    known = plain.modules["text"](captions)
    options = {"context": known.embeddings, "context_mask": known.mask, "frame_mask": batch["frame_mask"][2:]}
    with torch.no_grad():
        expected = plain.modules["denoiser"](noisy[2:], times[2:], **options)
    torch.testing.assert_close(target[2:], expected)
    torch.testing.assert_close(target[:2], module.process.target(clean, noise, times)[:2])
    assert not target.requires_grad
    module.condition(batch)  # as validation asks, which has items of one's own alone
    torch.testing.assert_close(
        module.target(clean, noise, noisy, times, inputs), module.process.target(clean, noise, times)
    )


def test_without_adapters_the_prior_has_no_error_but_as_in_dreambooth_it_has() -> None:
    for follow_base in (True, False):
        module, batch = with_prior(follow_base)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.mul_(0.0 if ".lora_B." in name else 1.0)
        clean = module.normaliser.normalise(batch["latent"])
        times = torch.tensor([100, 300, 500, 900])
        text = module.condition(batch, torch.zeros(4, dtype=torch.bool))
        errors = module._errors(clean, torch.randn(clean.shape), times, text, batch["frame_mask"], None)
        assert bool(errors[:2].min() > 1e-3)
        assert bool(errors[2:].max() < 1e-9) == follow_base


def test_given_clips_stand_for_the_prior(tmp_path: Path) -> None:
    for index in range(3):
        write_wav(tmp_path / f"{index}.wav", 0.1 * torch.randn(700), RATE_HZ)
    clips = AudioDataModule(folder_splits(str(tmp_path), RATE_HZ), RATE_HZ, SECONDS, 2)
    latents, captions = lora_training()._given(a_prior(clips=clips, count=2), SECONDS)
    assert (latents.shape, len(captions)) == ((2, 4, 20), 2)
    module = lora_training()
    module.adopt_data(clips)
    assert module.checkpoint_metadata["trained_seconds"] == SECONDS
    wrong = AudioDataModule(folder_splits(str(tmp_path), 1000), 1000, SECONDS, 2)
    with pytest.raises(ValueError, match=r"data\.sample_rate_hz=1000"):
        module.adopt_data(wrong)


def test_the_recipe_is_composed_around_the_system_that_it_names() -> None:
    cfg = config("experiment=lora", "ckpt=SYSTEM", "caption=a zorble", "data.splits.folder=X", "codec_path=C")
    assert cfg.task.base.path == "SYSTEM"
    assert (cfg.task.lora.rank, cfg.task.lora.dora, cfg.task.prior.weight) == (32, False, 3.0)
    assert (cfg.data.augmentation, cfg.data.batch_size, cfg.task.caption_dropout) == (None, 4, 0.0)
    dora = config("experiment=lora", "ckpt=X", "data.splits.folder=X", "codec_path=C", "lora@task.lora=dora")
    assert dora.task.lora.dora


@pytest.mark.slow
def test_a_run_leaves_adapters_that_peft_and_the_system_take_and_resumes(tmp_path: Path) -> None:
    save_system(small_system(), tmp_path / "system")
    for index in range(4):
        write_wav(tmp_path / "own" / f"{index}.wav", 0.1 * torch.randn(900), RATE_HZ)

    def run(steps: int, *more: str) -> Path:
        cfg = config(
            *("experiment=lora", f"ckpt={tmp_path}/system", f"data.splits.folder={tmp_path}/own", "caption=a zorble"),
            *(f"data.sample_rate_hz={RATE_HZ}", f"data.duration_seconds={SECONDS}", "data.batch_size=2"),
            *("task.prior=null", "lr_schedule.warmup_steps=0", "trainer.precision=32-true", "task.lora.rank=2"),
            *(f"trainer.max_steps={steps}", f"paths.output_dir={tmp_path}/run", "hydra.job.num=0", *more),
        )
        train(cfg)
        return tmp_path / "run/adapter"

    adapter = run(3)
    info = json.loads((adapter / "adapter.json").read_text())
    assert (info["captions"], info["steps"], info["clips"]) == (["a zorble"], 3, 4)
    generator = TextToAudio.load(tmp_path / "system")
    plain = generator.generate(["a zorble"], SECONDS, num_steps=2).audio
    generator.use_adapters([adapter])
    learnt = generator.generate(["a zorble"], SECONDS, num_steps=2).audio
    assert not torch.equal(plain, learnt)
    system = load_system(tmp_path / "system")
    assert PeftModel.from_pretrained(system.modules["denoiser"], adapter / "denoiser")
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert all(".lora_" in key for key in last["state_dict"])
    run(5, "ckpt_path=auto")
    assert json.loads((adapter / "adapter.json").read_text())["steps"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default", "dora"])
def test_a_resumed_run_ends_bit_by_bit_where_the_whole_one_does(tmp_path: Path, kind: str) -> None:
    save_system(replace(small_system(), captions=["rain", "wind"]), tmp_path / "system")
    for index in range(4):
        write_wav(tmp_path / "own" / f"{index}.wav", 0.1 * torch.randn(900), RATE_HZ)

    def run(name: str, *more: str) -> Path:
        train(
            config(
                *("experiment=lora", f"ckpt={tmp_path}/system", f"data.splits.folder={tmp_path}/own", "caption=a gorp"),
                *(f"data.sample_rate_hz={RATE_HZ}", f"data.duration_seconds={SECONDS}", "data.batch_size=2"),
                *("task.prior.count=2", "task.prior.num_steps=2", "lr_schedule.warmup_steps=0", "task.lora.rank=2"),
                *("trainer.precision=32-true", "trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=2"),
                "+callbacks.checkpoint.keep_all=true",
                *(f"lora@task.lora={kind}", f"paths.output_dir={tmp_path}/{name}", "hydra.job.num=0", *more),
            )
        )
        return tmp_path / name

    whole = run("whole")
    part = run("part", f"ckpt_path={whole}/checkpoints/step_000002.ckpt")
    states = [torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (whole, part)]
    assert states[0]["global_step"] == states[1]["global_step"] == 4
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(states[1]["state_dict"][name], tensor), name
    infos = [json.loads((folder / "adapter/adapter.json").read_text()) for folder in (whole, part)]
    assert infos[0] == infos[1]  # the hashes of its files
    weights = [load_file(whole / f"adapter/{name}/adapter_model.safetensors") for name in ("denoiser", "text")]
    assert any("lora_magnitude_vector" in key for key in weights[0]) == (kind == "dora")
    assert any("lora_B" in key and bool(tensor.any()) for key, tensor in weights[0].items())
    assert states[0]["foley"]["own_captions"] == ["a gorp"]
    generator = TextToAudio.load(tmp_path / "system")
    digests = {name: hash_module(module) for name, module in generator.system.modules.items()}
    generator.use_adapters([whole / "adapter"])
    assert hash_module(generator.denoiser) != digests["denoiser"]
    generator.use_adapters([])
    assert {name: hash_module(module) for name, module in generator.system.modules.items()} == digests


def test_the_writer_takes_the_values_of_the_checkpoint(tmp_path: Path) -> None:
    module = lora_training()
    module.captions = {"a zorble"}
    state = {name: tensor + 1.0 for name, tensor in module.saved_state(module.state_dict()).items()}
    trainer = type("Trainer", (), {"global_step": 7, "datamodule": None})()
    AdapterWriter(str(tmp_path), "a system").on_save_checkpoint(trainer, module, {"state_dict": state})
    plain = small_system()
    stack = AdapterStack({name: plain.modules[name] for name in ("denoiser", "text")})
    stack.load(AdapterChoice(str(tmp_path / "adapter")))
    assert stack.captions == ["a zorble"]
    for name, parameter in plain.modules["text"].named_parameters():
        if ".lora_A." in name:
            key = f"text.{name.replace('.adapter_0.', '.default.')}"
            assert torch.equal(parameter, state[key])
