"""What stands in for a layer that is not computed."""

import pytest
import torch

from foley.accel.caching.fora import Fora
from foley.accel.caching.layer_cache import Hold, Taylor, reuse_by_name


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
    with pytest.raises(ValueError, match=r"hold, taylor, got 'guess'"):
        reuse_by_name("guess")


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
