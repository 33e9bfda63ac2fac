"""Training a ControlNet: it begins as its model, trains its own parts alone, and ends as a system that follows."""

from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from latent_parts import latent_cache_writer
from small_system import CONFIGS
from stirring_parts import stir

from foley.core.components import CheckpointError
from foley.core.config import CONFIG_DIR
from foley.core.hashing import hash_module
from foley.core.seeding import torch_generator
from foley.data.dataset import LatentBatch
from foley.data.latents import StaleCacheError
from foley.generation.text_to_audio import TextToAudio
from foley.models.dit.controlnet import ControlledTransformer, energy_curve
from foley.models.dit.masking import SpanMask
from foley.system.checkpoint import read_training_checkpoint
from foley.system.system import System, build_system, save_system
from foley.training.control import ControlTraining
from foley.training.distillation import Teacher
from foley.training.run import train

FRAMES, HOP = 25, 40
STEPS = ["trainer.max_steps=2", "trainer.max_time=null", "trainer.val_check_interval=2", "lr_schedule.warmup_steps=1"]
STEPS += ["callbacks.checkpoint.every_n_train_steps=2", "callbacks.progress=null", "data.batch_size=4", "trainer=cpu"]


@pytest.fixture(scope="module")
def system() -> System:
    return random_system()


def random_system() -> System:
    """With no layer at zero, which would hide the others."""
    torch.manual_seed(0)
    built = build_system(CONFIGS)
    stir(built.modules["denoiser"])
    return built


def control_training(system: System, **options) -> ControlTraining:
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return ControlTraining(Teacher(system, set()), system.modules["codec"], optimizer, **options)


def batch(size: int = 3, padded: int = 0) -> LatentBatch:
    latent = torch.randn(size, 4, FRAMES, generator=torch_generator("latents"))
    mask = torch.ones(size, FRAMES, dtype=torch.bool)
    mask[:, FRAMES - padded :] = False
    names = ["a"] * size
    return LatentBatch(latent=latent, frame_mask=mask, is_padded=bool(padded), caption=names, label=names, id=names)


def errors(module: ControlTraining, given: LatentBatch) -> torch.Tensor:
    """Of each item, `[B]`, by the network as training calls it."""
    clean, process = given["latent"], module.process
    noise, time = torch.randn(clean.shape, generator=torch_generator("noise")), torch.tensor([10, 500, 999])
    text = module.condition(given)
    noisy = process.add_noise(clean, noise, time)
    predicted = module.network(module.denoiser)(noisy, time, context=text.embeddings, context_mask=text.mask)
    return (predicted - process.target(clean, noise, time)).square().mean(dim=(1, 2))


def test_it_begins_with_the_loss_of_its_model_bit_by_bit_and_trains_its_own_parts(system: System) -> None:
    module, given = control_training(system), batch()
    before = errors(module, given)  # of no curve
    module._control = module.draw_control(given, torch_generator("hidden"))
    assert torch.equal(errors(module, given), before)
    optimizer = module.configure_optimizers()
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {name for name, parameter in module.named_parameters() if id(parameter) in trained}
    parts = ("denoiser.control.embedding.", "denoiser.control.in_blocks.", "denoiser.control.projections.")
    assert all(name.startswith(parts) for name in own)
    assert len(own) == len(module.denoiser.control.trained())
    frozen = {name: value.clone() for name, value in module.state_dict().items() if not name.startswith(parts)}
    for _ in range(3):
        optimizer.zero_grad()
        errors(module, given).sum().backward()
        optimizer.step()
    assert errors(module, given).sum() < before.sum()
    assert all(torch.equal(module.state_dict()[name], value) for name, value in frozen.items())


def test_the_curve_is_that_of_the_decoded_latent_and_padding_is_silence(system: System) -> None:
    module, given = control_training(system), batch(padded=5)
    with torch.no_grad():
        audio = system.modules["codec"].decode(given["latent"])[:, 0]
        audio[:, -5 * HOP :] = 0
    torch.testing.assert_close(module.curves(given), energy_curve(audio, HOP // 2))


def test_a_share_of_the_items_is_hidden_in_spans(system: System) -> None:
    masking = SpanMask(span_frames=10, ratio=(0.25, 0.5))
    module = control_training(system, control_masking=masking, hidden_share=0.25)
    hidden = [module.draw_control(batch(4), torch_generator(seed))["control_hidden"] for seed in range(50)]
    share = torch.cat(hidden).float().mean(dim=1)  # of each item's values
    assert 0.15 < (share > 0).float().mean() < 0.35
    assert share.max() < 0.75
    assert "control_hidden" not in control_training(system).draw_control(batch(), torch_generator("none"))


def test_a_system_with_a_controlnet_goes_on_with_it(system: System) -> None:
    first = control_training(system)
    torch.nn.init.ones_(first.denoiser.control.projections[0].weight)
    modules = {**system.modules, "denoiser": first.denoiser}
    again = control_training(System(modules, system.process, {**system.configs, **first.component_configs}))
    assert again.denoiser is first.denoiser
    assert again.component_configs["denoiser"] == first.component_configs["denoiser"]


def test_latents_of_another_codec_and_models_without_skips_are_refused(system: System, tmp_path: Path) -> None:
    save_system(system, tmp_path / "system")
    with pytest.raises(StaleCacheError, match="the codec"):
        train(config(latents(tmp_path / "latents", "another"), tmp_path / "system", tmp_path / "run"))
    short = {**CONFIGS, "denoiser": {**CONFIGS["denoiser"], "long_skips": False}}
    with pytest.raises(CheckpointError, match=r"the model to control .* a ControlNet adds to long skips"):
        control_training(System(system.modules, system.process, short))


def latents(folder: Path, codec_hash: str) -> Path:
    with latent_cache_writer(folder, codec_hash, 2000, HOP) as cache:
        for index in range(8):
            mean = torch.randn(4, FRAMES, generator=torch_generator("clip", index))
            split = "val" if index >= 4 else "train"
            cache.add(mean, torch.full_like(mean, 0.1), f"clip{index}", "a dog barks", "dog", split, 0.5)
    return folder


def config(cache: Path, system: Path, folder: Path):
    given = ["experiment=tiny_controlnet", f"system={system}", f"data.cache_dir={cache}", "data.duration_seconds=0.5"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", ["name=test", *given, *STEPS, f"paths.output_dir={folder}"])


def test_a_run_ends_as_a_system_that_follows_a_recording(system: System, tmp_path: Path) -> None:
    save_system(system, tmp_path / "system")
    cfg = config(latents(tmp_path / "latents", hash_module(system.modules["codec"])), tmp_path / "system", tmp_path)
    assert cfg.codec_path == str(tmp_path / "system")  # the system's own
    cfg.paths.output_dir = str(tmp_path / "run")
    train(cfg)
    last = tmp_path / "run/checkpoints/last.ckpt"
    state = read_training_checkpoint(last)["state_dict"]
    assert {name.partition(".")[0] for name in state} == {"denoiser", "normaliser", "text"}
    generator = TextToAudio.load(last)
    assert isinstance(generator.denoiser, ControlledTransformer)
    soundfile.write(tmp_path / "dog.wav", 0.1 * torch.randn(700).numpy(), 2000)
    followed = generator.follow(["a dog barks"], tmp_path / "dog.wav", num_steps=2)
    assert followed.audio.shape == (1, 1, 700)
    assert followed.settings["control"]["scale"] == 1.0
    assert generator.generate(["a dog barks"], 0.35, num_steps=2).audio.shape == (1, 1, 700)


def enveloped(size: int, key: object) -> LatentBatch:
    """Latents of one shape over the channels, whose size changes from fifth to fifth: the decoder makes it loudness."""
    drawn = torch.rand(size, 1, FRAMES // 5 + 1, generator=torch_generator(key))
    envelope = drawn.repeat_interleave(5, dim=2)[..., :FRAMES] * 4 - 2
    return {**batch(size), "latent": envelope * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]}


def loss_under(module: ControlTraining, given: LatentBatch, curve: torch.Tensor, key: object) -> torch.Tensor:
    generator, clean, process = torch_generator(key), given["latent"], module.process
    noise = torch.randn(clean.shape, generator=generator)
    time = torch.randint(300, 1000, (len(clean),), generator=generator)
    text, noisy = module.condition(given), process.add_noise(clean, noise, time)
    more = {"context": text.embeddings, "context_mask": text.mask, "control": curve}
    return (module.denoiser(noisy, time, **more) - process.target(clean, noise, time)).square().mean()


@pytest.mark.slow
def test_it_learns_to_follow() -> None:
    """What it predicts with the curve of an item is better than with that of another."""
    module = ControlTraining(
        Teacher(random := random_system(), set()), random.modules["codec"], partial(torch.optim.AdamW, lr=5e-3)
    )
    optimizer = module.configure_optimizers()
    for step in range(300):
        given = enveloped(8, ("b", step))
        optimizer.zero_grad()
        loss_under(module, given, module.curves(given), ("n", step)).backward()
        optimizer.step()
    unseen = enveloped(32, "test")
    curve = module.curves(unseen)
    with torch.no_grad():
        right, wrong = (loss_under(module, unseen, given, "n") for given in (curve, curve.roll(1, dims=0)))
    assert right < 0.95 * wrong
