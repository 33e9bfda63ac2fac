"""Local windows and random global frames: against masked dense attention, and on the real denoiser."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from foley.accel.attention.litefocus import LiteFocus, compensation_indices
from foley.accel.attention.local_global import (
    LocalGlobal,
    flex_attention_of,
    keys_per_query,
    local_global_attention,
)
from foley.accel.attention.sparse import FLEX_BLOCK, LEAST_SAVING, filled_blocks, pays, takes_flex
from foley.accel.caching.fora import Fora
from foley.accel.caching.layer_cache import LayerCache
from foley.accel.combined import Combined
from foley.core.config import PROJECT_ROOT
from foley.core.seeding import torch_generator
from foley.diffusion.context import RunContext, StepContext
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import sample
from foley.diffusion.solver import Solver
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola, TimeToken
from foley.nn.attention import dense_core

BATCH, HEADS, DIM = 2, 3, 8
CHANNELS, WIDTH, FRAMES, CONTEXT = 4, 32, 40, 16


def _random(*shape: int, purpose: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(purpose))


def _qkv(length: int) -> list[torch.Tensor]:
    return [_random(BATCH, HEADS, length, DIM, purpose=name) for name in ("query", "key", "value")]


def _window_mask(length: int, window: int, indices: torch.Tensor) -> torch.Tensor:
    position = torch.arange(length)
    mask = (position[:, None] - position).abs() <= window
    mask[:, indices] = True
    return mask


@pytest.mark.parametrize("length", [150, 192])
@pytest.mark.parametrize("window", [0, 5, 64, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_blocks_equal_masked_dense_attention(length: int, window: int, ratio: float) -> None:
    indices = compensation_indices(length, ratio, torch_generator("global"))
    expected = F.scaled_dot_product_attention(*_qkv(length), attn_mask=_window_mask(length, window, indices))
    actual = local_global_attention(*_qkv(length), window, indices)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_all_frames_as_global_ones_and_a_wide_window_are_dense_attention() -> None:
    dense = F.scaled_dot_product_attention(*_qkv(150))
    everything = torch.arange(150)
    torch.testing.assert_close(local_global_attention(*_qkv(150), 3, everything), dense, atol=1e-5, rtol=1e-5)
    for window in (149, 150, 1000):
        assert torch.equal(local_global_attention(*_qkv(150), window, everything[:7]), dense)


def test_masked_keys_are_ignored_and_padding_stays_finite() -> None:
    length, indices = 150, torch.tensor([3, 70, 140])
    valid = torch.arange(length) < torch.tensor([[length], [60]])
    mask = valid[:, None, None]
    both = mask & _window_mask(length, 5, indices)
    expected = F.scaled_dot_product_attention(*_qkv(length), attn_mask=both)
    actual = local_global_attention(*_qkv(length), 5, indices, mask)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[1, :, :60], expected[1, :, :60], atol=1e-5, rtol=1e-5)


def test_windows_and_masks_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="0 or more, got -1"):
        local_global_attention(*_qkv(150), -1, torch.arange(2))
    with pytest.raises(ValueError, match=r"\[B, 1, 1, N\], got \(1, 1, 150, 150\)"):
        local_global_attention(*_qkv(150), 5, torch.arange(2), torch.ones(1, 1, 150, 150).bool())


@pytest.fixture(params=[AdaLNSola(4, 4.0), TimeToken()], ids=["frames", "time token"])
def dit(request: Any) -> DiffusionTransformer:
    torch.manual_seed(0)
    model = DiffusionTransformer(CHANNELS, WIDTH, 2, 2, CONTEXT, request.param)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _sample(dit: DiffusionTransformer, accelerator: Any = None, items: int = BATCH) -> torch.Tensor:
    choice, guidance = Solver("ddim", 4), ClassifierFreeGuidance(3.0)
    scheduler = choice.build(DiffusionProcess("v"))
    text, noise = _random(BATCH, 5, CONTEXT, purpose="text"), _random(BATCH, CHANNELS, FRAMES, purpose="noise")
    positive = Conditioning(text[:items], torch.ones(items, 5).bool())
    negative = Conditioning(_random(1, 1, CONTEXT, purpose="empty"), torch.ones(1, 1).bool())
    denoise = guidance.wrap(dit, positive, negative)
    run = choice.run_context(scheduler, guidance, items)
    if accelerator is None:
        return sample(denoise, noise[:items], scheduler, run)
    with accelerator.attach(dit):
        return sample(denoise, noise[:items], scheduler, run, [accelerator])


def _cores(dit: DiffusionTransformer) -> set[Any]:
    return {module.core for module in dit.modules() if hasattr(module, "core")}


def test_generations_are_seeded_repeatable_and_leave_the_denoiser_alone(dit: DiffusionTransformer) -> None:
    plain = _sample(dit)
    sparse = LocalGlobal(window_frames=3, ratio=0.2)
    first = _sample(dit, sparse)
    assert torch.equal(first, _sample(dit, sparse))
    assert torch.equal(first, _sample(dit, LocalGlobal(window_frames=3, ratio=0.2)))
    assert not torch.equal(first, _sample(dit, LocalGlobal(window_frames=3, ratio=0.2, seed=1)))
    assert not torch.equal(first, plain)
    assert _cores(dit) == {dense_core}
    assert torch.equal(_sample(dit), plain)


def test_an_item_ignores_its_batch(dit: DiffusionTransformer) -> None:
    sparse = LocalGlobal(window_frames=3, ratio=0.2)
    torch.testing.assert_close(_sample(dit, sparse, items=1), _sample(dit, sparse)[:1], atol=1e-4, rtol=1e-4)


def test_a_window_over_the_whole_latent_is_bitwise_dense_and_ratio_one_nearly(dit: DiffusionTransformer) -> None:
    plain = _sample(dit)
    assert torch.equal(_sample(dit, LocalGlobal(window_frames=FRAMES)), plain)
    torch.testing.assert_close(_sample(dit, LocalGlobal(window_frames=2, ratio=1.0)), plain, atol=1e-3, rtol=1e-3)


def test_a_time_token_is_visible_to_every_frame(dit: DiffusionTransformer, monkeypatch: Any) -> None:
    seen: list[torch.Tensor] = []

    def spy(q: Any, k: Any, v: Any, window: int, indices: torch.Tensor, mask: Any) -> torch.Tensor:
        seen.append(indices)
        return local_global_attention(q, k, v, window, indices, mask)

    monkeypatch.setattr("foley.accel.attention.local_global.local_global_attention", spy)
    _sample(dit, LocalGlobal(window_frames=3, ratio=0.1))
    assert {len(indices) for indices in seen} == {FRAMES // 10 + dit.prepends_time_token}
    assert all(0 in indices for indices in seen) or not dit.prepends_time_token
    assert len({tuple(indices.tolist()) for indices in seen}) == len(seen) == 3 * 4


def test_draws_of_a_layer_ignore_the_other_layers_and_are_made_once_a_run() -> None:
    made: list[int] = []

    def draw(num_tokens: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
        made.append(num_tokens)
        return compensation_indices(num_tokens, ratio, generator)

    accelerator, run = LocalGlobal(3), RunContext("ddim", 4, torch.arange(4).flip(0), 1.0, 0.0, BATCH)
    accelerator.on_run_start(run)
    for evaluation in range(4):
        accelerator.on_evaluation_start(StepContext(evaluation, run.timesteps[evaluation], run))
        for layer in ("another", "a layer"):
            drawn = accelerator.drawn(layer, draw, FRAMES, 0.2, device=torch.device("cpu"))
        generator = torch_generator("LocalGlobal", 0, "a layer", evaluation)
        assert torch.equal(drawn, compensation_indices(FRAMES, 0.2, generator))
    assert len(made) == 2 * 4


def test_an_exception_restores_the_cores(dit: DiffusionTransformer) -> None:
    def break_down(module: torch.nn.Module, args: Any) -> None:
        raise ArithmeticError("the layer breaks")

    handle = dit.mid_block.register_forward_pre_hook(break_down)
    with pytest.raises(ArithmeticError):
        _sample(dit, LocalGlobal(window_frames=3))
    handle.remove()
    assert _cores(dit) == {dense_core}


def test_wrong_uses_are_refused(dit: DiffusionTransformer) -> None:
    sparse = LocalGlobal(window_frames=3)
    with sparse.attach(dit):
        with pytest.raises(RuntimeError, match="replaced already"), LocalGlobal(window_frames=3).attach(dit):
            pass
        with pytest.raises(RuntimeError, match="a LocalGlobal is attached, but the sampler does not call it"):
            dit(torch.zeros(1, CHANNELS, FRAMES), torch.ones(1), torch.zeros(1, 5, CONTEXT))
    layer = dit.mid_block.cross_attention
    with pytest.raises(ValueError, match="no self-attention layer whose core can be replaced"), sparse.attach(layer):
        pass


def test_caching_and_sparse_attention_combine_in_any_order(dit: DiffusionTransformer) -> None:
    cached, sparse = _sample(dit, Fora(2)), _sample(dit, LocalGlobal(3))
    results = [
        _sample(dit, Combined([Fora(2), LocalGlobal(3)])),
        _sample(dit, Combined([LocalGlobal(3), Fora(2)])),
        _sample(dit, Combined.of(attention=Combined([LocalGlobal(3)]), cache=Fora(2))),
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], cached)
    assert not torch.equal(results[0], sparse)
    assert _cores(dit) == {dense_core}
    assert not any("forward" in vars(module) for module in dit.modules())


def test_a_failing_member_detaches_those_before_it(dit: DiffusionTransformer) -> None:
    broken = Combined([LocalGlobal(3), Fora(2), LocalGlobal(3)])
    with pytest.raises(RuntimeError, match="replaced already"), broken.attach(dit):
        pass
    assert _cores(dit) == {dense_core}
    assert not any("forward" in vars(module) for module in dit.modules())


def test_the_configs_name_them() -> None:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        local_global = instantiate(compose("sample", overrides=["accel=local_global"]).accel)
        overrides = ["accel=audiocache_local_global", "accel.cache.threshold=0.1", "accel.attention.ratio=0.2"]
        combined = instantiate(compose("sample", overrides=overrides).accel)
        exchanged = ["accel@accel.cache=fora", "accel@accel.attention=litefocus"]
        others = instantiate(compose("sample", overrides=["accel=audiocache_local_global", *exchanged]).accel)
    assert isinstance(local_global, LocalGlobal)
    cache, attention = combined.accelerators
    assert isinstance(cache, LayerCache)
    assert isinstance(attention, LocalGlobal)
    assert [type(part) for part in others.accelerators] == [Fora, LiteFocus]


@pytest.mark.parametrize(
    "mask", [None, torch.arange(300)[None, None, None] < torch.tensor([300, 150])[:, None, None, None]]
)
def test_flex_attention_is_the_same_attention(mask: torch.Tensor | None) -> None:
    qkv, indices = _qkv(300), compensation_indices(300, 0.1, torch_generator("global"))
    expected = local_global_attention(*qkv, 20, indices, mask)
    actual = flex_attention_of(*qkv, 20, indices, mask, attend=flex_attention)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_shared", "group", "margin"), [(0, 1, 20), (30, 1, 200), (150, 1, 0), (70, 100, 0)])
def test_flex_attention_meets_every_block_that_holds_a_score_and_no_other(
    num_shared: int, group: int, margin: int
) -> None:
    length = 500
    row, column = torch.arange(length)[:, None], torch.arange(length)
    first, last = row // group * group - margin, row // group * group + group - 1 + margin
    pairs = torch.cat([torch.ones(length, num_shared).bool(), (column >= first) & (column <= last)], dim=1)
    padded = F.pad(pairs, (0, -pairs.shape[1] % FLEX_BLOCK, 0, -length % FLEX_BLOCK))
    blocks = padded.unflatten(1, (-1, FLEX_BLOCK)).unflatten(0, (-1, FLEX_BLOCK)).any(dim=3).any(dim=1)
    assert torch.equal(filled_blocks(length, num_shared, group, margin), blocks)


def test_where_it_does_not_pay_it_falls_back_to_dense_attention_and_says_so(dit: DiffusionTransformer) -> None:
    plain, falling_back = _sample(dit), LocalGlobal(window_frames=3, ratio=0.2, fallback=True)
    assert torch.equal(_sample(dit, falling_back), plain)  # one block meets all 40 frames
    assert falling_back.describe() == {"dense_attention_tokens": [FRAMES + dit.prepends_time_token]}
    always = LocalGlobal(window_frames=3, ratio=0.2)
    assert not torch.equal(_sample(dit, always), plain)
    assert always.describe() == {}


def test_sparse_attention_pays_by_its_share_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setitem(LEAST_SAVING, "cpu", 1.5)
    assert pays(150, 100.0, cpu)
    assert not pays(149, 100.0, cpu)
    assert keys_per_query(150, 150, 0) == 150  # one block meets every key


def test_flex_attention_is_chosen_by_device_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not takes_flex(torch.zeros(1, 1, 4, 64))
    for capability, head_dim, chosen in (((9, 0), 64, True), ((7, 5), 64, False), ((9, 0), 8, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        query = SimpleNamespace(device=torch.device("cuda"), shape=(1, 1, 4, head_dim))
        assert takes_flex(query) is chosen  # type: ignore[arg-type]
