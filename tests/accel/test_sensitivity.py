"""What reusing a layer does to the final latent, against runs in which it is reused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.budget import Budget, sensitivity_intervals, summed_error
from foley.accel.caching.calibration import CalibrationRecorder
from foley.accel.caching.curves import Calibration
from foley.accel.caching.layer_cache import LayerCache
from foley.accel.caching.schedule import CacheSchedule, RunSignature
from foley.accel.caching.sensitivity import SensitivityRecorder
from foley.accel.caching.smoothcache import SmoothCache
from foley.accel.layers import find_cacheable_layers
from foley.core.hashing import hash_module

STEPS = 8


def reused(denoiser: Any, generate: Any, solver: str, layers: list[int], evaluation: int, num: int) -> torch.Tensor:
    """The latent of a run in which these layers are reused at one evaluation."""
    found = find_cacheable_layers(denoiser)
    compute = torch.ones(num, len(found), dtype=torch.bool)
    compute[evaluation, layers] = False
    names, kinds = tuple(layer.name for layer in found), tuple(layer.kind for layer in found)
    signature = RunSignature(hash_module(denoiser), solver, STEPS, num, 3.0)
    cache = LayerCache(CacheSchedule(compute, names, kinds, signature))
    with cache.attach(denoiser):
        return generate(denoiser, [cache], solver=solver, num_steps=STEPS, seeds=(0,))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
def test_predictions_are_what_one_reuse_does(denoiser: Any, generate: Any, solver: str) -> None:
    recorder, seeds = SensitivityRecorder(max_distance=2, num_probes=1), (0,) * 128  # as many random vectors
    with recorder.attach(denoiser):
        latent = generate(denoiser, [recorder], solver=solver, num_steps=STEPS, seeds=seeds)
    recorder.on_latent(latent)
    assert not any("forward" in vars(module) for module in denoiser.modules())
    assert torch.equal(latent, generate(denoiser, solver=solver, num_steps=STEPS, seeds=seeds))
    exact = latent[:1].detach()
    table = recorder.sensitivity()
    num = table.shape[-1]
    for layers, evaluation in (([0], 3), ([2], 5), ([4], num - 1), (list(range(6)), 4)):
        moved = reused(denoiser, generate, solver, layers, evaluation, num) - exact
        row = layers[0] if len(layers) == 1 else -1
        # First order, and 128 random vectors, which leave a relative deviation of 6 %.
        assert table[row, 0, evaluation] == pytest.approx((moved.norm() / exact.norm()).item(), rel=0.3)


def test_it_wants_the_latent_of_its_run(denoiser: Any, generate: Any) -> None:
    recorder = SensitivityRecorder()
    with pytest.raises(RuntimeError, match="nothing to average"):
        recorder.sensitivity()
    with recorder.attach(denoiser):
        generate(denoiser, [recorder])
    with pytest.raises(RuntimeError, match="latent of a whole run"):
        recorder.on_latent(torch.zeros(1, 4, 3))
    with pytest.raises(RuntimeError, match="no denoiser"):
        SensitivityRecorder().on_run_start(None)


def calibration_of(denoiser: Any, generate: Any, num_steps: int = STEPS) -> Calibration:
    changes, looks_back = CalibrationRecorder(), SensitivityRecorder()
    for recorder in (changes, looks_back):
        with recorder.attach(denoiser):
            latent = generate(denoiser, [recorder], num_steps=num_steps, seeds=(0, 1, 2))
    looks_back.on_latent(latent)
    return replace(changes.calibration(), sensitivity=looks_back.sensitivity())


def test_a_budget_by_sensitivity_is_kept_and_predicts_less_error(denoiser: Any, generate: Any, tmp_path: Path) -> None:
    calibration = calibration_of(denoiser, generate)
    used = calibration.by("sensitivity")
    tables = dict(zip(used.layer_names, used.mean.numpy(), strict=True))
    intervals = {layer: sensitivity_intervals(table) for layer, table in tables.items()}
    errors, macs = {}, calibration.macs
    for objective in ("change", "sensitivity"):
        cache = Budget(tmp_path, 1.3, objective=objective)
        cache.adopt(calibration)
        with cache.attach(denoiser):
            generate(denoiser, [cache], num_steps=STEPS)
        rows = dict(zip(cache.schedule.layer_names, cache.schedule.compute.T.tolist(), strict=True))
        saved = sum(macs.layers[layer] * (STEPS - sum(row)) for layer, row in rows.items())
        assert STEPS * macs.total / (STEPS * macs.total - saved) >= 1.3
        errors[objective] = summed_error(intervals, rows)
    assert errors["sensitivity"] < errors["change"]


@pytest.mark.parametrize("shared", [False, True])
def test_thresholds_are_of_the_latents_error_then(denoiser: Any, generate: Any, tmp_path: Path, shared: bool) -> None:
    calibration = calibration_of(denoiser, generate)
    options = {"objective": "sensitivity", "shared": shared}
    sizes = []
    for scale in (0.5, 2.0):
        typical = float(calibration.sensitivity[:, 0, 1:].median())
        caches = AudioCache(tmp_path, scale * typical, **options), SmoothCache(tmp_path, scale * typical, **options)
        for cache in caches:
            cache.adopt(calibration)
            with cache.attach(denoiser):
                generate(denoiser, [cache], num_steps=STEPS)
            sizes.append(cache.schedule.computed_fraction)
            assert cache.schedule.policy["objective"] == "sensitivity"
    assert sizes[2] <= sizes[0]
    assert sizes[3] <= sizes[1]
    assert min(sizes) < 1


def test_errors_of_one_output_point_the_same_way_and_others_add_up_in_squares() -> None:
    table = np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 4.0, 5.0]])  # [distances, evaluations]
    intervals = sensitivity_intervals(table, coherent=False)
    assert intervals[0].tolist() == [0, 0, 1, 1 + 4**2, 1 + 4**2 + (1.5 * 5) ** 2]
    assert intervals[2].tolist() == [0, 0, 0, 0, 3**2]
    coherent = sensitivity_intervals(table)
    assert coherent[0].tolist() == [0, 0, 1, (1 + 4) ** 2, (1 + 4 + 1.5 * 5) ** 2]


def test_it_is_stored_and_merged_with_the_calibration(denoiser: Any, generate: Any, tmp_path: Path) -> None:
    calibration = calibration_of(denoiser, generate)
    calibration.save(tmp_path / "c")
    assert torch.equal(Calibration.load(tmp_path / "c").sensitivity, calibration.sensitivity)
    twice = replace(calibration, sensitivity=7 * calibration.sensitivity)
    torch.testing.assert_close(Calibration.merged([calibration, twice]).sensitivity, 5 * calibration.sensitivity)
    without = replace(calibration, sensitivity=None)
    assert Calibration.merged([calibration, without]).sensitivity is None
    for lacking in (without, calibration.at(4, calibration.timesteps[::2])):
        with pytest.raises(ValueError, match=r"accel\.objective=sensitivity: .* sensitivity=true"):
            lacking.by("sensitivity")
    wanted = AudioCache(tmp_path, objective="sensitivity").wanted(calibration.signature.model_hash, "ddim", STEPS, 3.0)
    assert wanted.served_by(calibration)
    assert not wanted.served_by(without)
    with pytest.raises(ValueError, match="change, sensitivity, got 'both'"):
        AudioCache(tmp_path, objective="both")
