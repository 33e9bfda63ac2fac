"""LiteFocus and Token Merging on a small AudioLDM2 U-Net of diffusers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AudioLDM2UNet2DConditionModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from foley.accel.attention.litefocus import LiteFocus, compensation_indices, sparse_attention
from foley.accel.attention.token_merging import TokenMerging, draw_destinations, match_tokens
from foley.accel.caching.fora import Fora
from foley.accel.combined import Combined
from foley.accel.diffusers.audioldm2 import find_self_attention
from foley.core.config import PROJECT_ROOT
from foley.core.seeding import torch_generator
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import sample
from foley.diffusion.solver import Solver

CHANNELS, FRAMES, FREQUENCIES = 4, 24, 8


def _unet() -> AudioLDM2UNet2DConditionModel:
    torch.manual_seed(0)
    return AudioLDM2UNet2DConditionModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(8, 16, 24, 24),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=[[None, 6, 10]] * 4,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    ).eval()


@pytest.fixture
def unet() -> AudioLDM2UNet2DConditionModel:
    return _unet()


def _random(*shape: int, purpose: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(purpose))


def _sample(
    unet: AudioLDM2UNet2DConditionModel, accelerator: Any = None, items: int = 2, frames: int = FRAMES
) -> torch.Tensor:
    """Three DDIM steps without guidance, `[items, C, frames, F]`."""
    choice = Solver("ddim", 3)
    scheduler = choice.build(DiffusionProcess("v"))
    context, more = _random(2, 3, 6, purpose="context")[:items], _random(2, 4, 10, purpose="text")[:items]

    def denoise(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return unet(noisy, timestep, context, encoder_hidden_states_1=more).sample

    noise = torch.stack([_random(CHANNELS, frames, FREQUENCIES, purpose=f"noise {i}") for i in range(items)])
    run = choice.run_context(scheduler, ClassifierFreeGuidance(1.0), items)
    if accelerator is None:
        return sample(denoise, noise, scheduler, run)
    with accelerator.attach(unet):
        return sample(denoise, noise, scheduler, run, [accelerator])


def _processors(unet: AudioLDM2UNet2DConditionModel) -> dict[str, int]:
    return {name: id(processor) for name, processor in unet.attn_processors.items()}


def _hooks(unet: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in unet.modules())


ACCELERATORS: dict[str, Callable[..., Any]] = {"litefocus": LiteFocus, "token_merging": TokenMerging}


@pytest.fixture(params=ACCELERATORS)
def make(request: Any) -> Callable[..., Any]:
    return ACCELERATORS[request.param]


def test_self_attention_is_found_by_name_in_the_chosen_blocks(unet: AudioLDM2UNet2DConditionModel) -> None:
    names = [layer.name for layer in find_self_attention(unet, ["down_blocks.1"])]
    parts = {0: ("attn1", "attn2"), 1: ("attn1",), 2: ("attn1",)}  # the first transformer has no text
    assert names == [
        f"down_blocks.1.attentions.{index}.transformer_blocks.0.{part}" for index in parts for part in parts[index]
    ]
    assert [layer.name for layer in find_self_attention(nn.ModuleDict({"unet": unet}), ["down_blocks.1"])] == names
    assert len(find_self_attention(unet, ["down_blocks.1", "up_blocks.2"])) == 4 + 8
    assert len(find_self_attention(unet, ["mid_block"])) == 4


def test_unknown_blocks_and_models_are_refused(unet: AudioLDM2UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match=r"no self-attention in \['down_blocks.0', 'middle'\]"):
        find_self_attention(unet, ["down_blocks.0", "down_blocks.1", "middle"])
    with pytest.raises(ValueError, match="Linear holds 0 AudioLDM2UNet2DConditionModel"):
        find_self_attention(nn.Linear(1, 1), ["down_blocks.1"])


def test_generations_are_seeded_repeatable_and_leave_the_unet_alone(
    unet: AudioLDM2UNet2DConditionModel, make: Callable[..., Any]
) -> None:
    plain, processors = _sample(unet), _processors(unet)
    accelerator = make()
    first = _sample(unet, accelerator)
    assert torch.equal(first, _sample(unet, accelerator))
    assert torch.equal(first, _sample(_unet(), make()))
    assert not torch.equal(first, _sample(unet, make(seed=1)))
    assert not torch.equal(first, plain)
    assert (_processors(unet), _hooks(unet)) == (processors, 0)
    assert torch.equal(_sample(unet), plain)


def test_an_item_ignores_its_batch(unet: AudioLDM2UNet2DConditionModel, make: Callable[..., Any]) -> None:
    alone, batch = (_sample(unet, make(ratio=0.5), items) for items in (1, 2))
    torch.testing.assert_close(alone, batch[:1], atol=1e-4, rtol=1e-4)


def test_neutral_ratios_are_identities(unet: AudioLDM2UNet2DConditionModel) -> None:
    plain = _sample(unet)
    torch.testing.assert_close(_sample(unet, LiteFocus(ratio=1.0)), plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(_sample(unet, TokenMerging(ratio=0.0)), plain)


def test_lengths_that_do_not_halve_evenly_work(unet: AudioLDM2UNet2DConditionModel, make: Callable[..., Any]) -> None:
    assert _sample(unet, make(), frames=21).shape == (2, CHANNELS, 21, FREQUENCIES)


def test_an_exception_restores_everything(unet: AudioLDM2UNet2DConditionModel, make: Callable[..., Any]) -> None:
    plain, processors = _sample(unet), _processors(unet)

    def break_down(module: nn.Module, args: Any) -> None:
        raise ArithmeticError("the layer breaks")

    handle = unet.up_blocks[2].attentions[0].register_forward_pre_hook(break_down)
    with pytest.raises(ArithmeticError):
        _sample(unet, make())
    handle.remove()
    assert (_processors(unet), _hooks(unet)) == (processors, 0)
    assert torch.equal(_sample(unet), plain)


def test_caching_and_sparse_attention_combine_in_any_order(
    unet: AudioLDM2UNet2DConditionModel, make: Callable[..., Any]
) -> None:
    processors = _processors(unet)
    alone = [_sample(unet, Fora(2)), _sample(unet, make())]
    both = _sample(unet, Combined([Fora(2), make()]))
    assert torch.equal(both, _sample(unet, Combined([make(), Fora(2)])))
    assert not any(torch.equal(both, latent) for latent in alone)
    assert (_processors(unet), _hooks(unet)) == (processors, 0)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_wrong_uses_are_refused(unet: AudioLDM2UNet2DConditionModel, make: Callable[..., Any]) -> None:
    inputs = torch.zeros(1, CHANNELS, FRAMES, FREQUENCIES), 1, torch.zeros(1, 3, 6)
    context = {"encoder_hidden_states_1": torch.zeros(1, 4, 10)}
    with make().attach(unet):
        for other in ACCELERATORS.values():
            with pytest.raises(RuntimeError, match="exclude each other"), other().attach(unet):
                pass
        with pytest.raises(RuntimeError, match="the sampler does not call it"):
            unet(*inputs, **context)
        attention = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
        with pytest.raises(ValueError, match="got attention_mask"):
            attention(torch.zeros(1, 4, 16), attention_mask=torch.zeros(1, 1, 4))


def test_litefocus_takes_the_frequencies_of_the_feature_map(
    unet: AudioLDM2UNet2DConditionModel, monkeypatch: Any
) -> None:
    seen: list[tuple[int, int, int]] = []

    def spy(q: Any, k: Any, v: Any, num_frequencies: int, indices: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.append((q.shape[2], num_frequencies, len(indices)))
        return sparse_attention(q, k, v, num_frequencies, indices, **settings)

    monkeypatch.setattr("foley.accel.attention.litefocus.sparse_attention", spy)
    _sample(unet, LiteFocus(ratio=0.1))
    assert seen == [(FRAMES // 2 * 4, 4, 4)] * (3 * (4 + 8))
    seen.clear()
    _sample(unet, LiteFocus(ratio=0.1, blocks=["down_blocks.2"]))
    assert seen == [(FRAMES // 4 * 2, 2, 1)] * (3 * 4)


def test_litefocus_replaces_only_the_attention_itself(unet: AudioLDM2UNet2DConditionModel) -> None:
    """One layer by hand: diffusers' own projections, masked dense attention between them."""
    layer = find_self_attention(unet, ["down_blocks.1"])[0]
    tokens, outputs = _random(1, 48, 16, purpose="tokens"), []
    layer.attention.register_forward_hook(lambda module, args, output: outputs.append((args[0], output)))
    _sample(unet, LiteFocus(ratio=0.1, seed=3), items=1)
    tokens, actual = outputs[0]
    generator = torch_generator("LiteFocus", 3, layer.name, 0)
    mask = torch.arange(48)[:, None] % 4 == torch.arange(48) % 4
    mask[:, compensation_indices(48, 0.1, generator)] = True
    expected = layer.attention(tokens, attention_mask=torch.where(mask, 0.0, -torch.inf).expand(2, -1, -1))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_every_published_setting_differs(unet: AudioLDM2UNet2DConditionModel) -> None:
    settings: list[dict[str, Any]] = [{}, {"ratio": 0.0}, {"same_frequency": False}, {"double_count": True}]
    latents = [_sample(unet, LiteFocus(**setting), items=1) for setting in settings]
    assert not any(torch.equal(a, b) for i, a in enumerate(latents) for b in latents[:i])


def test_one_destination_in_every_cell() -> None:
    drawn = draw_destinations(7, 5, (2, 2), torch_generator("destinations"))
    cells = [(index // 5 // 2, index % 5 // 2) for index in drawn.tolist()]
    assert cells == [(t, f) for t in range(3) for f in range(2)]


def test_the_likest_sources_merge_into_their_destination() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.5, 0.6], [0.0, 3.0]]])
    matching = match_tokens(features, torch.tensor([0, 1]), num_merged=2)
    assert matching.num_rows == 3
    rows = matching.rows[0].tolist()
    assert rows[2] == rows[0]
    assert rows[4] == rows[1]
    assert len(set(rows)) == 3
    merged = matching.merge(features)
    expected = torch.tensor([[1.5, 0.05], [0.0, 2.0], [1.5, 0.05], [0.5, 0.6], [0.0, 2.0]])
    torch.testing.assert_close(matching.unmerge(merged)[0], expected)


def test_merging_nothing_or_equal_tokens_loses_nothing() -> None:
    features = _random(2, 12, 3, purpose="features")
    nothing = match_tokens(features, torch.arange(0, 12, 4), num_merged=0)
    assert torch.equal(nothing.unmerge(nothing.merge(features)), features)
    equal = features[:, :1].expand(-1, 12, -1)
    half = match_tokens(equal, torch.arange(0, 12, 4), num_merged=6)
    assert half.merge(equal).shape == (2, 6, 3)
    torch.testing.assert_close(half.unmerge(half.merge(equal)), equal)


def test_token_merging_attends_among_fewer_tokens(unet: AudioLDM2UNet2DConditionModel, monkeypatch: Any) -> None:
    sizes: list[int] = []
    dense = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> torch.Tensor:
        sizes.append(q.shape[2])
        return dense(q, k, v, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    _sample(unet, TokenMerging(ratio=0.25, blocks=["down_blocks.1"], attentions=["attn1", "attn2"]), items=1)
    assert sizes.count(36) == 3 * 4


def test_token_merging_refuses_what_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 0\.75 for stride \(2, 2\), got 0\.8"):
        TokenMerging(ratio=0.8)
    with pytest.raises(ValueError, match=r"attn1, attn2 or both, got \['attn3'\]"):
        TokenMerging(attentions=["attn3"])


@pytest.mark.parametrize("name", ACCELERATORS)
def test_the_configs_hold_the_published_settings(name: str, unet: AudioLDM2UNet2DConditionModel) -> None:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        accelerator = instantiate(compose("sample", overrides=[f"accel={name}"]).accel)
    assert torch.equal(_sample(unet, accelerator), _sample(unet, ACCELERATORS[name]()))
