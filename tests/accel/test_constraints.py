"""Constraints that all layer caches take, and evaluations that another accelerator skips."""

from itertools import product
from typing import Any

import pytest
import torch
from commands import compose_command
from hydra.utils import instantiate

from foley.accel.caching.audiocache import AudioCache, audiocache_schedule
from foley.accel.caching.budget import Budget
from foley.accel.caching.calibration import CalibrationRecorder, calibration_stem
from foley.accel.caching.fora import Fora, fora_schedule
from foley.accel.caching.layer_cache import LayerCache
from foley.accel.caching.schedule import Constraints
from foley.accel.caching.smoothcache import SmoothCache, smoothcache_schedule
from foley.diffusion.context import RunContext, StepContext

SOME = Constraints(max_reuses=2, warmup=2, cooldown=1, always_compute=(6,))
MANY = 12


def meets(row: list[bool], constraints: Constraints) -> bool:
    computed = [evaluation for evaluation, computes in enumerate(row) if computes]
    gaps = [after - before - 1 for before, after in zip(computed, [*computed[1:], len(row)], strict=True)]
    wanted = {
        *range(constraints.warmup),
        *range(len(row) - constraints.cooldown, len(row)),
        *constraints.always_compute,
    }
    return wanted <= set(computed) and max(gaps) <= (constraints.max_reuses or len(row))


def test_every_policy_goes_on_from_what_constraints_have_computed() -> None:
    assert fora_schedule(MANY, 4, SOME) == [e in (0, 1, 4, 6, 9, 11) for e in range(MANY)]
    (row,) = audiocache_schedule({"ff": [0.1] * MANY}, 0.35, False, SOME).values()
    assert row == [e in (0, 1, 4, 6, 9, 11) for e in range(MANY)]
    (row,) = smoothcache_schedule({"ff": [[0.0] * (MANY - k) for k in (1, 2, 3)]}, 0.1, MANY, SOME).values()
    assert row == [e in (0, 1, 4, 6, 9, 11) for e in range(MANY)]


def test_any_table_is_made_to_meet_them() -> None:
    generator = torch.Generator().manual_seed(0)
    for shared, cap in product((False, True), (None, 0, 1, 3)):
        constraints = Constraints(shared, cap, warmup=3, cooldown=2, always_compute=(5,))
        compute = torch.rand(MANY, 4, generator=generator) < 0.3
        compute[0] = True
        enforced = constraints.enforced(compute)
        assert (enforced | ~compute).all()  # nothing is taken away
        assert all(meets(column.tolist(), constraints) for column in enforced.T)
        assert not shared or (enforced == enforced[:, :1]).all()
    assert torch.equal(Constraints().enforced(compute), compute)


@pytest.fixture
def folder(denoiser: Any, generate: Any, tmp_path: Any) -> Any:
    recorder = CalibrationRecorder()
    with recorder.attach(denoiser):
        generate(denoiser, [recorder], num_steps=MANY)
    recorder.calibration().save(calibration_stem(tmp_path, "ddim", MANY))
    return tmp_path


POLICIES = {
    "audiocache": lambda folder, **options: AudioCache(folder, 0.5, **options),
    "smoothcache": lambda folder, **options: SmoothCache(folder, 0.5, **options),
    "budget": lambda folder, **options: Budget(folder, 1.3, **options),
    "fora": lambda folder, **options: Fora(4, **options),
}


@pytest.mark.parametrize("name", POLICIES)
def test_all_policies_take_all_constraints(name: str, folder: Any, denoiser: Any, generate: Any) -> None:
    cache = POLICIES[name](folder, shared=True, max_reuses=2, warmup=2, cooldown=1, always_compute=[6])
    with cache.attach(denoiser):
        generate(denoiser, [cache], num_steps=MANY)
    compute = cache.schedule.compute
    assert (compute == compute[:, :1]).all()
    assert meets(compute[:, 0].tolist(), SOME)
    assert not compute.all()
    assert cache.schedule.policy["always_compute"] == (6,)
    beyond = POLICIES[name](folder, always_compute=[MANY])
    with beyond.attach(denoiser), pytest.raises(ValueError, match="names evaluation 12, but this run has 12"):
        generate(denoiser, [beyond], num_steps=MANY)


@pytest.mark.parametrize("option", ["warmup", "cooldown", "max_reuses", "always_compute"])
def test_impossible_constraints_are_refused_by_name(option: str) -> None:
    with pytest.raises(ValueError, match=f"accel.{option}=-1: give a whole number"):
        Fora(2, **{option: [-1] if option == "always_compute" else -1})


@pytest.mark.parametrize("name", ["audiocache", "smoothcache", "budget", "fora"])
def test_their_options_are_in_every_config(name: str) -> None:
    overrides = ["accel.shared=true", "accel.max_reuses=3", "accel.always_compute=[2]", "accel.reuse=taylor2"]
    cache = instantiate(compose_command("sample", f"accel={name}", *overrides).accel)
    assert isinstance(cache, LayerCache)
    assert cache.constraints == Constraints(shared=True, max_reuses=3, always_compute=(2,))
    own = "accel.reuse={_target_: foley.accel.caching.reuse.Taylor, order: 3}"
    assert isinstance(instantiate(compose_command("sample", f"accel={name}", own).accel), LayerCache)


class Skipping:
    """The loop of a sampler that another accelerator spares whole evaluations."""

    def __init__(self, denoiser: Any, cache: LayerCache, num_evaluations: int) -> None:
        self.denoiser, self.cache = denoiser, cache
        timesteps = torch.linspace(999, 100, num_evaluations)
        self.run = RunContext("ddim", num_evaluations, timesteps, 1.0, 0.0, batch_size=1)

    def __call__(self, skipped: set[int]) -> list[bool]:
        """At which evaluations the layers run."""
        layer, ran = self.denoiser.blocks[0].feed_forward, []
        with self.cache.attach(self.denoiser):
            self.cache.on_run_start(self.run)
            for evaluation, timestep in enumerate(self.run.timesteps):
                context, before = StepContext(evaluation, timestep, self.run), layer.runs
                self.cache.on_evaluation_start(context)
                if evaluation not in skipped:
                    self.denoiser(torch.ones(1, 4, 3), timestep[None], torch.ones(1, 5, 8))
                self.cache.on_evaluation_end(context, torch.zeros(1))
                ran.append(layer.runs > before)
            self.cache.on_run_end()
        return ran


def test_a_layer_that_was_due_at_a_skipped_evaluation_is_due_at_the_next(denoiser: Any) -> None:
    cache = Fora(3)
    run = Skipping(denoiser, cache, 8)
    assert run(set()) == [True, False, False, True, False, False, True, False]
    # Evaluations 3 and 6 are due and skipped; the first one's computation comes two evaluations late.
    assert run({3, 4, 6}) == [True, False, False, False, False, True, False, True]
    assert cache.schedule.compute.any(dim=1).tolist() == [True, False, False, False, False, True, False, True]
    assert run(set()) == [True, False, False, True, False, False, True, False]  # of another run nothing stays
