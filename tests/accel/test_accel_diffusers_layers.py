"""Which layers of the models of diffusers can be cached, with which norms, and that nothing else is skipped."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from tiny_pipelines import audioldm2, stable_audio_dit
from tiny_transformers import ITEMS, LATENTS, inputs_of, transformer
from torch import Tensor, nn

from foley.accel.caching import layer_cache
from foley.accel.caching.calibration import CalibrationRecorder, relative_change
from foley.accel.caching.fora import Fora
from foley.accel.caching.reuse import make_reuse
from foley.accel.cost import count_evaluation_macs
from foley.accel.layers import declare_cacheable_layers, find_cacheable_layers, output_tensors
from foley.core.hashing import hash_module
from foley.diffusion.context import RunContext, StepContext

EVALUATIONS = 4
QUICK = ("flux", "sd3", "wan")
TRANSFORMERS = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in LATENTS]
LAYERS = {
    "dit": ("transformer_blocks", "attn1 ff"),
    "pixart": ("transformer_blocks", "attn1 attn2 ff"),
    "cogvideox": ("transformer_blocks", "attn1 ff"),
    "wan": ("blocks", "attn1 attn2 ffn"),
    "hunyuan_dit": ("blocks", "attn1 attn2 ff"),
    "ltx": ("transformer_blocks", "attn1 attn2 ff"),
    "stable_audio_3": ("transformer_blocks", "self_attn cross_attn ff"),
    "ace_step": ("layers", "self_attn cross_attn mlp"),
    "longcat": ("blocks", "self_attn cross_attn ffn"),
}
OTHER_LAYERS = {
    "flux": [
        *(f"transformer_blocks.{block}.{kind}" for block in (0, 1) for kind in ("attn", "ff", "ff_context")),
        *(f"single_transformer_blocks.{block}.proj_out" for block in (0, 1)),
    ],
    "sd3": [
        *(f"transformer_blocks.0.{kind}" for kind in ("attn", "attn2", "ff", "ff_context")),
        *(f"transformer_blocks.1.{kind}" for kind in ("attn", "ff")),  # the last has no text to go on with
    ],
    "mochi": [
        *(f"transformer_blocks.0.{kind}" for kind in ("attn1", "ff", "ff_context")),
        *(f"transformer_blocks.1.{kind}" for kind in ("attn1", "ff")),
    ],
    "lumina2": [
        f"{block}.{kind}"
        for block in ("context_refiner.0", "noise_refiner.0", "layers.0", "layers.1")
        for kind in ("attn", "feed_forward")
    ],
    "hunyuan_video": [
        *(f"context_embedder.token_refiner.refiner_blocks.0.{kind}" for kind in ("attn", "ff")),
        *(f"transformer_blocks.0.{kind}" for kind in ("attn", "ff", "ff_context")),
        "single_transformer_blocks.0.proj_out",
    ],
}


def _evaluate(name: str, model: nn.Module, accelerator: Any, num_evaluations: int = EVALUATIONS) -> list[Tensor]:
    """The predictions of a run with another latent at each evaluation."""
    run = RunContext("ddim", num_evaluations, torch.arange(num_evaluations).flip(0), 1.0, 0.0, ITEMS)
    latents = torch.randn(num_evaluations, ITEMS, *LATENTS[name], generator=torch.Generator().manual_seed(0))
    inputs, predictions = inputs_of(name), []
    with torch.no_grad(), accelerator.attach(model):
        accelerator.on_run_start(run)
        for evaluation in range(num_evaluations):
            context = StepContext(evaluation, run.timesteps[evaluation], run)
            accelerator.on_evaluation_start(context)
            predictions.append(model(hidden_states=latents[evaluation], **inputs)[0])
            accelerator.on_evaluation_end(context, predictions[-1])
        accelerator.on_run_end()
    return predictions


def _executed(name: str, model: nn.Module) -> list[str]:
    """The layers in order of execution."""
    executed: list[str] = []
    for layer in find_cacheable_layers(model):
        layer.module.register_forward_pre_hook(lambda *_, name=layer.name: executed.append(name))
    with torch.no_grad():
        model(hidden_states=torch.randn(ITEMS, *LATENTS[name]), **inputs_of(name))
    return executed


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_layers_of_each_transformer_are_found_in_order_of_execution(name: str, caplog: Any) -> None:
    model = transformer(name)
    names = [layer.name for layer in find_cacheable_layers(model)]
    if name in LAYERS:
        blocks, kinds = LAYERS[name]
        assert names == [f"{blocks}.{block}.{kind}" for block in (0, 1) for kind in kinds.split()]
    else:
        assert names == OTHER_LAYERS[name]
    assert _executed(name, model) == names
    assert "attention is not found" not in caplog.text


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_reuse_skips_nothing_that_counts_and_an_interval_of_one_changes_nothing(name: str, monkeypatch: Any) -> None:
    """Reused layers give the same where their norms and parts run, as though nothing fed them alone."""
    model = transformer(name)
    signature = hash_module(model)
    plain, cached = (_evaluate(name, model, Fora(interval)) for interval in (1, 2))
    assert torch.equal(plain[2], cached[2])
    assert not torch.equal(plain[3], cached[3])
    with torch.no_grad():
        latent = torch.randn(EVALUATIONS, ITEMS, *LATENTS[name], generator=torch.Generator().manual_seed(0))[0]
        assert torch.equal(model(hidden_states=latent, **inputs_of(name))[0], plain[0])
    without = [replace(layer, norm=None, parts=()) for layer in find_cacheable_layers(model)]
    monkeypatch.setattr(layer_cache, "find_cacheable_layers", lambda _: without)
    assert all(torch.equal(*pair) for pair in zip(cached, _evaluate(name, model, Fora(2)), strict=True))
    assert hash_module(model) == signature
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["flux", "sd3", "cogvideox"])
def test_tuples_are_held_extrapolated_and_calibrated(name: str) -> None:
    model = transformer(name)
    for reuse in ("hold", "taylor"):
        assert all(prediction.isfinite().all() for prediction in _evaluate(name, model, Fora(2, reuse)))
    recorder = CalibrationRecorder()
    _evaluate(name, model, recorder)
    calibration = recorder.calibration()
    assert calibration.num_prompts == ITEMS
    assert (calibration.mean[:, 0, 1:] > 0).all()
    assert min(calibration.macs.layers.values()) > 0


def test_a_tuple_is_extrapolated_tensor_by_tensor_and_what_is_no_tensor_held() -> None:
    first, second = (torch.tensor([1.0]), torch.tensor([4.0]), None), (torch.tensor([3.0]), torch.tensor([2.0]), None)
    memories = [make_reuse("taylor")() for _ in range(3)]
    for evaluation, output in enumerate((first, second)):
        for memory, part in zip(memories, (output, output[0], output[1]), strict=True):
            memory.store(evaluation, part)
    both, *alone = (memory.recall(2) for memory in memories)
    assert isinstance(both, tuple)
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[1], alone[1])
    assert both[2] is None


class JointLayer(nn.Module):
    """Returns two tensors, of which the second is `weight` times as large."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.cacheable_kind, self.weight = "joint", weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.weight * x[:, :1]


class JointModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = JointLayer(10.0)

    def forward(self, x: Tensor) -> Tensor:
        latent, text = self.layer(x)
        return latent + text


def test_the_change_of_a_tuple_is_that_of_all_its_numbers() -> None:
    model, recorder = JointModel(), CalibrationRecorder()
    run = RunContext("ddim", 2, torch.tensor([1, 0]), 1.0, 0.0, batch_size=1)
    inputs = [torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]])]
    with recorder.attach(model):
        recorder.on_run_start(run)
        for evaluation, x in enumerate(inputs):
            context = StepContext(evaluation, run.timesteps[evaluation], run)
            recorder.on_evaluation_start(context)
            recorder.on_evaluation_end(context, model(x))
        recorder.on_run_end()
    whole = relative_change(*(torch.cat(output_tensors(model.layer(x)), dim=1) for x in reversed(inputs)))
    assert recorder.calibration().changes()["layer"][1] == whole.item() == 0.5


def test_the_parts_of_a_single_block_are_counted_as_its_layer_and_are_not_run_where_it_is_reused() -> None:
    model = transformer("flux")
    block = model.single_transformer_blocks[0]
    layer = next(layer for layer in find_cacheable_layers(model) if layer.name.startswith("single"))
    assert layer.feeders == (block.attn, block.proj_mlp, block.act_mlp)
    latent, inputs = torch.randn(ITEMS, *LATENTS["flux"]), inputs_of("flux")
    macs = count_evaluation_macs(model, lambda: model(hidden_states=latent, **inputs))
    tokens, width, hidden = ITEMS * (3 + 4), 16, 64
    attention = tokens * 3 * width * width + ITEMS * 2 * (3 + 4) ** 2 * width  # q, k and v; scores and their sum
    assert macs.layers[layer.name] == attention + tokens * width * hidden + tokens * (width + hidden) * width
    counted = {block.attn.to_q: 0, block.norm.linear: 0}  # within the part, and what makes the gate
    for module in counted:
        module.register_forward_hook(lambda module, *_: counted.update({module: counted[module] + 1}))
    _evaluate("flux", model, Fora(2))
    assert list(counted.values()) == [EVALUATIONS // 2, EVALUATIONS]


def test_stable_audio_offers_three_layers_a_block_each_with_its_norm() -> None:
    model = stable_audio_dit()
    layers = find_cacheable_layers(model)
    names = [f"transformer_blocks.{block}.{kind}" for block in (0, 1) for kind in ("attn1", "attn2", "ff")]
    assert [layer.name for layer in layers] == names
    assert [layer.kind for layer in layers] == ["attn1", "attn2", "ff"] * 2
    block = model.transformer_blocks[1]
    assert [layer.norm for layer in layers[3:]] == [block.norm1, block.norm2, block.norm3]


def test_the_blocks_of_a_unet_are_found_with_their_norms_and_the_middle_before_the_way_up() -> None:
    unet = audioldm2().unet
    layers = find_cacheable_layers(unet)
    assert len(layers) == 3 * sum(
        name.rpartition(".")[0].endswith("transformer_blocks") for name, _ in unet.named_modules()
    )
    assert all(layer.norm is not None for layer in layers)
    parts = list(dict.fromkeys(layer.name.partition(".")[0] for layer in layers))
    assert parts == ["down_blocks", "mid_block", "up_blocks"]


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_norms_that_feed_more_than_one_layer_are_computed(name: str) -> None:
    assert all(layer.norm is None for layer in find_cacheable_layers(transformer(name)))


class Named(nn.Module):
    """A model whose two blocks hold modules of these names."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict(deepcopy(children)) for _ in range(2))


def test_attention_that_is_not_found_is_said_once_with_the_block(caplog: Any) -> None:
    model = Named(mixer=nn.Linear(2, 2), mlp=nn.Linear(2, 2))
    for _ in range(2):
        assert [layer.name for layer in find_cacheable_layers(model)] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert caplog.text.count("attention is not found") == 1
    assert "blocks.0 (mixer, mlp), blocks.1 (mixer, mlp)" in caplog.text
    caplog.clear()
    find_cacheable_layers(Named(attn=nn.Linear(2, 2), other=nn.MultiheadAttention(2, 1), ff=nn.Linear(2, 2)))
    assert "blocks.0.other (MultiheadAttention)" in caplog.text


def test_where_nothing_is_found_the_lists_are_named() -> None:
    with pytest.raises(ValueError, match=r"Named has no cacheable layer.*blocks of ModuleDict \(mixer\)"):
        find_cacheable_layers(Named(mixer=nn.Linear(2, 2)))
    unet = UNet2DModel(8, block_out_channels=(8,), norm_num_groups=2, down_block_types=["DownBlock2D"],
                       up_block_types=["UpBlock2D"], add_attention=False)  # fmt: skip
    with pytest.raises(ValueError, match=r"down_blocks of DownBlock2D \(resnets"):
        find_cacheable_layers(unet)


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
