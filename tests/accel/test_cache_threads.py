"""Threads and caches: what comes out is right, or an error says why not; never another clip's layers without a word."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import torch

from foley.accel.caching.calibration import CalibrationRecorder
from foley.accel.caching.fora import Fora
from foley.accel.layers import find_cacheable_layers
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver

ROUNDS = 12


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """What each task returned in a thread of its own, or the error that it raised; they begin at the same time."""
    barrier = Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return task()
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(run, tasks))


def is_right(found: Any, wanted: torch.Tensor) -> bool:
    """The clip that it would be alone, or an error that says what to do."""
    if isinstance(found, RuntimeError):
        assert any(
            words in str(found) for words in ("another thread", "replaced already", "another denoiser", "callback")
        )
        return True
    return torch.equal(found, wanted)


def latents(denoiser: Any, accelerator: Any, seed: int) -> torch.Tensor:
    rows = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed))
    text = Conditioning(rows, torch.ones(1, 5, dtype=torch.bool))
    guidance, solver = ClassifierFreeGuidance(3.0), Solver("ddim", 6)
    return generate_latents(denoiser, DiffusionProcess("v"), text, text, [seed], 3, guidance, solver, accelerator)


@pytest.fixture
def toy(denoiser: Any) -> Any:
    denoiser.latent_channels = 4
    return denoiser


def test_generations_of_one_model_take_turns(toy: Any) -> None:
    """One cache for both threads, a cache each, or one cached and one not."""
    shared = Fora(3)
    alone = {
        (seed, cached): latents(toy, Fora(3) if cached else None, seed) for seed in (0, 1) for cached in (True, False)
    }
    for one, two in (
        (lambda: shared, lambda: shared),
        (lambda: Fora(3), lambda: Fora(3)),
        (lambda: Fora(3), lambda: None),
    ):
        for _ in range(ROUNDS):
            first, second = one(), two()
            found = together(lambda c=first: latents(toy, c, 0), lambda c=second: latents(toy, c, 1))
            assert torch.equal(found[0], alone[0, True])
            assert torch.equal(found[1], alone[1, second is not None])


def test_threads_that_attach_by_themselves_are_right_or_refused(toy: Any, generate: Any) -> None:
    def by_hand(make: Callable[[], Any]) -> torch.Tensor:
        cache = make()
        with cache.attach(toy):
            return generate(toy, [cache])

    wanted = by_hand(lambda: Fora(3)), by_hand(CalibrationRecorder), generate(toy)
    for _ in range(ROUNDS):
        tasks = lambda: by_hand(lambda: Fora(3)), lambda: by_hand(CalibrationRecorder), lambda: generate(toy)
        found = together(*tasks)
        assert all(is_right(*pair) for pair in zip(found, wanted, strict=True)), found
    assert not any("forward" in vars(layer.module) for layer in find_cacheable_layers(toy))
    assert torch.equal(by_hand(lambda: Fora(3)), wanted[0])


def test_one_cache_for_the_threads_of_two_models_is_right_or_refused(toy: Any) -> None:
    other = type(toy)().eval()
    other.latent_channels = 4
    wanted, cache = (latents(toy, Fora(3), 0), latents(other, Fora(3), 0)), Fora(3)
    for _ in range(ROUNDS):
        found = together(lambda: latents(toy, cache, 0), lambda: latents(other, cache, 0))
        assert all(is_right(*pair) for pair in zip(found, wanted, strict=True)), found
    assert torch.equal(latents(other, cache, 0), wanted[1])


@pytest.mark.parametrize("make", [lambda: Fora(3), CalibrationRecorder])
def test_a_thread_that_comes_into_a_run_is_refused_and_the_run_goes_on(make: Any, toy: Any, generate: Any) -> None:
    alone, cache, errors = generate(toy), make(), []
    if isinstance(cache, Fora):
        with cache.attach(toy):
            alone = generate(toy, [cache])

    class Intruder:
        """At one evaluation of the run another thread calls the denoiser, and begins a run with the same cache."""

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

        def on_evaluation_start(self, context: Any) -> None:
            if context.evaluation == 4:
                for call in (lambda: generate(toy, [cache]), lambda: generate(toy)):
                    other = Thread(target=lambda call=call: errors.extend(together(call)))
                    other.start()
                    other.join()

    with cache.attach(toy):
        latent = generate(toy, [cache, Intruder()])
    assert torch.equal(latent, alone)
    assert len(errors) == 2
    assert all("another thread is generating" in str(error) for error in errors)


def test_a_run_may_go_on_in_another_thread_than_it_was_attached_in(toy: Any, generate: Any) -> None:
    cache, found, done = Fora(3), [], Event()
    with cache.attach(toy):
        wanted = generate(toy, [cache])
        other = Thread(target=lambda: (found.append(generate(toy, [cache])), done.set()))
        other.start()
        other.join()
    assert done.is_set()
    assert torch.equal(found[0], wanted)
