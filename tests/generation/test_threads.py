"""Threads that share a system: each clip is the one that it would be alone, to the bit."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
import torch
from small_system import CONFIGS
from stirring_parts import stir

from foley.accel.caching.fora import Fora
from foley.accel.layers import find_cacheable_layers
from foley.core.locks import sole_user
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system

SETTINGS = {"num_steps": 6, "duration_seconds": 0.5}


@pytest.fixture(scope="module")
def generator() -> TextToAudio:
    torch.manual_seed(0)
    system = build_system(CONFIGS)
    stir(system.modules["denoiser"])  # by the weights of the start a reused layer is not heard
    return TextToAudio(system)


def requests() -> list[tuple[str, int, int | None]]:
    """Prompt, seed and caching interval: cached and uncached requests by turns."""
    return [(prompt, seed, None if seed % 2 else 3) for seed in range(4) for prompt in ("rain", "a dog barks")]


def generate(generator: TextToAudio, request: tuple[str, int, int | None]) -> torch.Tensor:
    prompt, seed, interval = request
    accelerator = None if interval is None else Fora(interval)
    return generator.generate([prompt], seeds=[seed], accelerator=accelerator, **SETTINGS).audio


def test_two_threads_give_what_one_gives_cached_and_uncached(generator):
    alone = [generate(generator, request) for request in requests()]
    assert not torch.equal(alone[0], generate(generator, (*requests()[0][:2], None)))  # the cache is heard
    barrier = Barrier(2)

    def thread(rows: list[int]) -> list[torch.Tensor]:
        barrier.wait()
        return [generate(generator, requests()[row]) for row in rows]

    # One thread begins with what is cached, the other with what is not.
    shares = [list(range(8)), list(reversed(range(8)))]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(thread, shares))
    for share, clips in zip(shares, found, strict=True):
        for row, clip in zip(share, clips, strict=True):
            assert torch.equal(clip, alone[row]), requests()[row]
    assert not any("forward" in vars(layer.module) for layer in find_cacheable_layers(generator.denoiser))


def test_a_model_is_free_again_after_an_error(generator):
    with pytest.raises(ValueError, match="num_steps"), sole_user(generator.denoiser):
        raise ValueError("num_steps")
    generated = []
    other = Thread(target=lambda: generated.append(generate(generator, ("rain", 0, None))))
    other.start()
    other.join(timeout=60)
    assert len(generated) == 1


def test_one_accelerator_is_not_attached_to_two_models(generator):
    accelerator, other = Fora(2), TextToAudio(build_system(CONFIGS))
    with (
        accelerator.attach(generator.denoiser),
        pytest.raises(RuntimeError, match="attached to another denoiser; give each of them its own"),
        accelerator.attach(other.denoiser),
    ):
        pass
