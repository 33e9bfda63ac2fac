"""Caching on the real denoiser: every variant is bitwise unchanged when all is computed, and restored after."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.calibration import CalibrationRecorder, calibration_stem
from foley.accel.caching.fora import Fora
from foley.accel.caching.smoothcache import SmoothCache
from foley.accel.cost import count_evaluation_macs, run_cost
from foley.accel.layers import find_cacheable_layers
from foley.core.seeding import torch_generator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import sample
from foley.diffusion.solver import Solver
from foley.models.dit.llama import LlamaTransformer
from foley.models.dit.model import DiffusionTransformer, LatentTransformer
from foley.nn.adaln import AdaLN, AdaLNSingle, AdaLNSola, TimeToken

BATCH, CHANNELS, FRAMES, WIDTH, TOKENS, CONTEXT = 2, 4, 20, 32, 5, 16
SCHEMES = {"sola": AdaLNSola(4, 4.0), "adaln": AdaLN(), "single": AdaLNSingle(), "token": TimeToken()}


@pytest.fixture(params=[*SCHEMES, "llama"])
def dit(request: Any) -> LatentTransformer:
    torch.manual_seed(0)
    if request.param == "llama":
        model: LatentTransformer = LlamaTransformer(CHANNELS, WIDTH, 3, 2, CONTEXT)
    else:
        model = DiffusionTransformer(CHANNELS, WIDTH, 2, 2, CONTEXT, SCHEMES[request.param])
    for parameter in model.parameters():
        if not parameter.any():  # layers that start at zero would have nothing to cache
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _random(*shape: int, purpose: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(purpose))


def _sample(dit: LatentTransformer, accelerator: Any = None, solver: str = "ddim") -> torch.Tensor:
    choice, guidance = Solver(solver, 5), ClassifierFreeGuidance(3.0, 0.5)
    scheduler = choice.build(DiffusionProcess("v"))
    positive = Conditioning(_random(BATCH, TOKENS, CONTEXT, purpose="text"), torch.ones(BATCH, TOKENS).bool())
    negative = Conditioning(_random(1, 1, CONTEXT, purpose="empty"), torch.ones(1, 1).bool())
    noise = _random(BATCH, CHANNELS, FRAMES, purpose="noise")
    denoise = guidance.wrap(dit, positive, negative)
    run = choice.run_context(scheduler, guidance, BATCH)
    if accelerator is None:
        return sample(denoise, noise, scheduler, run)
    with accelerator.attach(dit):
        return sample(denoise, noise, scheduler, run, [accelerator])


@pytest.fixture
def calibration_dir(dit: LatentTransformer, tmp_path: Path) -> Path:
    recorder = CalibrationRecorder()
    _sample(dit, recorder)
    recorder.calibration().save(calibration_stem(tmp_path, "ddim", 5))
    return tmp_path


def test_every_block_offers_three_layers_in_order_of_execution(dit: LatentTransformer) -> None:
    layers, executed = find_cacheable_layers(dit), []
    for layer in layers:
        layer.module.register_forward_hook(lambda *_, name=layer.name: executed.append(name))
    dit(torch.randn(1, CHANNELS, FRAMES), torch.ones(1), torch.randn(1, TOKENS, CONTEXT))
    assert [layer.name for layer in layers] == executed
    first = "in_blocks.0" if isinstance(dit, DiffusionTransformer) else "stack.0"
    assert executed[:3] == [f"{first}.{kind}" for kind in ("self_attention", "cross_attention", "feed_forward")]
    assert len(executed) == 9


def test_threshold_zero_is_bitwise_uncached_and_the_model_is_restored(
    dit: LatentTransformer, calibration_dir: Path
) -> None:
    plain = _sample(dit)
    assert torch.equal(_sample(dit, AudioCache(calibration_dir, 0.0)), plain)
    cached = [_sample(dit, AudioCache(calibration_dir, 1e9)) for _ in range(2)]
    assert torch.equal(*cached)
    assert not torch.equal(cached[0], plain)
    assert torch.equal(_sample(dit), plain)
    assert not any("forward" in vars(module) for module in dit.modules())


def test_the_counted_macs_agree_with_those_of_a_cached_evaluation(dit: LatentTransformer) -> None:
    inputs = torch.randn(BATCH, CHANNELS, FRAMES), torch.ones(BATCH), torch.randn(BATCH, TOKENS, CONTEXT)
    macs = count_evaluation_macs(dit, lambda: dit(*inputs))
    fora = Fora(5)
    _sample(dit, fora)
    assert fora.schedule is not None
    cost = run_cost(fora.schedule, macs)
    outside_layers = macs.total - sum(macs.layers.values())
    assert cost.macs_cached == macs.total + 4 * outside_layers
    tokens = BATCH * (FRAMES + dit.prepends_time_token)
    middle = dit.blocks()[1].feed_forward.layer.output.in_features
    assert macs.layers[find_cacheable_layers(dit)[5].name] == tokens * 3 * WIDTH * middle


@pytest.mark.parametrize("policy", ["audiocache", "smoothcache", "fora"])
def test_every_policy_saves_macs(dit: LatentTransformer, calibration_dir: Path, policy: str) -> None:
    accelerators = {
        "audiocache": AudioCache(calibration_dir, 1e9),
        "smoothcache": SmoothCache(calibration_dir, 1e9),
        "fora": Fora(2),
    }
    cache, plain = accelerators[policy], _sample(dit)
    assert not torch.equal(_sample(dit, cache), plain)
    inputs = torch.randn(1, CHANNELS, FRAMES), torch.ones(1), torch.randn(1, TOKENS, CONTEXT)
    assert cache.schedule is not None
    assert run_cost(cache.schedule, count_evaluation_macs(dit, lambda: dit(*inputs))).speedup > 1.3
