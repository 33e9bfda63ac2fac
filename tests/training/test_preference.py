"""Tuning on pairs: where it begins, what trains, what stays as it was, and that it goes on exactly."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from distillation_parts import tiny_teacher
from preference_parts import pair_batch, pair_data, tuning, write_pairs
from torch import Tensor
from training_parts import CHANNELS, FRAMES, TinyData, build_trainer

from foley.core.components import CheckpointError, build_component
from foley.core.seeding import torch_generator
from foley.data.latents import StaleCacheError
from foley.diffusion.crpo import CRPO
from foley.diffusion.dpo import DiffusionDPO, PairErrors
from foley.diffusion.sampler import embed
from foley.models.lora import AdaptedDenoiser, without_adapters
from foley.system.checkpoint import read_training_checkpoint
from foley.training.preference import PreferenceTuning

adapters = partial(AdaptedDenoiser, rank=2)
WAYS = [None, adapters]
PREDICTIONS = ["v", "epsilon", "flow"]
errors_of = partial(PreferenceTuning.pair_errors, batch=pair_batch())


def draws() -> torch.Generator:
    return torch_generator("draws")


def inputs_of(module: PreferenceTuning) -> dict[str, Tensor]:
    text = embed(module.text, ["a", "bb"])
    more = {"timestep": torch.tensor([19, 999]), "context": text.context, "context_mask": text.mask}
    return {"noisy": torch.randn(2, CHANNELS, FRAMES, generator=torch_generator("noisy")), **more}


def step(module: PreferenceTuning) -> PairErrors:
    """One step on the same draws; returns the errors before it."""
    optimizer = module.configure_optimizers()
    errors = errors_of(module, generator=draws())
    module.objective(errors).backward()
    optimizer.step()
    optimizer.zero_grad()
    return errors


@pytest.mark.parametrize("lora", WAYS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_begins_at_log_2_and_a_step_moves_winners_down_and_losers_up(
    prediction: str, lora: Callable[..., AdaptedDenoiser] | None
) -> None:
    module = tuning(prediction, lora=lora).train()
    before = step(module)
    assert torch.equal(before.winner, before.reference_winner)  # bit for bit
    assert torch.equal(before.loser, before.reference_loser)
    assert module.objective(before).item() == pytest.approx(math.log(2))
    after = errors_of(module, generator=draws())
    assert torch.equal(after.reference_winner, before.reference_winner)
    assert torch.equal(after.reference_loser, before.reference_loser)
    assert (after.winner_change - after.loser_change).mean() < 0
    assert module.objective(after) < module.objective(before)


def test_dpo_alone_moves_the_errors_apart_and_crpo_holds_the_winner() -> None:
    """Winner and loser share text, time and noise: one step moves both, and the loss on the winner decides where."""
    changes = {}
    for name, objective in {"dpo": DiffusionDPO(1.0), "crpo": CRPO(1.0, winner_weight=10.0)}.items():
        module = tuning(objective=objective)
        step(module)
        changes[name] = float(errors_of(module, generator=draws()).winner_change.mean())
    assert changes["crpo"] < min(changes["dpo"], 0)


@pytest.mark.parametrize("lora", WAYS)
def test_policy_or_adapters_train_and_nothing_else(lora: Callable[..., AdaptedDenoiser] | None) -> None:
    module = tuning(lora=lora).train()
    frozen = {name: value.clone() for name, value in module.state_dict().items()}
    step(module)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, frozen[name])}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert changed
    assert changed <= trained
    assert all(name.startswith("denoiser.") for name in trained)
    assert all(".lora_" in name for name in trained) == (lora is not None)
    assert (module.reference is None) == (lora is not None)
    assert not module.text.training


def test_without_adapters_a_tuned_policy_is_its_base_bit_for_bit() -> None:
    module, base = tuning(lora=adapters, lr=0.1), tiny_teacher().system.modules["denoiser"]
    step(module)
    inputs = inputs_of(module)
    with torch.no_grad():
        tuned, expected = module.denoiser(**inputs), base(**inputs)
        with without_adapters(module.denoiser):
            assert torch.equal(module.denoiser(**inputs), expected)
        assert torch.equal(module.denoiser(**inputs), tuned)
    assert not torch.allclose(tuned, expected)
    before = [parameter.requires_grad for parameter in module.parameters()]
    with pytest.raises(RuntimeError, match="inside"), without_adapters(module.denoiser):
        raise RuntimeError("inside")
    assert [parameter.requires_grad for parameter in module.parameters()] == before
    assert torch.equal(module.denoiser(**inputs), tuned)


def test_winner_and_loser_share_noise_time_and_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = tuning(), []
    add_noise = module.process.add_noise

    def watched(clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        seen.append((noise, timestep))
        return add_noise(clean, noise, timestep)

    monkeypatch.setattr(module.process, "add_noise", watched)
    given, dropped = pair_batch(), torch.tensor([True, False, True, False])
    module.pair_errors(given, draws(), dropped)
    (noise, timestep), *rest = seen
    assert not rest  # one noisy latent for both networks
    for drawn in (noise, timestep):
        assert torch.equal(*drawn.chunk(2))
    # Swapping winners and losers swaps the errors, whatever is dropped.
    errors = module.pair_errors(given, draws(), dropped)
    swapped = module.pair_errors({**given, "latent": given["loser"], "loser": given["latent"]}, draws(), dropped)
    torch.testing.assert_close(swapped.winner, errors.loser)
    assert not torch.allclose(module.pair_errors(given, draws()).winner, errors.winner)


def test_padding_counts_for_nothing_where_it_is_masked() -> None:
    module, given = tuning(mask_padding=True), pair_batch(padded=4)
    errors = module.pair_errors(given, draws())
    other = {**given, "latent": torch.where(given["frame_mask"][:, None], given["latent"], torch.tensor(5.0))}
    # The last convolution reaches one frame into the padding, so that frames before it may differ: not the noise.
    changed = module.pair_errors(other, draws())
    torch.testing.assert_close(changed.winner, errors.winner, atol=0.2, rtol=0)
    whole = tuning().pair_errors(other, draws())
    assert (whole.winner - errors.winner).abs().max() > 0.2


def test_other_data_and_other_latents_are_refused(tmp_path: Path) -> None:
    module = tuning()
    with pytest.raises(TypeError, match="data=preferences, got TinyData; foley prefer"):
        module.adopt_data(TinyData())
    data = pair_data(write_pairs(tmp_path / "pairs"))
    module.adopt_data(data)
    assert module.checkpoint_metadata["data_hash"] == data.preferences.content_hash
    module.source.codec_hashes.add("another")
    with pytest.raises(StaleCacheError, match="the codec c0dec"):
        module.adopt_data(data)


def test_a_run_of_another_reference_or_objective_does_not_resume() -> None:
    first, second = tuning(), tuning()
    checkpoint = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    assert not any(key.startswith("reference.") for key in checkpoint["state_dict"])
    second.on_load_checkpoint(checkpoint)
    second.checkpoint_metadata["reference_hash"] = "another"
    with pytest.raises(CheckpointError, match="config reference_hash"):
        second.on_load_checkpoint(checkpoint)


def run(folder: Path, pairs: Path, module: PreferenceTuning, ckpt_path: Path | None = None) -> PreferenceTuning:
    data = pair_data(pairs)
    module.adopt_data(data)
    build_trainer(folder, 6).fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("lora", WAYS)
def test_training_resumes_exactly_and_ends_as_an_ordinary_denoiser(
    tmp_path: Path, lora: Callable[..., AdaptedDenoiser] | None
) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    whole, part = (tuning(lora=lora, objective=CRPO()) for _ in range(2))
    run(tmp_path / "whole", pairs, whole)
    start = tmp_path / "whole/checkpoints/step_000004.ckpt"
    run(tmp_path / "part", pairs, part, start)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(part.state_dict()[name], tensor), name
    checkpoint = read_training_checkpoint(start)
    trained = build_component(checkpoint["foley"]["components"]["denoiser"])
    trained.load_state_dict(whole.denoiser.state_dict())
    inputs = inputs_of(whole)
    expected = whole.denoiser(**inputs)
    torch.testing.assert_close(trained(**inputs), expected)
    if lora is not None:
        torch.testing.assert_close(trained.folded()(**inputs), expected, atol=1e-5, rtol=1e-4)
