"""Change curves: their definition, their average over prompts and branches, and their way to disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foley.accel.caching.audiocache import audiocache_schedule
from foley.accel.caching.calibration import Calibration, CalibrationRecorder, relative_change
from foley.accel.caching.plots import plot_calibration, plot_schedule
from foley.accel.caching.schedule import CacheSchedule, SignatureMismatchError

LAYER = "blocks.1.feed_forward"


def _record(denoiser: Any, generate: Any, *runs: dict[str, Any]) -> Calibration:
    recorder = CalibrationRecorder()
    with recorder.attach(denoiser):
        for run in runs:
            generate(denoiser, [recorder], **run)
    return recorder.calibration()


def test_relative_change_is_l1_over_the_current_output_per_item() -> None:
    current = torch.tensor([[[1.0, -1.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    previous = torch.tensor([[[0.0, -1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert relative_change(current, previous).tolist() == [0.75, 0.0]


def test_of_a_whole_batch_there_is_one_ratio_of_its_norms() -> None:
    current = torch.tensor([[[1.0, -1.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]])
    previous = torch.tensor([[[0.0, -1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 4.0]]])
    assert relative_change(current, previous, whole_batch=True).tolist() == [3 / 8, 3 / 8]
    assert relative_change(current, previous).mean() == pytest.approx(3 / 4 / 2)  # a quiet item counts as a loud one
    assert torch.equal(relative_change(current[:1], previous[:1], whole_batch=True), torch.tensor([0.75]))


def test_the_recorder_as_published_has_one_ratio_for_the_batch_and_both_branches(denoiser: Any, generate: Any) -> None:
    outputs: list[torch.Tensor] = []
    recorder = CalibrationRecorder(whole_batch=True)
    hook = denoiser.get_submodule(LAYER).register_forward_hook(lambda module, args, output: outputs.append(output))
    with recorder.attach(denoiser):
        generate(denoiser, [recorder], seeds=(0, 1, 2))
    hook.remove()
    calibration = recorder.calibration()
    curve = calibration.changes()[LAYER]
    for evaluation in range(1, 6):
        now, before = outputs[evaluation], outputs[evaluation - 1]  # [2 branches * 3 items, N, D]
        assert curve[evaluation] == pytest.approx(((now - before).norm(p=1) / now.norm(p=1)).item(), rel=1e-5)
    assert calibration.num_prompts == 3
    assert calibration.std.abs().max() < 1e-6  # within a batch nothing differs
    assert curve != _record(denoiser, generate, {"seeds": (0, 1, 2)}).changes()[LAYER]


def test_recording_changes_nothing_and_matches_outputs_seen_from_outside(denoiser: Any, generate: Any) -> None:
    outputs: list[torch.Tensor] = []
    hook = denoiser.get_submodule(LAYER).register_forward_hook(lambda module, args, output: outputs.append(output))
    plain = generate(denoiser)
    hook.remove()
    recorder = CalibrationRecorder()
    with recorder.attach(denoiser):
        assert torch.equal(generate(denoiser, [recorder]), plain)
    calibration = recorder.calibration()
    row = calibration.layer_names.index(LAYER)
    for distance in (1, 2, 3):
        for evaluation in range(6):
            expected = torch.zeros(2)
            if evaluation >= distance:
                change = relative_change(outputs[evaluation], outputs[evaluation - distance])
                expected = change.view(2, 2).mean(dim=0)  # the two guidance branches of each prompt
            torch.testing.assert_close(calibration.mean[row, distance - 1, evaluation], expected.mean())
            torch.testing.assert_close(calibration.std[row, distance - 1, evaluation], expected.std(correction=0))


def test_batching_of_prompts_does_not_matter(denoiser: Any, generate: Any) -> None:
    together = _record(denoiser, generate, {"seeds": (0, 1, 2)})
    apart = _record(denoiser, generate, {"seeds": (0, 1)}, {"seeds": (2,)})
    torch.testing.assert_close(together.mean, apart.mean)
    torch.testing.assert_close(together.std, apart.std, atol=1e-6, rtol=1e-4)
    assert together.num_prompts == apart.num_prompts == 3


def test_heun_is_indexed_by_evaluation(denoiser: Any, generate: Any) -> None:
    calibration = _record(denoiser, generate, {"solver": "heun"})
    assert calibration.signature.num_steps == 6
    assert calibration.mean.shape == (6, 3, 11)
    assert (calibration.mean[:, 0, 1:] > 0).all()


@pytest.mark.parametrize(("solver", "prediction"), [("dpmpp_2m_sde", "v"), ("euler_flow", "flow")])
def test_solvers_that_add_noise_and_flows_are_calibrated(
    denoiser: Any, generate: Any, solver: str, prediction: str
) -> None:
    settings = {"solver": solver, "prediction": prediction}
    calibration = _record(denoiser, generate, settings)
    assert torch.equal(calibration.mean, _record(denoiser, generate, settings).mean)
    assert calibration.signature.solver == solver
    assert calibration.mean.shape == (6, 3, 6)
    assert (calibration.mean[:, 0, 1:] > 0).all()
    assert list(calibration.timesteps) == sorted(calibration.timesteps, reverse=True)
    coarse = calibration.at(3, calibration.timesteps[::2]).changes()
    assert coarse[LAYER][1] == pytest.approx(sum(calibration.changes()[LAYER][1:3]), abs=1e-5)


def test_errors_and_changes_agree_on_their_indices(denoiser: Any, generate: Any) -> None:
    calibration = _record(denoiser, generate, {})
    errors, changes = calibration.errors(3)[LAYER], calibration.changes()[LAYER]
    assert [len(curve) for curve in errors] == [5, 4, 3]
    assert errors[0] == changes[1:]
    with pytest.raises(ValueError, match="got 4"):
        calibration.errors(4)


def test_a_broken_run_is_left_out_and_nothing_stays_patched(denoiser: Any, generate: Any) -> None:
    good = _record(denoiser, generate, {})
    recorder, layer = CalibrationRecorder(), denoiser.get_submodule(LAYER)
    with recorder.attach(denoiser):
        layer.broken_at = layer.runs + 3
        with pytest.raises(ArithmeticError):
            generate(denoiser, [recorder])
        generate(denoiser, [recorder])
    assert not any("forward" in vars(module) for module in denoiser.modules())
    assert torch.equal(recorder.calibration().mean, good.mean)


def test_runs_of_two_kinds_are_not_mixed_and_none_is_an_error(denoiser: Any, generate: Any) -> None:
    with pytest.raises(RuntimeError, match="nothing to average"):
        CalibrationRecorder().calibration()
    with pytest.raises(SignatureMismatchError, match="num_steps 6, but this run has 4"):
        _record(denoiser, generate, {}, {"num_steps": 4})


def test_calibrations_survive_the_disk_and_can_be_drawn(denoiser: Any, generate: Any, tmp_path: Path) -> None:
    calibration = _record(denoiser, generate, {})
    calibration.save(tmp_path / "ddim_6")
    loaded = Calibration.load(tmp_path / "ddim_6")
    assert torch.equal(loaded.mean, calibration.mean)
    assert torch.equal(loaded.std, calibration.std)
    assert (loaded.kinds, loaded.signature) == (calibration.kinds, calibration.signature)
    assert loaded.num_prompts == 2
    assert (loaded.macs, loaded.timesteps) == (calibration.macs, calibration.timesteps)
    rows = audiocache_schedule(loaded.changes(), 0.2)
    schedule = CacheSchedule.from_rows(
        rows, loaded.kinds, loaded.signature, {"name": "audiocache", "threshold": 0.2, "reuse": "hold"}
    )
    plot_calibration(loaded, tmp_path / "curves.png")
    plot_schedule(schedule, tmp_path / "schedule.png")
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert (tmp_path / "schedule.png").stat().st_size > 0


def test_a_calibration_of_an_earlier_version_is_refused(denoiser: Any, generate: Any, tmp_path: Path) -> None:
    _record(denoiser, generate, {}).save(tmp_path / "ddim_6")
    file = tmp_path / "ddim_6.json"
    info = json.loads(file.read_text())
    del info["macs"]
    file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="earlier version; make it again"):
        Calibration.load(tmp_path / "ddim_6")


def test_a_fine_calibration_serves_a_coarser_run(denoiser: Any, generate: Any) -> None:
    fine = _record(denoiser, generate, {"num_steps": 12})
    torch.testing.assert_close(fine.at(12, fine.timesteps).mean[:, 0, 1:], fine.mean[:, 0, 1:], atol=1e-6, rtol=0)
    coarse = fine.at(6, fine.timesteps[::2])
    assert (coarse.signature.num_steps, coarse.signature.num_evaluations) == (6, 6)
    for layer, curve in fine.changes().items():
        pairs = [first + second for first, second in zip(curve[1::2], curve[2::2], strict=False)]
        assert coarse.changes()[layer][1:] == pytest.approx(pairs, abs=1e-6)
        three = [sum(pairs[step : step + 3]) for step in range(3)]
        assert coarse.errors(3)[layer][2] == pytest.approx(three, abs=1e-6)


def test_a_second_order_solver_is_not_read_at_other_steps(denoiser: Any, generate: Any) -> None:
    heun = _record(denoiser, generate, {"solver": "heun"})
    with pytest.raises(ValueError, match="do not fall steadily"):
        heun.at(2, [900.0, 500.0])
