"""Prediction reuse: exact where the prediction is a polynomial, and bit for bit nothing where all is computed."""

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composition_parts import build_denoiser, generate
from recorded_graphs import RecordedGraphs
from tiny_pipelines import stable_audio_dit
from torch import Tensor, nn

from foley.accel.attention.local_global import LocalGlobal
from foley.accel.caching.calibration import calibrated_caches
from foley.accel.caching.fora import Fora
from foley.accel.caching.prediction import History, PredictionReuse, Threshold
from foley.accel.caching.prediction_calibration import CovarianceRecorder
from foley.accel.caching.prediction_plans import Fitted, interval_plan, optimal_plan
from foley.accel.combined import Combined
from foley.accel.cost import CostMeter
from foley.core.hashing import hash_module
from foley.diffusion.consistency import ConsistencySolver
from foley.diffusion.context import RunContext, StepContext
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, KnownLatent
from foley.diffusion.process import PREDICTIONS, DiffusionProcess
from foley.diffusion.sampler import Start, generate_latents
from foley.diffusion.solver import SOLVERS, Solver
from foley.diffusion.windows import Windows

CHANNELS, FRAMES, WIDTH = 4, 10, 6


class PolynomialDenoiser(nn.Module):
    """Predicts a parabola in the timestep, whatever the noisy latent is; counts its calls."""

    latent_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, noisy: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        time = timestep.double()[:, None, None] / 1000
        slope = torch.linspace(-1, 1, noisy.shape[1], dtype=torch.float64)[:, None]
        return (1 - slope * time + 2 * time**2 + 0 * noisy).float()


class SmoothDenoiser(PolynomialDenoiser):
    """One that looks at the noisy latent and the text."""

    def forward(self, noisy: Tensor, timestep: Tensor, context: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        text = context.mean(dim=(1, 2))[:, None, None]
        return torch.tanh(0.3 * noisy + text) * torch.cos(timestep[:, None, None] / 700)


def _generate(denoiser: nn.Module, solver: str, accelerator: Any = None, num_steps: int = 12, **run: Any) -> Tensor:
    torch.manual_seed(0)
    text = Conditioning(torch.randn(2, 3, WIDTH), torch.ones(2, 3, dtype=torch.bool))
    empty = Conditioning(torch.zeros(1, 3, WIDTH), torch.ones(1, 3, dtype=torch.bool))
    process = DiffusionProcess("flow" if solver.endswith("_flow") else "v")
    guidance = ClassifierFreeGuidance(3.0)
    chosen = (guidance, Solver(solver, num_steps), accelerator)
    return generate_latents(denoiser, process, text, empty, [0, 1], FRAMES, *chosen, **run)


def test_a_polynomial_goes_through_uneven_nodes_exactly() -> None:
    for order in range(4):
        places = [-5.0, 1.2, 0.9, 0.31, 0.3, 0.1]
        history, values = History(places, order), torch.randn(order + 1, 2, 3, 4, dtype=torch.float64).float()

        def at(place: float, values: Tensor = values) -> Tensor:
            return sum(value * place**power for power, value in enumerate(values))  # type: ignore[return-value]

        for evaluation in range(5):  # the first falls out
            history.store(evaluation, at(places[evaluation]))
        torch.testing.assert_close(history.at(5), at(0.1), rtol=1e-4, atol=1e-4)


def test_equal_and_infinite_places_do_not_divide_by_zero() -> None:
    places = [-torch.inf, 0.0, 1.0, 1.0, 3.0]
    history = History(places, 2)
    for evaluation, value in enumerate((9.0, 1.0, 5.0, 2.0)):
        history.store(evaluation, torch.tensor([value]))
        assert history.at(evaluation).item() == value
    assert history.at(4).item() == 4.0  # the line through (0, 1) and (1, 2)
    first = History(places, 2)
    first.store(0, torch.tensor([9.0]))
    assert first.at(1).item() == 9.0


def test_fractional_intervals_compute_that_share() -> None:
    for interval in (1, 1.5, 2, 2.4, 3, 7):
        plan = interval_plan(100, interval, warmup=4)
        assert all(plan[:4])
        assert plan[-1]
        assert sum(plan) == 5 + 95 // interval
    assert all(interval_plan(9, 1))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("at", ["guided", "branch"])
def test_computing_always_is_bitwise_equal_to_no_acceleration(solver: str, at: str) -> None:
    denoiser = SmoothDenoiser()
    accelerated = _generate(denoiser, solver, PredictionReuse(1, at=at), num_steps=6)
    assert torch.equal(accelerated, _generate(denoiser, solver, num_steps=6))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("at", ["guided", "branch"])
def test_a_parabola_is_reproduced_by_every_solver(solver: str, at: str) -> None:
    denoiser = PolynomialDenoiser()
    plain, computed = _generate(denoiser, solver), denoiser.calls
    reuse = PredictionReuse(3, order=2, axis="timestep", quantity="prediction", at=at, warmup=5)
    torch.testing.assert_close(_generate(denoiser, solver, reuse), plain, rtol=1e-3, atol=1e-3)
    assert denoiser.calls - computed == sum(reuse.computed_evaluations) < computed
    assert "forward" not in vars(denoiser)


def test_both_places_are_the_same_without_a_rescale() -> None:
    denoiser = SmoothDenoiser()
    guided, branch = (_generate(denoiser, "ddim", PredictionReuse(2, at=at)) for at in ("guided", "branch"))
    torch.testing.assert_close(guided, branch, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantity", ["prediction", "clean"])
def test_windows_editing_and_a_later_beginning(quantity: str) -> None:
    denoiser = SmoothDenoiser()
    visible, hidden = torch.ones(1, CHANNELS, FRAMES), (torch.arange(FRAMES) < 5)[None]
    runs: list[dict[str, Any]] = [
        {"windows": Windows(FRAMES, 6, 2)},
        {"known": KnownLatent(visible, hidden)},
        {"start": Start(visible, 7)},
    ]
    for run in runs:
        for at in ("guided", "branch"):
            plain = _generate(denoiser, "ddim", **run)
            all_computed = _generate(denoiser, "ddim", PredictionReuse(1, quantity=quantity, at=at), **run)
            assert torch.equal(all_computed, plain)
            reuse = PredictionReuse(2, quantity=quantity, at=at)
            close = _generate(denoiser, "ddim", reuse, **run)
            assert 0 < (close - plain).norm() / plain.norm() < 0.05
            assert reuse.computed_evaluations.index(True) == (7 if "start" in run else 0)


def test_a_branch_that_begins_where_others_are_skipped_computes() -> None:
    denoiser = PolynomialDenoiser()
    for options in ({"interval": 3}, {"threshold": 1e9}):
        reuse, run = PredictionReuse(**options), RunContext("ddim", 6, torch.arange(900, 0, -150), 1.0, 0.0, 1)
        calls = []
        with reuse.attach(denoiser):
            reuse.on_run_start(run)
            for evaluation, timestep in enumerate(run.timesteps):
                for branch in ("cond", "uncond") if evaluation >= 4 else ("cond",):
                    before = denoiser.calls
                    reuse.on_evaluation_start(context := StepContext(evaluation, timestep, run, branch))
                    prediction = denoiser(torch.zeros(1, CHANNELS, FRAMES), timestep[None])
                    reuse.on_evaluation_end(context, prediction)
                    calls += [(evaluation, branch)] * (denoiser.calls - before)
        assert (4, "uncond") in calls
        assert (4, "cond") not in calls


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_clean_weights_are_the_process_own(prediction: str) -> None:
    process = DiffusionProcess(prediction, zero_terminal_snr=prediction == "v")
    timesteps = torch.tensor([999, 500, 20])
    noisy, predicted = torch.randn(2, 3, 2, 5)
    weights = process.clean_weights(process.snr(timesteps).double().log()).float()
    clean = weights[:, 0, None, None] * noisy + weights[:, 1, None, None] * predicted
    torch.testing.assert_close(clean, process.to_clean(noisy, predicted, timesteps), rtol=1e-3, atol=1e-3)


def test_fresh_noise_is_no_part_of_what_is_extrapolated() -> None:
    class Clean(PolynomialDenoiser):  # knows one clean latent
        def forward(self, noisy: Tensor, timestep: Tensor, **_: Any) -> Tensor:
            alpha, sigma = (level[:, None, None] for level in process.levels(timestep))
            return (alpha * noisy - 0.5) / sigma

    process = DiffusionProcess("v")
    for solver in ("ddpm", "dpmpp_2m_sde"):
        errors = []
        for quantity in ("auto", "prediction"):
            reuse = PredictionReuse(threshold=0, quantity=quantity)  # computes always, and measures
            _generate(Clean(), solver, reuse)
            errors.append(max(difference or 0 for difference in reuse.differences))
        assert errors[0] < 1e-3 < errors[1]


def test_recordings_hold_computed_evaluations_alone() -> None:
    denoiser, recorder, reuse = SmoothDenoiser(), RecordedGraphs(), PredictionReuse(2)
    plain = _generate(denoiser, "ddim", reuse)
    assert torch.equal(_generate(denoiser, "ddim", reuse, recorder=recorder), plain)
    assert (recorder.count, recorder.replays) == (1, 6)  # of seven computed evaluations
    branch = PredictionReuse(2, at="branch")
    plain = _generate(denoiser, "ddim", branch)
    assert torch.equal(_generate(denoiser, "ddim", branch, recorder=RecordedGraphs()), plain)


@pytest.mark.parametrize("at", ["guided", "branch"])
def test_skipped_evaluations_cost_nothing_and_caches_go_on_in_the_others(at: str) -> None:
    denoiser = build_denoiser()
    costs = {}
    for name, parts in {
        "all": [PredictionReuse(1, at=at)],
        "prediction": [PredictionReuse(2, at=at)],
        "both": [PredictionReuse(2, at=at), Fora(4)],
        "window": [LocalGlobal(window_frames=3, ratio=0.2)],
        "sparse": [PredictionReuse(2, at=at), LocalGlobal(window_frames=3, ratio=0.2)],
    }.items():
        meter = CostMeter(Combined(parts))
        generate(denoiser, meter)
        costs[name] = meter.describe()
        assert "forward" not in vars(denoiser)
    assert costs["all"]["mac_speedup"] == 1
    assert costs["prediction"]["mac_speedup"] == 1.5
    assert costs["prediction"]["computed_evaluations"] == [0, 1, 3, 5]
    assert costs["both"]["mac_speedup"] > 1.5
    assert costs["window"]["macs"] * 4 == costs["sparse"]["macs"] * 6


def test_a_student_is_refused() -> None:
    reuse, solver = PredictionReuse(), ConsistencySolver(num_steps=2)
    run = solver.run_context(solver.build(DiffusionProcess()), ClassifierFreeGuidance(1.0), 1)
    with pytest.raises(ValueError, match="student"):
        reuse.on_run_start(run)


@pytest.mark.parametrize(
    "options",
    [{"interval": 0.5}, {"order": -1}, {"axis": "index"}, {"quantity": "noise"}, {"at": "layer"}, {"warmup": 0}],
)
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PredictionReuse(**options)


def _best_by_trying(fitted: Fitted, count: int, warmup: int, max_reuses: int) -> tuple[float, list[int]]:
    """Every plan of `count` computed evaluations, and the error of each gap by the definition."""
    size, found = len(fitted.weights), []
    for chosen in combinations(range(warmup, size), count - warmup):
        computed, total = [*range(warmup), *chosen], 0.0
        for index, (last, end) in enumerate(pairwise([*computed, size])):
            if end - last > max_reuses + 1:
                total = float("inf")
            nodes, error = computed[: index + 1][-fitted.order - 1 :], np.zeros(size)
            for skipped in range(last + 1, end):
                # The least squares of a forecast by these nodes, a little held back.
                among = fitted.covariance[np.ix_(nodes, nodes)] + 1e-6 * np.eye(len(nodes))
                error[skipped] += fitted.weights[skipped]
                error[nodes] -= fitted.weights[skipped] * np.linalg.solve(among, fitted.covariance[nodes, skipped])
            total += float(error @ fitted.covariance @ error)
        found.append((total, computed))
    return min(found)


@pytest.mark.parametrize("order", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("warmup", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_optimal_plan_is_the_best_of_all(order: int, warmup: int) -> None:
    random = np.random.default_rng(order)
    factor = random.standard_normal((9, 9))
    fitted = Fitted(order, random.random(9), factor @ factor.T)
    for count, max_reuses in ((4, 8), (5, 3), (7, 2)):
        plan = optimal_plan(fitted, count, warmup, max_reuses)
        _, computed = _best_by_trying(fitted, count, warmup, max_reuses)
        assert [evaluation for evaluation, computes in enumerate(plan) if computes] == computed
    assert sum(optimal_plan(fitted, 3, 1, max_reuses=1)) == 5  # the cap wants more
    assert all(optimal_plan(fitted, 9))


def test_a_target_speedup_is_calibrated_kept_and_met(tmp_path: Path) -> None:
    denoiser, recorder = SmoothDenoiser(), CovarianceRecorder()
    reuse = PredictionReuse(target_speedup=2, calibration_dir=tmp_path, calibrate="auto")
    assert calibrated_caches(Combined([reuse])) == [reuse]
    assert not calibrated_caches(PredictionReuse())[0].calibrates
    with pytest.raises(FileNotFoundError, match="target_speedup"):
        _generate(denoiser, "ddim", reuse)
    plain = _generate(denoiser, "ddim", recorder)
    wanted = reuse.wanted(hash_module(denoiser), "ddim", 12, 3.0)
    assert reuse.keep(recorder.calibration(), wanted) == tmp_path / "prediction_ddim_12_w3.json"
    close = _generate(denoiser, "ddim", reuse)
    assert sum(reuse.computed_evaluations) == 6
    assert (close - plain).norm() / plain.norm() < 0.02
    with pytest.raises(FileNotFoundError, match="w3"):  # another model
        _generate(PolynomialDenoiser().requires_grad_(False), "heun", reuse)


def test_a_threshold_measures_on_the_way() -> None:
    denoiser = SmoothDenoiser()
    plain = _generate(denoiser, "ddim", num_steps=30)
    # Gaps grow by one at a time: 0, 1, 3, 6, 10, 15, 21, 28, and the last.
    for threshold, computed in ((0.0, 30), (1e9, 9)):
        reuse = PredictionReuse(threshold=threshold, max_reuses=7)
        latent = _generate(denoiser, "ddim", reuse, num_steps=30)
        assert sum(reuse.computed_evaluations) == computed
        known = [difference for difference in reuse.differences if difference is not None]
        assert len(known) == computed - 1
        if not threshold:
            assert torch.equal(latent, plain)
    reuse = PredictionReuse(threshold=1e-3)
    latent = _generate(denoiser, "ddim", reuse, num_steps=30)
    assert 5 < sum(reuse.computed_evaluations) < 25, reuse.computed_evaluations
    assert (latent - plain).norm() / plain.norm() < 0.02
    assert reuse.describe()["prediction_differences"]


def test_the_remainder_of_a_polynomial_foretells_the_error() -> None:
    guard, history = Threshold(1.0, [1.0] * 5), History([0.0, 1.0, 2.0, 3.0, 4.0], 1)
    # x^2 beyond its line: the remainder is the product of distances, exactly.
    for evaluation in (0, 1):
        history.store(evaluation, torch.tensor([float(evaluation**2)]))
    guard.measure(2, history.at(2), torch.tensor([4.0]), history.remainder(2))
    assert guard.differences[2] == pytest.approx(2 / 4)
    history.store(2, torch.tensor([4.0]))
    assert guard.lets_skip(3, history.remainder(3))  # again half of it
    assert not guard.lets_skip(4, history.remainder(4))  # 3 * 2 / 2 times that, in sum 2


@pytest.mark.parametrize("return_dict", [True, False])
def test_models_of_diffusers_give_what_they_give(return_dict: bool) -> None:
    model, reuse = stable_audio_dit(), PredictionReuse(2)
    shapes = {"hidden_states": (1, 4, 8), "encoder_hidden_states": (1, 3, 16), "global_hidden_states": (1, 1, 32)}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()} | {"timestep": torch.tensor([0.5])}
    run, outputs = RunContext("DDIMScheduler", 4, torch.tensor([900, 600, 300, 0]), 1.0, 0.0, 1), []
    with torch.no_grad(), reuse.attach(model):
        reuse.on_run_start(run)
        for evaluation, timestep in enumerate(run.timesteps):
            context = StepContext(evaluation, timestep, run)
            reuse.on_evaluation_start(context)
            outputs.append(model(**inputs, return_dict=return_dict))
            reuse.on_evaluation_end(context, outputs[-1][0])
        reuse.on_run_end()
    assert reuse.computed_evaluations == [True, True, False, True]
    assert len({type(output) for output in outputs}) == 1
    for output in outputs:
        torch.testing.assert_close(output[0], outputs[0][0])
