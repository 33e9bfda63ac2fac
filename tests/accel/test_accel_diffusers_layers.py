"""Which layers of the models of diffusers can be cached, with which norms, and that nothing else is skipped."""

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from tiny_pipelines import audioldm2, stable_audio_dit
from torch import nn

from foley.accel.caching.fora import Fora
from foley.accel.caching.layer_cache import LayerCache
from foley.accel.layers import declare_cacheable_layers, find_cacheable_layers
from foley.core.hashing import hash_module
from foley.diffusion.context import RunContext, StepContext

ITEMS = 2


def _pixart() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    return model.eval(), {"encoder_hidden_states": torch.randn(ITEMS, 3, 12), "timestep": torch.tensor([5, 5])}


def _dit() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    return model.eval(), {"timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([1, 2])}


def _evaluate(model: nn.Module, inputs: dict[str, Any], caches: LayerCache, num_evaluations: int) -> list[torch.Tensor]:
    """The predictions of a run with another latent at each evaluation."""
    run = RunContext("ddim", num_evaluations, torch.arange(num_evaluations).flip(0), 1.0, 0.0, ITEMS)
    latents = torch.randn(num_evaluations, ITEMS, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    predictions = []
    with torch.no_grad(), caches.attach(model):
        caches.on_run_start(run)
        for evaluation in range(num_evaluations):
            context = StepContext(evaluation, run.timesteps[evaluation], run)
            caches.on_evaluation_start(context)
            predictions.append(model(latents[evaluation], **inputs).sample)
            caches.on_evaluation_end(context, predictions[-1])
        caches.on_run_end()
    return predictions


def test_stable_audio_offers_three_layers_a_block_each_with_its_norm() -> None:
    model = stable_audio_dit()
    layers = find_cacheable_layers(model)
    names = [f"transformer_blocks.{block}.{kind}" for block in (0, 1) for kind in ("attn1", "attn2", "ff")]
    assert [layer.name for layer in layers] == names
    assert [layer.kind for layer in layers] == ["attn1", "attn2", "ff"] * 2
    block = model.transformer_blocks[1]
    assert [layer.norm for layer in layers[3:]] == [block.norm1, block.norm2, block.norm3]


def test_the_blocks_of_a_unet_are_found_with_their_norms() -> None:
    unet = audioldm2().unet
    layers = find_cacheable_layers(unet)
    assert len(layers) == 3 * sum(
        name.rpartition(".")[0].endswith("transformer_blocks") for name, _ in unet.named_modules()
    )
    assert all(layer.norm is not None for layer in layers)


@pytest.mark.parametrize(("make", "kinds"), [(_pixart, ["attn1", "attn2", "ff"]), (_dit, ["attn1", "ff"])])
def test_norms_that_feed_more_than_one_layer_are_computed(make: Any, kinds: list[str]) -> None:
    layers = find_cacheable_layers(make()[0])
    assert [layer.kind for layer in layers] == kinds * 2
    assert all(layer.norm is None for layer in layers)


@pytest.mark.parametrize("make", [_pixart, _dit])
def test_other_transformers_are_cached_and_an_interval_of_one_changes_nothing(make: Any) -> None:
    model, inputs = make()
    signature = hash_module(model)
    plain, neutral, cached = (_evaluate(model, inputs, Fora(interval), 4) for interval in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(plain, neutral, strict=True))
    assert torch.equal(plain[2], cached[2])
    assert not torch.equal(plain[3], cached[3])
    assert hash_module(model) == signature
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_can_be_named_in_a_model_that_nobody_knows() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.mixer, self.mlp = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.mixer(self.before(x))
            return x + self.mlp(x)

    model = nn.Sequential(Block(), Block())
    with pytest.raises(ValueError, match="no cacheable layer"):
        find_cacheable_layers(model)
    for names in ({"*.attention": None}, {"*.mixer": "after"}):
        with pytest.raises(ValueError, match=r"no sub-module '(\*\.attention|0\.after)'"):
            declare_cacheable_layers(model, names)
    declare_cacheable_layers(model, {"*.mixer": "before", "*.mlp": None})
    layers = find_cacheable_layers(model)
    assert [(layer.name, layer.kind) for layer in layers[:2]] == [("0.mixer", "mixer"), ("0.mlp", "mlp")]
    assert [layer.norm for layer in layers] == [model[0].before, None, model[1].before, None]


def test_the_norm_of_a_reused_layer_is_not_computed() -> None:
    model, cache = stable_audio_dit(), Fora(2)
    calls: list[bool] = []
    block = model.transformer_blocks[0]
    run = RunContext("ddim", 2, torch.tensor([0.9, 0.1]), 1.0, 0.0, 1)
    text, duration = torch.randn(1, 3, 16), torch.randn(1, 1, 32)
    with torch.no_grad(), cache.attach(model):
        cache.on_run_start(run)
        for evaluation in range(2):
            cache.on_evaluation_start(StepContext(evaluation, run.timesteps[evaluation], run))
            hook = block.norm1.register_forward_hook(lambda _, args, out: calls.append(out is args[0]))
            prediction = model(torch.randn(1, 4, 8), torch.tensor([0.5]), text, duration).sample
            hook.remove()
            cache.on_evaluation_end(StepContext(evaluation, run.timesteps[evaluation], run), prediction)
    assert calls == [False, True]
