"""What reusing a layer does to the final latent, against runs in which it is reused."""

from typing import Any

import pytest
import torch

from foley.accel.caching.layer_cache import LayerCache
from foley.accel.caching.schedule import CacheSchedule, RunSignature
from foley.accel.caching.sensitivity import SensitivityRecorder
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
