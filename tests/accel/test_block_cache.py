"""Caches of blocks: bits kept where all computes, long skips, branches, guards; each rule in closed form."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, FluxTransformer2DModel, SD3Transformer2DModel
from stirring_parts import stir
from tiny_pipelines import audioldm2, stable_audio, stable_audio_dit
from torch import Tensor, nn

from foley.accel import DBCache, FirstBlockCache, Fora, LocalGlobal, MagCache, TeaCache
from foley.accel.caching.block_cache import BlockCache, find_blocks
from foley.accel.caching.magcache import MagnitudeRule
from foley.accel.caching.teacache import Accumulated, TeaCacheRecorder
from foley.accel.combined import Combined
from foley.accel.cost import CostMeter, count_evaluation_macs, run_cost
from foley.accel.diffusers.pipelines import accelerated
from foley.accel.layers import declare_cacheable_layers
from foley.core.seeding import torch_generator
from foley.diffusion.context import RunContext, StepContext
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.models.dit.llama import LlamaTransformer
from foley.models.dit.model import DiffusionTransformer, LatentTransformer
from foley.nn.adaln import AdaLNSola

STEPS, DEPTH = 6, 4
RATIOS = [1.0] * STEPS
HUGE: dict[str, Callable[[], BlockCache]] = {
    "teacache": lambda: TeaCache(threshold=1e9),
    "first_block_cache": lambda: FirstBlockCache(threshold=1e9),
    "dbcache": lambda: DBCache(threshold=1e9, first_blocks=1, last_blocks=2, warmup=2),
    "magcache": lambda: MagCache(threshold=1e9, max_reuses=9, ratios=RATIOS),
}
NEVER: dict[str, Callable[[], BlockCache]] = {
    "teacache": lambda: TeaCache(threshold=0),
    "first_block_cache": lambda: FirstBlockCache(threshold=0),
    "dbcache": lambda: DBCache(threshold=0, first_blocks=1, last_blocks=2, warmup=1),
    "magcache": lambda: MagCache(threshold=0, ratios=RATIOS, retention_ratio=0),
}
COMPUTED = {
    "teacache": [True, False, False, False, False, True],
    "first_block_cache": [True, False, False, False, False, False],
    "dbcache": [True, True, False, False, False, False],
    "magcache": [True, False, False, False, False, False],
}
"""With a huge threshold: what the guards of each method leave."""


def _filled(model: nn.Module) -> Any:
    stir(model)  # layers that start at zero would have nothing to cache
    return model.eval()


@pytest.fixture
def dit() -> DiffusionTransformer:
    torch.manual_seed(0)
    return _filled(DiffusionTransformer(4, 16, DEPTH, 2, 6, AdaLNSola(rank=2, alpha=2)))


def _generate(denoiser: LatentTransformer, accelerator: Any = None) -> Tensor:
    rows = [torch.randn(2, 3, 6, generator=torch_generator(name)) for name in ("text", "empty")]
    positive, negative = (Conditioning(row, torch.ones(2, 3, dtype=torch.bool)) for row in rows)
    guidance, solver, process = ClassifierFreeGuidance(3.0), Solver("ddim", STEPS), DiffusionProcess("v")
    return generate_latents(denoiser, process, positive, negative, [0, 1], 20, guidance, solver, accelerator)


def _drive(model: nn.Module, cache: Any, calls: Sequence[tuple[str, dict[str, Any]]], first: int = 0) -> list[Tensor]:
    """The predictions of a run whose evaluations are called with these inputs, each for a branch, in turn."""
    branches = len({branch for branch, _ in calls})
    total = first + len(calls) // branches
    run, predictions = RunContext("ddim", total, torch.arange(total).flip(0), 1.0, 0.0, 1), []
    with torch.no_grad(), cache.attach(model):
        cache.on_run_start(run)
        for index, (branch, inputs) in enumerate(calls):
            context = StepContext(first + index // branches, run.timesteps[first + index // branches], run, branch)
            cache.on_evaluation_start(context)
            output = model(**inputs)
            predictions.append(output if isinstance(output, Tensor) else output[0])
            cache.on_evaluation_end(context, predictions[-1])
        cache.on_run_end()
    return predictions


def _inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noisy, text = torch.randn(1, 4, 20, generator=generator), torch.randn(1, 3, 6, generator=generator)
    return {"noisy": noisy, "timestep": torch.tensor([500]), "context": text}


@pytest.mark.parametrize("name", NEVER)
def test_a_threshold_of_zero_keeps_every_bit_and_leaves_no_trace(dit: DiffusionTransformer, name: str) -> None:
    plain, cache = _generate(dit), NEVER[name]()
    assert torch.equal(_generate(dit, cache), plain)
    assert cache.hits == 0
    assert cache.schedule is not None
    assert bool(cache.schedule.compute.all())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in dit.modules())
    assert torch.equal(_generate(dit), plain)


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_threshold_computes_only_what_must_be(dit: DiffusionTransformer, name: str) -> None:
    cache, ran = HUGE[name](), [0] * (DEPTH + 1)
    blocks = dit.blocks()
    for index, block in enumerate(blocks):  # TeaCache looks at the first block's attention, and runs it no further

        def count(*_: Any, index: int = index) -> None:
            ran[index] += 1

        block.feed_forward.register_forward_hook(count)
    latent = _generate(dit, cache)
    expected = COMPUTED[name]
    assert cache.hits == expected.count(False)
    first, last = (1, 2) if name == "dbcache" else (1, 0) if name == "first_block_cache" else (0, 0)
    stack = range(first, DEPTH + 1 - last)
    assert ran == [sum(expected) if index in stack else STEPS for index in range(DEPTH + 1)]
    assert cache.schedule is not None
    for layer, row in zip(cache.schedule.layer_names, cache.schedule.compute.T.tolist(), strict=True):
        inside = any(layer.startswith(block.name + ".") for block in find_blocks(dit)[first : DEPTH + 1 - last])
        assert row == (expected if inside else [True] * STEPS)
    assert torch.equal(_generate(dit, cache), latent)  # nothing is left of the run before
    assert not torch.equal(latent, _generate(dit))


@pytest.mark.parametrize(("first", "last"), [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 2)])
def test_long_skips_are_reused_rightly(dit: DiffusionTransformer, first: int, last: int) -> None:
    cache = DBCache(threshold=1e9, first_blocks=first, last_blocks=last, warmup=1)
    computed, reused = _drive(dit, cache, [("joint", _inputs())] * 2)  # nothing has changed: neither may the output
    assert cache.hits == 1
    torch.testing.assert_close(reused, computed, rtol=1e-5, atol=1e-5)


def test_a_plain_stack_is_reused_as_well() -> None:
    torch.manual_seed(0)
    model = _filled(LlamaTransformer(4, 16, 3, 2, 6))
    for cache in (TeaCache(1e9), FirstBlockCache(1e9)):
        computed, reused, _ = _drive(model, cache, [("joint", _inputs())] * 3)
        assert cache.hits > 0
        torch.testing.assert_close(reused, computed, rtol=1e-5, atol=1e-5)


def test_the_measured_changes_are_those_of_the_papers(dit: DiffusionTransformer) -> None:
    seen: list[Tensor] = []
    attention, block = dit.in_blocks[0].self_attention.attention, dit.in_blocks[0]
    hooks = [
        attention.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        block.register_forward_hook(lambda _, args, output: seen.append(output - args[0])),
    ]
    inputs = [_inputs(seed) for seed in range(3)]
    with torch.no_grad():
        for each in inputs:
            dit(**each)
    for hook in hooks:
        hook.remove()
    modulated, residuals = seen[::2], seen[1::2]
    for cache, values, start in ((TeaCache(0), modulated, 1), (FirstBlockCache(1e9), residuals, 0)):
        _drive(dit, cache, [("joint", each) for each in inputs])
        before = [values[0], values[start]]  # TeaCache compares with the one before, the other with the last computed
        changes = [
            ((now - then).abs().sum() / then.abs().sum()).item() for now, then in zip(values[1:], before, strict=True)
        ]
        assert cache.differences[0] is None
        assert cache.differences[1:] == pytest.approx(changes, rel=1e-4)


def test_two_branches_do_not_share(dit: DiffusionTransformer) -> None:
    cache = FirstBlockCache(threshold=0.5)
    changing = [("negative", _inputs(0)), ("positive", _inputs(1)), ("negative", _inputs(0)), ("positive", _inputs(2))]
    outputs = _drive(dit, cache, changing)
    assert cache.hits == 1  # only the branch that did not change
    assert cache.schedule is not None
    assert bool(cache.schedule.compute.all())  # one of them computed
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(outputs[3], dit(**_inputs(2)))


def test_a_run_that_begins_in_the_middle_computes_there(dit: DiffusionTransformer) -> None:
    cache = FirstBlockCache(threshold=1e9)
    _drive(dit, cache, [("joint", _inputs())] * 2, first=3)
    assert cache.schedule is not None
    assert cache.schedule.compute[:, -1].tolist() == [True, True, True, True, False]


def test_the_guards_of_dbcache(dit: DiffusionTransformer) -> None:
    calls = [("joint", _inputs())] * 8
    computed = {
        "max_reuses": ({"max_reuses": 2}, "CRRCRRCR"),
        "max_hits": ({"max_hits": 3}, "CRRRCCCC"),
        "warmup": ({"warmup": 3}, "CCCRRRRR"),
        "always_compute": ({"always_compute": [4, 6]}, "CRRRCRCR"),
    }
    for options, expected in computed.values():
        cache = DBCache(**{"threshold": 1e9, "warmup": 1, **options})
        _drive(dit, cache, calls)
        assert cache.schedule is not None
        assert "".join("RC"[row] for row in cache.schedule.compute[:, -1].tolist()) == expected
    with pytest.raises(ValueError, match="always_compute names evaluation 8, but this run has 8"):
        _drive(dit, DBCache(always_compute=[8]), calls)


def test_the_residual_can_be_extrapolated(dit: DiffusionTransformer) -> None:
    held, extrapolated = (_generate(dit, DBCache(1e9, warmup=2, reuse=reuse)) for reuse in ("hold", "taylor"))
    assert not torch.equal(held, extrapolated)
    with pytest.raises(ValueError, match="got 'guess'"):
        DBCache(reuse="guess")


# ---------------------------------------------------------------- the rules


def _decisions(rule: Any, changes: Sequence[float | None]) -> list[bool]:
    decisions = []
    for evaluation, change in enumerate(changes):
        decisions.append(rule.computes(evaluation, change) or evaluation == 0)
        if decisions[-1]:
            rule.has_computed()
    return decisions


def test_teacache_adds_up_rescaled_changes() -> None:
    changes = [None, *[0.1] * 11]
    by_identity = _decisions(Accumulated(0.35), changes)  # 4 changes of 0.1 reach 0.35
    assert [index for index, computes in enumerate(by_identity) if computes] == [0, 4, 8]
    squared = _decisions(Accumulated(0.35, (10.0, 0.0, 0.1)), changes)  # 10 x^2 + 0.1 = 0.2: two of them
    assert [index for index, computes in enumerate(squared) if computes] == [0, 2, 4, 6, 8, 10]
    assert not any(_decisions(Accumulated(0.35, (-1.0,)), changes)[1:])  # a change is not negative


def test_magcache_adds_up_the_distance_of_the_product_from_one() -> None:
    ratio, delta = 0.95, 0.35  # errors 0.05, 0.0975, 0.142625, 0.18549...: the first three sum to 0.290125
    decisions = _decisions(MagnitudeRule([ratio] * 9, delta), [None] * 9)
    assert [index for index, computes in enumerate(decisions) if computes] == [0, 4, 8]


def test_magcache_ages_by_evaluations_that_are_skipped_as_a_whole() -> None:
    wants = []
    for delta in (0.25, 0.28):  # 1 - 0.9^3 = 0.271
        rule = MagnitudeRule([0.9] * 4, delta)
        rule.has_computed()
        wants.append(rule.computes(3, None))
    assert wants == [True, False]


def test_magcache_retains_the_beginning_and_caps_what_follows(dit: DiffusionTransformer) -> None:
    cache = MagCache(threshold=1e9, max_reuses=2, retention_ratio=0.5, ratios=RATIOS)
    _generate(dit, cache)
    assert cache.schedule is not None
    assert cache.schedule.compute[:, 0].tolist() == [True, True, True, False, False, True]


def test_magcache_measures_once_and_keeps_what_it_measured(dit: DiffusionTransformer, tmp_path: Path) -> None:
    cache, streams = MagCache(threshold=1e9, max_reuses=9, ratios_dir=tmp_path), []
    first, last = dit.blocks()[0], dit.blocks()[-1]
    hooks = [
        first.register_forward_pre_hook(lambda _, args: streams.append(args[0])),
        last.register_forward_hook(lambda _, args, output: streams.append(output)),
    ]
    plain = _generate(dit)
    for hook in hooks:
        hook.remove()
    residuals = [end - start for start, end in zip(streams[::2], streams[1::2], strict=True)]
    norms = [residual.norm(dim=-1) for residual in residuals]
    expected = [1.0, *((now / then).mean().item() for then, now in pairwise(norms))]
    assert torch.equal(_generate(dit, cache), plain)  # the first generation measures
    (file,) = tmp_path.iterdir()
    assert file.name == f"magcache_ddim_{STEPS}.json"
    assert json.loads(file.read_text())["ratios"] == pytest.approx(expected, rel=1e-4)
    later = _generate(dit, cache)
    assert cache.hits > 0
    assert torch.equal(_generate(dit, MagCache(1e9, max_reuses=9, ratios_dir=tmp_path)), later)  # read from the file
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"magcache_ddim_6.json is damaged.*model_hash.*remove it"):
        _generate(dit, MagCache(ratios_dir=tmp_path))


def test_the_polynomial_of_teacache_is_fitted_to_what_was_recorded(dit: DiffusionTransformer) -> None:
    plain, recorder = _generate(dit), TeaCacheRecorder()
    assert torch.equal(_generate(dit, recorder), plain)
    assert len(recorder.pairs) == STEPS - 1
    inputs = np.linspace(0.01, 0.3, 9)
    recorder.pairs = [(float(x), float(3 * x**2 - 0.1 * x + 0.02)) for x in inputs]
    assert recorder.coefficients(2) == pytest.approx([3.0, -0.1, 0.02])
    recorder.pairs = recorder.pairs[:4]
    with pytest.raises(ValueError, match="4 pairs of changes do not determine a polynomial of degree 4"):
        recorder.coefficients()


# ---------------------------------------------------------------- with others


def test_the_run_of_another_thread_is_refused(dit: DiffusionTransformer) -> None:
    cache, run = TeaCache(), RunContext("ddim", 2, torch.tensor([1, 0]), 1.0, 0.0, 1)
    with cache.attach(dit), ThreadPoolExecutor(1) as pool:
        cache.on_run_start(run)
        for call in (partial(cache.on_run_start, run), partial(dit, **_inputs())):
            with pytest.raises(RuntimeError, match="another thread is generating"):
                pool.submit(call).result()
        pool.submit(cache.on_run_end).result()  # that of the refused run: this one goes on
        cache.on_evaluation_start(StepContext(0, run.timesteps[0], run))
        dit(**_inputs())


def test_another_cache_of_layers_or_blocks_is_refused_whichever_comes_first(dit: DiffusionTransformer) -> None:
    for pair in ([Fora(2), TeaCache()], [TeaCache(), Fora(2)], [TeaCache(), MagCache()]):
        with pytest.raises(RuntimeError, match="replaced already: an accelerator is attached"):
            _generate(dit, Combined(pair))
    cache = TeaCache()
    with cache.attach(dit), pytest.raises(RuntimeError, match="attached to a denoiser already"):
        cache.attach(dit).__enter__()
    with cache.attach(dit), pytest.raises(RuntimeError, match="TeaCache is attached, but the sampler does not call it"):
        dit(**_inputs())
    with pytest.raises(ValueError, match=r"first_blocks=3 and accel.last_blocks=2 leave none of the 5 blocks"):
        _generate(dit, DBCache(first_blocks=3, last_blocks=2))
    with pytest.raises(ValueError, match="has no stack of transformer blocks"):
        TeaCache().attach(audioldm2().unet).__enter__()


def test_sparse_attention_goes_with_it(dit: DiffusionTransformer) -> None:
    cache = FirstBlockCache(1e9)
    _generate(dit, Combined([cache, LocalGlobal(window_frames=3, ratio=0.2)]))
    assert cache.hits == STEPS - 1


def test_the_clip_says_what_was_reused_and_what_it_cost(dit: DiffusionTransformer) -> None:
    cache = DBCache(threshold=1e9, warmup=2)
    meter = CostMeter(cache)
    assert torch.equal(_generate(dit, meter), _generate(dit, DBCache(threshold=1e9, warmup=2)))
    told = meter.describe()
    assert told["cache"]["name"] == "dbcache"
    assert (told["cache"]["hits"], told["cache"]["evaluations"]) == (STEPS - 2, STEPS)
    assert told["cache"]["mean_difference"] > 0
    inputs = {name: value.expand(2, *value.shape[1:]) for name, value in _inputs().items()}  # both branches of an item
    assert cache.schedule is not None
    cost = run_cost(cache.schedule, count_evaluation_macs(dit, lambda: dit(**inputs)))
    assert told["mac_speedup"] == pytest.approx(cost.speedup, rel=0.05)  # a run hoists what hears time and text


# ---------------------------------------------------------------- diffusers


@pytest.mark.filterwarnings("ignore:Should have:UserWarning")
def test_a_pipeline_of_diffusers_is_cached() -> None:
    pipeline = stable_audio()
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 7.0, "output_type": "latent"}

    def generate(cache: BlockCache) -> Tensor:
        with accelerated(pipeline.transformer, pipeline.scheduler, 7.0, cache):
            latent: Tensor = pipeline("abc", generator=torch.Generator().manual_seed(0), **options).audios
        return latent

    plain = pipeline("abc", generator=torch.Generator().manual_seed(0), **options).audios
    assert torch.equal(generate(FirstBlockCache(0)), plain)
    for cache in (TeaCache(1e9), FirstBlockCache(1e9), MagCache(1e9, max_reuses=9, ratios=[1.0] * 4)):
        assert not torch.equal(generate(cache), plain)
        assert cache.hits in (2, 3)
        assert cache.schedule is not None
        assert cache.schedule.signature.solver == "CosineDPMSolverMultistepScheduler"


def _flux() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    more = {"joint_attention_dim": 6, "pooled_projection_dim": 6, "axes_dims_rope": (2, 2, 4), "in_channels": 4}
    inputs = {"hidden_states": torch.randn(1, 5, 4), "encoder_hidden_states": torch.randn(1, 3, 6)}
    ids = {"img_ids": torch.zeros(5, 3), "txt_ids": torch.zeros(3, 3)}
    rest = {"pooled_projections": torch.randn(1, 6), "timestep": torch.tensor([0.5]), "guidance": torch.ones(1)}
    model = FluxTransformer2DModel(**sizes, **more, guidance_embeds=True)
    declare_cacheable_layers(model, {"*transformer_blocks.*.attn": None})
    return model, {**inputs, **ids, **rest, "return_dict": False}


def _sd3() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "num_layers": 3, "pos_embed_max_size": 4}
    more = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 6, "caption_projection_dim": 16}
    model = SD3Transformer2DModel(**sizes, **more, pooled_projection_dim=6, out_channels=4)
    inputs = {"hidden_states": torch.randn(1, 4, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 6)}
    rest = {"pooled_projections": torch.randn(1, 6), "timestep": torch.tensor([5]), "return_dict": False}
    return model, {**inputs, **rest}


def _cogvideox() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 4,
    }
    more = {"num_layers": 3, "sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 3}
    model = CogVideoXTransformer3DModel(**sizes, **more, text_embed_dim=6)
    inputs = {"hidden_states": torch.randn(1, 2, 4, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 6)}
    return model, {**inputs, "timestep": torch.tensor([5]), "return_dict": False}


@pytest.mark.parametrize("make", [_flux, _sd3, _cogvideox])
def test_blocks_that_return_tuples_keep_both_streams(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    for cache in (TeaCache(1e9), FirstBlockCache(1e9), DBCache(1e9, 1, 1, warmup=1)):
        computed, reused, _ = _drive(model, cache, [("joint", inputs)] * 3)
        assert cache.hits > 0
        torch.testing.assert_close(reused, computed, rtol=1e-4, atol=1e-5)


def test_the_blocks_of_diffusers_are_found_in_order() -> None:
    names = [block.name for block in find_blocks(stable_audio_dit())]
    assert names == ["transformer_blocks.0", "transformer_blocks.1"]
    assert [block.name.partition(".")[0] for block in find_blocks(_flux()[0])] == [
        *["transformer_blocks"] * 2, *["single_transformer_blocks"] * 2,
    ]  # fmt: skip
