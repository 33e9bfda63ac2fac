"""What stands in for a layer that is not computed."""

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from foley.accel.caching.fora import Fora
from foley.accel.caching.reuse import Hold, Taylor, make_reuse
from foley.diffusion.context import RunContext, StepContext


class Clock(nn.Module):
    """A layer whose output is a polynomial of the time, and nothing else."""

    cacheable_kind = "feed_forward"

    def __init__(self, degree: int = 1) -> None:
        super().__init__()
        self.degree = degree

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        return 3 * time**self.degree - 2 * time + 7


def outputs_of(cache: Fora, times: list[float], degree: int = 1, log_snr: list[float] | None = None) -> list[float]:
    """What the clock gives at each evaluation under the cache; the clock's time is that of the cache's axis."""
    denoiser = nn.Sequential(Clock(degree))
    snr = None if log_snr is None else torch.tensor(log_snr)
    run = RunContext("ddim", len(times), torch.tensor(times), 1.0, 0.0, 1, log_snr=snr)
    found = []
    with cache.attach(denoiser):
        cache.on_run_start(run)
        for evaluation, time in enumerate(times if log_snr is None else log_snr):
            context = StepContext(evaluation, run.timesteps[evaluation], run)
            cache.on_evaluation_start(context)
            found.append(denoiser(torch.tensor(time, dtype=torch.float64)).item())
            cache.on_evaluation_end(context, torch.zeros(1))
        cache.on_run_end()
    return found


def test_hold_returns_the_last_output() -> None:
    memory, output = Hold(), torch.ones(2)
    memory.store(3, output)
    assert memory.recall(5) is output


def test_taylor_is_exact_for_outputs_on_a_line() -> None:
    memory, start, slope = Taylor(), torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    for evaluation in (0, 4, 6):
        memory.store(evaluation, start + evaluation * slope)
    torch.testing.assert_close(memory.recall(9), start + 9 * slope)


def test_taylor_holds_until_it_knows_two_outputs() -> None:
    memory = Taylor()
    memory.store(0, torch.ones(2))
    assert torch.equal(memory.recall(2), torch.ones(2))


def test_an_unknown_reuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hold, taylor, taylor2, got 'guess'"):
        make_reuse("guess")


def test_a_cache_extrapolates_and_forgets_between_runs(denoiser, generate) -> None:
    hold, taylor = Fora(2), Fora(2, reuse="taylor")
    latents = []
    for cache in (hold, taylor, taylor):
        with cache.attach(denoiser):
            latents.append(generate(denoiser, [cache]))
    held, extrapolated, again = latents
    assert not torch.equal(held, extrapolated)
    assert torch.equal(extrapolated, again)


def test_extrapolation_comes_closer_on_a_smooth_denoiser(denoiser, generate) -> None:
    exact = generate(denoiser, num_steps=40)
    errors = []
    for reuse in ("hold", "taylor"):
        cache = Fora(2, reuse=reuse)
        with cache.attach(denoiser):
            errors.append((generate(denoiser, [cache], num_steps=40) - exact).norm())
    assert errors[1] < errors[0]


UNEVEN = [999.0, 900.0, 700.0, 610.0, 250.0, 130.0, 30.0]


@pytest.mark.parametrize(("reuse", "degree", "exact_from"), [("taylor", 1, 3), ("taylor2", 2, 5)])
def test_polynomials_of_the_time_are_reproduced_on_uneven_steps(reuse, degree, exact_from) -> None:
    found = outputs_of(Fora(2, reuse), UNEVEN, degree)
    wanted = [Clock(degree)(time) for time in UNEVEN]
    assert found[exact_from:] == pytest.approx(wanted[exact_from:])
    assert found[1] == wanted[0]  # one output so far: it is held


def test_the_axis_may_be_the_log_snr_whose_beginning_is_infinitely_far() -> None:
    log_snr = [-torch.inf, -4.0, -1.0, 0.5, 3.0, 3.5]
    found = outputs_of(Fora(1, "taylor", axis="log_snr"), UNEVEN[:6], log_snr=log_snr)
    assert found[1:] == [Clock()(place) for place in log_snr[1:]]
    found = outputs_of(Fora(3, "taylor", axis="log_snr", warmup=3), UNEVEN[:6], log_snr=log_snr)
    assert found[3:5] == pytest.approx([Clock()(place) for place in log_snr[3:5]])
    with pytest.raises(ValueError, match="timestep, log_snr, angle, got 'evaluation'"):
        Fora(2, axis="evaluation")


def test_of_two_evaluations_at_one_timestep_the_later_counts() -> None:
    """As Heun's solver makes them; the clock gives the same at both, so that the line is exact all the same."""
    heun = [999.0, 900.0, 900.0, 700.0, 700.0, 610.0, 610.0, 250.0]
    found = outputs_of(Fora(2, "taylor", warmup=4), heun)
    assert found == pytest.approx([Clock()(time) for time in heun])
    memory = Taylor()
    for place, value in ((2.0, 1.0), (2.0, 5.0), (1.0, 6.0)):
        memory.store(place, torch.tensor(value))
    assert memory.recall(0.0) == 7.0


def test_outputs_of_several_tensors_and_of_half_precision_are_extrapolated() -> None:
    memory = Taylor(order=2)
    for place in (0, 1, 3):
        memory.store(place, (torch.tensor([place**2], dtype=torch.bfloat16), None))
    value, nothing = memory.recall(4)
    assert (value.item(), value.dtype, nothing) == (16.0, torch.bfloat16, None)


class Twice(Hold):
    """Another reuse, which the library does not know."""

    def recall(self, place):
        return 2 * self.output


@pytest.mark.parametrize("partial_", [True, False])
def test_a_config_brings_a_reuse_of_its_own(partial_) -> None:
    config = OmegaConf.create({"_target_": f"{Twice.__module__}.Twice", "_partial_": partial_})
    cache = instantiate({"_target_": "foley.accel.caching.fora.Fora", "interval": 2, "reuse": config})
    clock = Clock()
    assert outputs_of(cache, UNEVEN)[:4] == [clock(999), 2 * clock(999), clock(700), 2 * clock(700)]
    assert cache.schedule.policy["reuse"] == "Twice"


def test_what_is_no_reuse_is_refused() -> None:
    with pytest.raises(ValueError, match="3: give a name, or an object"):
        make_reuse(3)
    assert make_reuse(partial(Taylor, 3))().order == 3
