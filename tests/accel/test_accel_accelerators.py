"""AudioCache, SmoothCache and FORA as configs name them, from calibration to generation; and what they cost."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foley.accel.caching.audiocache import AudioCache, audiocache_schedule
from foley.accel.caching.budget import Budget
from foley.accel.caching.calibration import Calibration, CalibrationRecorder, calibration_directory, calibration_stem
from foley.accel.caching.fora import Fora
from foley.accel.caching.schedule import SignatureMismatchError
from foley.accel.caching.smoothcache import SmoothCache
from foley.accel.combined import NoAcceleration
from foley.accel.cost import EvaluationMacs, count_evaluation_macs, run_cost

CHANNELS, WIDTH, TOKENS = 4, 8, 3


@pytest.fixture
def calibration_dir(denoiser: Any, generate: Any, tmp_path: Path) -> Path:
    recorder = CalibrationRecorder()
    with recorder.attach(denoiser):
        generate(denoiser, [recorder])
    recorder.calibration().save(calibration_stem(tmp_path, "ddim", 6))
    return tmp_path


def _accelerated(accelerator: Any, denoiser: Any, generate: Any, **run: Any) -> torch.Tensor:
    with accelerator.attach(denoiser):
        latent: torch.Tensor = generate(denoiser, [accelerator], **run)
    return latent


def test_neutral_settings_are_bitwise_equal_to_no_acceleration(
    denoiser: Any, generate: Any, calibration_dir: Path
) -> None:
    plain = generate(denoiser)
    for accelerator in (AudioCache(calibration_dir, 0.0), SmoothCache(calibration_dir, 0.0), Fora(1), NoAcceleration()):
        assert torch.equal(_accelerated(accelerator, denoiser, generate), plain)


def test_larger_thresholds_compute_less(denoiser: Any, generate: Any, calibration_dir: Path) -> None:
    for make in (lambda value: AudioCache(calibration_dir, value), lambda value: SmoothCache(calibration_dir, value)):
        fractions = []
        for value in (0.0, 0.3, 1e9):
            accelerator = make(value)
            _accelerated(accelerator, denoiser, generate)
            fractions.append(accelerator.schedule.computed_fraction)
        assert fractions[0] == 1.0 > fractions[-1]
        assert fractions == sorted(fractions, reverse=True)


@pytest.mark.parametrize("include_refresh", [True, False])
def test_the_accelerator_sums_as_it_is_told(
    denoiser: Any, generate: Any, calibration_dir: Path, include_refresh: bool
) -> None:
    accelerator = AudioCache(calibration_dir, 0.3, include_refresh=include_refresh)
    _accelerated(accelerator, denoiser, generate)
    schedule, changes = accelerator.schedule, Calibration.load(calibration_stem(calibration_dir, "ddim", 6)).changes()
    assert schedule is not None
    assert schedule.policy["include_refresh"] == include_refresh
    rows = dict(zip(schedule.layer_names, schedule.compute.T.tolist(), strict=True))
    assert rows == audiocache_schedule(changes, 0.3, include_refresh)


def test_initial_noise_per_item_ignores_batch_and_accelerator(
    denoiser: Any, generate: Any, calibration_dir: Path
) -> None:
    accelerator = AudioCache(calibration_dir, 0.3)
    batch = _accelerated(accelerator, denoiser, generate, seeds=(0, 1, 2, 3))
    alone = _accelerated(accelerator, denoiser, generate, seeds=(2,))
    torch.testing.assert_close(alone, batch[2:3])


def test_fora_follows_the_evaluations_of_heun(denoiser: Any, generate: Any) -> None:
    fora = Fora(2)
    _accelerated(fora, denoiser, generate, solver="heun")
    assert fora.schedule is not None
    assert fora.schedule.compute[:, 0].tolist() == [True, False] * 5 + [True]


def test_a_missing_calibration_names_the_command(denoiser: Any, generate: Any, calibration_dir: Path) -> None:
    command = r"scripts/calibrate.py system=SYSTEM solver=euler prompts=FILE steps=6 guidance_scale=3 output_dir="
    with pytest.raises(FileNotFoundError, match=command):
        _accelerated(AudioCache(calibration_dir), denoiser, generate, solver="euler")


def test_the_calibration_of_another_model_is_refused(denoiser: Any, generate: Any, calibration_dir: Path) -> None:
    with torch.no_grad():
        denoiser.head.weight.mul_(2)
    with pytest.raises(SignatureMismatchError, match="model_hash"):
        _accelerated(AudioCache(calibration_dir), denoiser, generate)


def test_calibrations_lie_inside_a_system_directory_or_beside_a_file(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    assert calibration_directory(tmp_path) == calibration_directory(tmp_path / "last.ckpt") == tmp_path / "calibration"


@pytest.mark.parametrize(
    "make",
    [
        lambda *args, **options: AudioCache(*args, 9.0, **options),
        lambda *args, **options: SmoothCache(*args, 9.0, **options),
        lambda *args, **options: Budget(*args, 1.2, **options),
    ],
    ids=["audiocache", "smoothcache", "budget"],
)
def test_a_fine_calibration_serves_fewer_steps(make: Any, denoiser: Any, generate: Any, calibration_dir: Path) -> None:
    served = make(calibration_dir, calibrated_steps=6)
    assert not torch.equal(_accelerated(served, denoiser, generate, num_steps=3), generate(denoiser, num_steps=3))
    assert served.schedule.compute.shape == (3, 6)
    assert served.schedule.signature.num_steps == 3
    latents = [_accelerated(make(calibration_dir, calibrated_steps=steps), denoiser, generate) for steps in (6, None)]
    assert torch.equal(*latents)
    with torch.no_grad():
        denoiser.head.weight.mul_(2)
    with pytest.raises(SignatureMismatchError, match="model_hash"):
        _accelerated(make(calibration_dir, calibrated_steps=6), denoiser, generate, num_steps=3)


def test_macs_of_an_evaluation_are_those_of_its_matrix_products(denoiser: Any) -> None:
    noisy, context = torch.randn(2, CHANNELS, TOKENS), torch.randn(2, 5, WIDTH)
    macs = count_evaluation_macs(denoiser, lambda: denoiser(noisy, torch.ones(2), context))
    rows = 2 * TOKENS
    assert set(macs.layers.values()) == {rows * WIDTH * WIDTH}
    assert macs.total == 2 * rows * CHANNELS * WIDTH + 6 * rows * WIDTH * WIDTH


def test_the_cost_of_a_run_follows_its_schedule(denoiser: Any, generate: Any) -> None:
    fora = Fora(3)
    _accelerated(fora, denoiser, generate)
    assert fora.schedule is not None
    macs = EvaluationMacs(total=100, layers=dict.fromkeys(fora.schedule.layer_names, 15))
    cost = run_cost(fora.schedule, macs)
    assert cost.macs_uncached == 600
    assert cost.macs_cached == 600 - 4 * 6 * 15
    assert cost.speedup == 2.5
