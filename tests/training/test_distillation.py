"""Guided consistency distillation: what it starts from, what it converges to, and what its checkpoints say."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distillation_parts import distillation, process_of, teacher_of, tiny_teacher
from torch import Tensor, nn
from training_parts import CHANNELS, FRAMES, TinyData, TinyText, build_trainer

from foley.core.components import CheckpointError
from foley.core.seeding import torch_generator
from foley.data.latents import StaleCacheError
from foley.diffusion.consistency import Consistency, ddim_jump
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import embed
from foley.losses.regression import pseudo_huber
from foley.system.checkpoint import read_training_checkpoint
from foley.system.system import System
from foley.training.callbacks import listening
from foley.training.callbacks.listening import AudioSamples
from foley.training.distillation import ConsistencyDistillation, Draws, Teacher

MEAN, STD = 0.7, 0.5
PREDICTIONS = ["v", "epsilon", "flow"]


def run(folder: Path, max_steps: int, module: ConsistencyDistillation, ckpt_path: Path | None = None):
    trainer = build_trainer(folder, max_steps)
    trainer.fit(module, datamodule=TinyData(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_student_begins_as_the_teacher_at_every_scale(prediction: str) -> None:
    module = distillation(tiny_teacher(prediction)).eval()
    noisy, text = torch.randn(3, CHANNELS, FRAMES), embed(module.text, ["a", "bb", "ccc"])
    inputs = {"timestep": torch.tensor([19, 499, 999]), "context": text.context, "context_mask": text.mask}
    expected = module.teacher(noisy, **inputs)
    for network in (module.denoiser, module.target):
        assert torch.equal(network(noisy, **inputs, guidance_scale=torch.tensor([5.0, 9.0, 13.0])), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_trains_the_student_alone_through_one_path(prediction: str) -> None:
    module = distillation(tiny_teacher(prediction)).train()
    clean = torch.randn(4, CHANNELS, FRAMES)
    draws = module.draw(clean.shape, torch_generator("draws"))
    loss = module.consistency_loss(clean, embed(module.text, ["a"] * 4), draws)
    loss.backward()
    assert loss > 0
    trained = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"denoiser"}
    assert module.denoiser.guidance_embedding.projection.weight.grad.any()
    assert not any(part.training for part in (module.teacher, module.target, module.text))


def test_draws_cover_grid_and_scales() -> None:
    module = distillation(tiny_teacher(), consistency=Consistency(20, (5.0, 13.0)))
    draws = module.draw(torch.Size([2000, 1, 1]), torch_generator("draws"))
    assert set(draws.point.tolist()) == set(range(50))
    assert 5 <= draws.scale.min() < 5.1
    assert 12.9 < draws.scale.max() <= 13


def test_student_and_target_are_told_omega_of_a_jump_guided_by_w(monkeypatch: pytest.MonkeyPatch) -> None:
    module, told = distillation(tiny_teacher(), consistency=Consistency(50, embeds="omega")), []
    draws = module.draw(torch.Size([2, CHANNELS, FRAMES]), torch_generator("draws"))
    for network in (module.denoiser, module.target):
        embedding = network.guidance_embedding
        monkeypatch.setattr(embedding, "forward", lambda scale: told.append(scale) or 0 * scale[:, None])
    module.consistency_loss(torch.randn(2, CHANNELS, FRAMES), embed(module.text, ["a", "b"]), draws)
    assert [scale.tolist() for scale in told] == [(draws.scale - 1).tolist()] * 2


@pytest.mark.parametrize("frames", ["hidden", "valid"])
def test_hidden_and_valid_frames_alone_count(frames: str) -> None:
    counted = torch.arange(FRAMES).expand(2, FRAMES) < FRAMES - 4
    masks = []

    def loss(estimate: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        masks.append(mask)
        return pseudo_huber(estimate, target, mask=mask)

    module = distillation(tiny_teacher(), loss=loss)
    clean = torch.randn(2, CHANNELS, FRAMES)
    draws, text = module.draw(clean.shape, torch_generator("draws")), embed(module.text, ["a", "b"])
    value = module.consistency_loss(clean, text, draws, **{frames: counted})
    assert torch.equal(masks[0], counted)
    # Frames that do not count are seen where they are given, and not where they are padding: but for the first two,
    # which the last convolutions of teacher and target reach.
    other = torch.where(torch.arange(FRAMES) > FRAMES - 3, clean + 1, clean)
    changed = module.consistency_loss(other, text, draws, **{frames: counted})
    assert torch.equal(changed, value) == (frames == "valid")


def test_a_student_of_another_teacher_does_not_resume() -> None:
    first, second = distillation(tiny_teacher()), distillation(tiny_teacher())
    checkpoint = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    second.checkpoint_metadata["teacher_hash"] = "another"
    with pytest.raises(CheckpointError, match="config teacher_hash"):
        second.on_load_checkpoint(checkpoint)


def test_targets_in_half_precision_are_nearly_the_same() -> None:
    losses = []
    for half in (False, True):
        module = distillation(tiny_teacher(), half_precision_targets=half)
        clean = torch.randn(4, CHANNELS, FRAMES, generator=torch_generator("clean"))
        draws = module.draw(clean.shape, torch_generator("draws"))
        losses.append(module.consistency_loss(clean, embed(module.text, ["a"] * 4), draws).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[0] != losses[1]


def test_the_target_is_a_moving_average() -> None:
    module = distillation(tiny_teacher(), target_decay=0.9)
    before = [parameter.clone() for parameter in module.target.parameters()]
    with torch.no_grad():
        for parameter in module.denoiser.parameters():
            parameter.add_(1.0)
    module.update_target()
    for kept, now in zip(before, module.target.parameters(), strict=True):
        torch.testing.assert_close(now, kept + 0.1)
    with pytest.raises(ValueError, match="target_decay"):
        distillation(tiny_teacher(), target_decay=1.0)


class GaussianTeacher(nn.Module):
    """The exact prediction where every latent value is normal with MEAN and STD, whatever the text."""

    latent_channels = 1

    def __init__(self, process: DiffusionProcess) -> None:
        super().__init__()
        self.process = process

    def forward(self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        alpha, sigma = (level[:, None, None] for level in self.process.levels(timestep))
        standard = (noisy - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return self.process.target(MEAN + alpha * STD**2 * standard, sigma * standard, timestep)


class AffineStudent(nn.Module):
    """The teacher plus, at each timestep, an affine correction that starts at zero: the exact map is one of these."""

    def __init__(self, teacher: GaussianTeacher) -> None:
        super().__init__()
        self.base = [teacher]  # in a list, so that it is no part of the student
        self.table = nn.Parameter(torch.zeros(teacher.process.num_train_steps + 1, 2))

    def forward(self, noisy, timestep, context, context_mask, guidance_scale) -> Tensor:
        offset, gain = self.table[timestep.long()][:, :, None, None].unbind(dim=1)
        return self.base[0](noisy, timestep, context, context_mask) + offset + gain * noisy


class GaussianSystem(Teacher):
    def make_student(self) -> nn.Module:
        return AffineStudent(self.system.modules["denoiser"])


def exact_map(process: DiffusionProcess, noisy: Tensor, timestep: Tensor) -> Tensor:
    """Where the probability-flow ODE leads from `timestep` to 0: standard scores stay as they are."""

    def spread(alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha.square() * STD**2 + sigma.square()).sqrt()

    first, last = process.levels(timestep), process.levels(torch.zeros_like(timestep))
    standard = (noisy - first[0][:, None, None] * MEAN) / spread(*first)[:, None, None]
    return last[0][:, None, None] * MEAN + spread(*last)[:, None, None] * standard


def noised_data(process: DiffusionProcess, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Forty items at each point of the grid, and their timesteps."""
    start = grid.repeat_interleave(40)
    clean = MEAN + STD * torch.randn(len(start), 1, 4, generator=torch_generator("clean"))
    return process.add_noise(clean, torch.randn(clean.shape, generator=torch_generator("noise")), start), start


def distance(left: Tensor, right: Tensor) -> float:
    return (left - right).square().mean().sqrt().item()


def solver_error(prediction: str, jump_steps: int) -> float:
    """Of the teacher's own jumps, one after the other down to timestep 0."""
    process, consistency = process_of(prediction, 200), Consistency(jump_steps)
    teacher, grid = GaussianTeacher(process), consistency.grid(process)
    noisy, start = noised_data(process, grid)
    latent = noisy
    for begin, end in zip(grid.flip(0), consistency.jump_ends(grid).flip(0), strict=True):
        times = begin.expand(len(latent)), end.expand(len(latent))
        jump = ddim_jump(process, latent, teacher(latent, times[0], None, None), *times)
        latent = torch.where((start >= begin)[:, None, None], jump, latent)
    return distance(latent, exact_map(process, noisy, start))


def distilled_error(prediction: str, jump_steps: int, steps: int) -> tuple[float, float]:
    """Before and after distillation, over all points of the grid."""
    process = process_of(prediction, 200)
    parts = teacher_of(GaussianTeacher(process), process=process)
    options = {"consistency": Consistency(jump_steps), "loss": partial(pseudo_huber, c=0.1), "target_decay": 0.5}
    module = distillation(GaussianSystem(parts.system, set()), **options)
    optimizer = torch.optim.Adam([module.denoiser.table], lr=0.1, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    text, size = embed(module.text, ["a"] * 256), torch.Size([256, 1, 4])

    def error() -> float:
        noisy, start = noised_data(process, module.grid)
        estimate = module.consistency.estimate(process, noisy, module.denoiser(noisy, start, None, None, None), start)
        return distance(estimate, exact_map(process, noisy, start))

    before = error()
    for step in range(steps):
        generator = torch_generator("distil", step)
        clean = MEAN + STD * torch.randn(size, generator=generator)
        optimizer.zero_grad()
        module.consistency_loss(clean, text, module.draw(size, generator)).backward()
        optimizer.step()
        schedule.step()
        module.update_target()
    return before, error()


@pytest.mark.parametrize(
    "prediction", [PREDICTIONS[0], *(pytest.param(other, marks=pytest.mark.slow) for other in PREDICTIONS[1:])]
)
def test_a_perfect_teacher_is_distilled_into_the_exact_solution(prediction: str) -> None:
    """What is left is the error of the teacher's jumps, which goes to zero with their length."""
    before, fine = distilled_error(prediction, jump_steps=10, steps=800)
    _, coarse = distilled_error(prediction, jump_steps=40, steps=300)
    assert fine < 0.2 * before
    assert fine == pytest.approx(solver_error(prediction, 10), rel=0.2)
    assert coarse == pytest.approx(solver_error(prediction, 40), rel=0.2)
    assert solver_error(prediction, 1) < 0.15 * solver_error(prediction, 10)


def test_training_resumes_and_its_checkpoints_are_students(tmp_path: Path) -> None:
    whole, part = (distillation(tiny_teacher()) for _ in range(2))
    run(tmp_path / "whole", 6, whole)
    start = tmp_path / "whole/checkpoints/step_000004.ckpt"
    trainer = run(tmp_path / "part", 6, part, start)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(part.state_dict()[name], tensor), name
    assert {"train/loss"} <= trainer.callback_metrics.keys()
    checkpoint = read_training_checkpoint(start)
    assert checkpoint["foley"]["components"]["denoiser"]["guidance_embedding"] is True
    assert checkpoint["foley"]["teacher_hash"]
    prefixes = {key.split(".")[0] for key in checkpoint["state_dict"]}
    assert prefixes == {"denoiser", "target", "text", "normaliser"}


def test_samples_while_it_trains_are_those_of_a_student(tmp_path: Path, monkeypatch) -> None:
    codec = SimpleNamespace(sample_rate_hz=1000, hop_samples=10, decode=lambda latent: latent.mean(1, keepdim=True))
    codec.to = lambda device: codec
    monkeypatch.setattr(listening, "load_trained", lambda path, name: codec)
    module = distillation(tiny_teacher(), consistency=Consistency(50, (2.0, 6.0)))
    at = [AudioSamples("codec", str(tmp_path), ["rain"], 0.12, ClassifierFreeGuidance(w)) for w in (1.0, 2.0, 3.0)]
    below, lowest, inside = (samples.generate(module, tmp_path) for samples in at)
    assert below.shape == (1, 1, FRAMES)
    assert torch.equal(below, lowest)
    assert torch.equal(inside, lowest)  # the embedding of the scale is zero before it is trained


def test_a_frozen_text_encoder_is_left_out() -> None:
    module = distillation(tiny_teacher(text=TinyText(trainable=False)))
    assert set(module.unsaved_components) == {"text", "teacher"}


def test_latents_must_be_of_the_teachers_codec() -> None:
    teacher = Teacher(tiny_teacher().system, {"abc"})
    teacher.require_codec("abc")
    with pytest.raises(StaleCacheError, match=r"codec xyz, the teacher was trained on those of abc"):
        teacher.require_codec("xyz")


def test_a_denoiser_that_lacks_weights_makes_no_student() -> None:
    teacher = tiny_teacher()
    modules = {**teacher.system.modules, "denoiser": nn.Linear(2, 2)}
    with pytest.raises(CheckpointError, match="lacks weights"):
        Teacher(System(modules, teacher.system.process, teacher.system.configs), set()).make_student()


def test_draws_move_together() -> None:
    draws = Draws(torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.long), torch.ones(1)).to(torch.zeros(1).double())
    assert (draws.noise.dtype, draws.point.dtype, draws.scale.dtype) == (torch.float64, torch.long, torch.float64)
