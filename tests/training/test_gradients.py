"""One norm a step: gradients are clipped by it or dropped, by fused optimizers without a word from the host."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_parts import CHANNELS, LatentSamples, TinyData, TinyDenoiser, TinyText, build_module, collate, run

from foley.data.dataset import SampleKey
from foley.diffusion.process import DiffusionProcess
from foley.models.codec.normaliser import LatentNormaliser
from foley.training import base
from foley.training.callbacks import non_finite
from foley.training.callbacks.non_finite import NonFiniteGuard, NonFiniteLossError
from foley.training.diffusion import DiffusionTraining
from foley.training.gradients import clip_gradients, decides_on_device, drop_unless_finite, gradient_norm

NAN = float("nan")
FUSED = [False, True]


def module_with(fused: bool, **options) -> DiffusionTraining:
    module = build_module(**options)
    module.make_optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5, fused=fused or None)
    return module


def one_weight(fused: bool) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5, fused=fused or None)
    assert decides_on_device(optimizer) == fused
    weight.grad = torch.ones(4)
    optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_bad_step_moves_neither_weights_nor_moments(fused: bool, bad: float) -> None:
    weight, optimizer = one_weight(fused)
    before = weight.clone(), {name: value.clone() for name, value in optimizer.state[weight].items()}
    for gradient in (bad, 1.0):
        weight.grad = torch.tensor([1.0, gradient, 1.0, 1.0])
        norm = gradient_norm(optimizer)
        clip_gradients(optimizer, 1.0, norm)
        drop_unless_finite(optimizer, norm)
        optimizer.step()
        same = torch.equal(weight, before[0])
        same_moments = all(torch.equal(value, before[1][name]) for name, value in optimizer.state[weight].items())
        assert (same, same_moments) == ((True, True) if gradient is bad else (False, False))


@pytest.mark.parametrize("fused", FUSED)
def test_gradients_are_scaled_down_to_the_norm_and_never_up(fused: bool) -> None:
    weight, optimizer = one_weight(fused)
    for limit, expected in ((None, 4.0), (8.0, 4.0), (1.0, 1.0)):
        weight.grad = torch.full((4,), 2.0)  # of norm 4
        clip_gradients(optimizer, limit)
        assert gradient_norm(optimizer).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fused", FUSED)
def test_the_norm_is_measured_once_a_step_and_clips(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, clipped = [], []
    monkeypatch.setattr(
        non_finite, "gradient_norm", lambda optimizer: measured.append(gradient_norm(optimizer)) or measured[-1]
    )
    monkeypatch.setattr(base, "clip_gradients", lambda optimizer, *limits: clipped.append(limits))
    run(tmp_path, 3, module=module_with(fused, gradient_clip_norm=0.25))
    assert [limit for limit, _ in clipped] == [0.25] * 3
    assert [norm for _, norm in clipped] == measured


@pytest.mark.parametrize("fused", FUSED)
def test_bad_batches_are_named_and_counted_and_the_run_goes_on(fused: bool, tmp_path: Path, caplog) -> None:
    """The last step is bad too: nobody looks back at that but the end of the run."""
    data = TinyData(8, poisoned=frozenset({5}))
    trainer, module, log = run(tmp_path, 4, module=module_with(fused), data=data)
    bad = [step for step, ids in enumerate(log.ids) if any(clip.endswith("/5") for clip in ids)]
    assert [line for line in caplog.messages if "skipped" in line] == [
        f"step {step} skipped: gradients are not finite; batch ids {log.ids[step]}" for step in bad
    ]
    guard = next(callback for callback in trainer.callbacks if isinstance(callback, NonFiniteGuard))
    assert guard.num_skipped == len(bad) == 2
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("fused", FUSED)
def test_bad_steps_in_a_row_end_the_run(fused: bool, tmp_path: Path) -> None:
    module = module_with(fused)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match=r"3 steps in a row, up to step 2.*task\.gradient_clip_norm"):
        run(tmp_path, 9, module=module, data=TinyData(8, poisoned=frozenset(range(8))))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Readings(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors: on a GPU it waits for each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device() -> None:
    """But for the guard's look at the step before, whose number is on the host by then."""
    module = DiffusionTraining(
        TinyDenoiser(),
        DiffusionProcess(),
        LatentNormaliser(CHANNELS),
        partial(torch.optim.AdamW, lr=1e-2, fused=True),
        TinyText(),
        gradient_clip_norm=1.0,
        min_snr_gamma=5.0,
    )
    optimizer = module.configure_optimizers()
    batch = collate([LatentSamples(4)[SampleKey(index)] for index in range(4)])
    module.log = lambda *_, **__: None
    module.trainer = SimpleNamespace(global_step=0, global_rank=0)
    with Readings() as readings:
        bool(torch.ones(()))
        assert readings.count == 1
        loss = module.training_step(batch, 0)
        loss.backward()
        norm = gradient_norm(optimizer)
        drop_unless_finite(optimizer, norm)
        clip_gradients(optimizer, 1.0, norm)
        optimizer.step()
    assert readings.count == 1
