"""Linear layers in 8 bits: which, how exactly, and that all else about the model stays."""

import copy
import json
import sys
import warnings
from functools import partial

import pytest
import torch
from stirring_parts import stir
from tiny_t5 import save_t5
from torch import nn

from foley.accel import quantisation
from foley.accel.caching.fora import Fora
from foley.accel.cost import count_call_macs
from foley.accel.precision import compile_blocks
from foley.accel.quantisation import (
    Int8Linear,
    check_kind,
    int8_product,
    quantisable_layers,
    quantise,
    quantise_layers,
    quantise_pipeline,
    weight_bytes,
)
from foley.core.hashing import hash_module
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.generation.text_to_audio import TextToAudio
from foley.models.dit.model import DiffusionTransformer
from foley.models.text.frozen_t5 import FrozenT5Conditioner
from foley.nn.adaln import AdaLNSola

CHANNELS, WIDTH, FRAMES, CONTEXT_DIM = 4, 32, 12, 16


def build(**options):
    torch.manual_seed(0)
    model = DiffusionTransformer(CHANNELS, WIDTH, 2, 2, CONTEXT_DIM, AdaLNSola(rank=16, alpha=16), **options)
    stir(model)
    return model.eval()


@pytest.fixture
def denoiser():
    return build()


def generate(denoiser, accelerator=None, num_clips=1):
    generator = torch.Generator().manual_seed(1)
    text, empty = (torch.randn(1, 3, CONTEXT_DIM, generator=generator) for _ in "ab")
    texts = [Conditioning(rows.expand(num_clips, -1, -1), torch.ones(num_clips, 3).bool()) for rows in (text, empty)]
    seeds, guidance = list(range(num_clips)), ClassifierFreeGuidance(3.0)
    process, solver = DiffusionProcess(), Solver("ddim", 4)
    return generate_latents(denoiser, process, *texts, seeds, FRAMES, guidance, solver, accelerator)


def relative_error(value, exact):
    return ((value - exact).norm() / exact.norm()).item()


def int8_layer(bias=True):
    torch.manual_seed(1)
    layers = nn.Sequential(nn.ModuleList([nn.Linear(64, 48, bias)]))
    exact = copy.deepcopy(layers[0][0])
    quantise_layers(layers, "int8_dynamic")
    return layers[0][0], exact


def test_the_layers_of_blocks_are_quantised_and_what_time_and_embeddings_need_is_not(denoiser) -> None:
    chosen = set(quantisable_layers(denoiser))
    kinds = {name.split(".", 2)[-1] for name in chosen if name.startswith("in_blocks")}
    attention = {f"{of}_attention.attention.{part}" for of in ("self", "cross") for part in ("to_q", "to_k", "to_v")}
    outputs = {"self_attention.attention.output", "cross_attention.attention.output"}
    assert kinds == attention | outputs | {"feed_forward.layer.input", "feed_forward.layer.output"}
    assert "out_blocks.0.skip.linear" in chosen
    assert {name.partition(".")[0] for name in chosen} == {"in_blocks", "mid_block", "out_blocks"}
    assert not [name for name in chosen if "modulation" in name]


@pytest.mark.parametrize(
    "name", ["transformer_blocks.0.norm1.linear", "blocks.0.time_emb_proj", "block.0.layer.1.DenseReluDense.wo"]
)
def test_what_the_time_makes_and_the_outliers_of_t5_stay(name) -> None:
    assert quantisation._KEPT.fullmatch(name)
    assert not quantisation._KEPT.fullmatch("block.0.layer.0.SelfAttention.q")


def test_layers_of_odd_widths_and_subclasses_stay() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.ModuleList([nn.Linear(64, 65), nn.Linear(24, 32), Special(32, 32), nn.Linear(32, 32)]))
    assert list(quantisable_layers(model)) == ["0.3"]


@pytest.mark.parametrize("kind", ["int8_dynamic", "int8_weight"])
def test_a_quantised_denoiser_is_close_smaller_and_counts_as_the_same_model(denoiser, kind) -> None:
    exact, digest, size = generate(denoiser), hash_module(denoiser), weight_bytes(denoiser)
    names = quantise(denoiser, kind)
    rounded = generate(denoiser)
    assert rounded.dtype == torch.float32
    assert 0 < relative_error(rounded, exact) < 0.1
    assert hash_module(denoiser) == digest
    values = sum(denoiser.get_submodule(name).weight.numel() for name in names)
    scales = 4 * sum(denoiser.get_submodule(name).out_features for name in names)
    handles = 8 * len(names) if kind == "int8_dynamic" else 0
    zero_points = scales // 4 if kind == "int8_weight" else 0
    assert weight_bytes(denoiser) == size - 3 * values + scales + handles + zero_points
    assert relative_error(generate(copy.deepcopy(denoiser)), rounded) == 0


@pytest.mark.parametrize("kind", ["int8_dynamic", "int8_weight"])
def test_an_item_does_not_depend_on_the_rest_of_its_batch(denoiser, kind) -> None:
    quantise(denoiser, kind)
    torch.testing.assert_close(generate(denoiser, num_clips=3)[:1], generate(denoiser), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8_dynamic", "int8_weight"])
def test_layers_are_reused_and_counted_as_before(denoiser, kind) -> None:
    text = torch.randn(1, 3, CONTEXT_DIM)
    call = (torch.randn(1, CHANNELS, FRAMES), torch.tensor([10]), text)
    exact, macs = generate(denoiser, Fora(2)), count_call_macs(denoiser, call, {})
    quantise(denoiser, kind)
    assert relative_error(generate(denoiser, Fora(2)), exact) < 0.1
    assert count_call_macs(denoiser, call, {}) == macs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8_dynamic", "int8_weight"])
def test_quantised_blocks_compile_to_the_graphs_of_exact_ones(denoiser, kind) -> None:
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    quantise(denoiser, kind)
    exact = generate(denoiser)
    torch.compiler.reset()
    compile_blocks(denoiser, backend=backend, fullgraph=True)
    torch.testing.assert_close(generate(denoiser), exact, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2  # with and without a long skip
    torch.compiler.reset()


def test_adapters_around_a_quantised_layer_stay_exact(denoiser) -> None:
    from foley.models.lora import AdaptedDenoiser

    adapted = AdaptedDenoiser(denoiser, rank=16)
    names = quantise(adapted, "int8_dynamic")
    assert names
    assert all(name.endswith(("base_layer", "skip.linear")) for name in names)


def test_int8_is_exact_where_all_numbers_are_whole() -> None:
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-20, 20, (16, 16)))
        layer.weight[:, 0] = 127 if not quantisation._adds_in_16_bits(torch.device("cpu")) else 63.5
        x = torch.randint(-100, 100, (2, 3, 16)).float()
        x[..., 1] = 127
    holder = nn.Sequential(nn.ModuleList([copy.deepcopy(layer)]))
    quantise_layers(holder, "int8_dynamic")
    rounded = holder[0][0]
    torch.testing.assert_close(rounded(x), x @ rounded.weight.T + layer.bias, atol=1e-2, rtol=1e-5)


def test_large_numbers_of_one_sign_do_not_overflow() -> None:
    holder = nn.Sequential(nn.ModuleList([nn.Linear(64, 16, bias=False)]))
    nn.init.ones_(holder[0][0].weight)
    quantise_layers(holder, "int8_dynamic")
    # Pairs of 255 * 127 would overflow 16 bits.
    torch.testing.assert_close(holder[0][0](torch.ones(1, 64)), torch.full((1, 16), 64.0), atol=0.6, rtol=0)


def test_both_products_of_int8_are_the_same() -> None:
    layer, _ = int8_layer()
    x = torch.randn(2, 5, 64)
    packed = layer(x)
    layer.rounded, layer.handle = layer._packed.unpacked(), None  # as on CUDA
    torch.testing.assert_close(layer(x), packed, atol=1e-5, rtol=1e-5)
    assert int8_product(torch.ones(1, 64), layer.rounded).shape == (1, 48)  # fewer rows than cuBLAS takes


def test_a_layer_takes_zeros_and_half_precision_and_says_its_weight() -> None:
    layer, exact = int8_layer(bias=False)
    assert torch.equal(layer(torch.zeros(3, 64)), torch.zeros(3, 48))
    assert layer(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
    assert relative_error(layer.weight, exact.weight) < 0.02


@pytest.mark.parametrize(
    ("kind", "device", "message"),
    [
        ("int4", "cpu", "int8_dynamic, int8_weight, fp8, got 'int4'"),
        ("fp8", "cpu", r"fp8 needs CUDA of capability 8\.9"),
        ("fp8", "cuda", r"fp8 needs CUDA of capability 8\.9"),
        ("int8_weight", "mps", "int8_weight on mps"),
    ],
)
def test_what_a_device_lacks_is_refused(monkeypatch, kind, device, message) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match=message):
        check_kind(kind, torch.device(device))


def test_fp8_is_taken_where_there_is_float8(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_kind("fp8", torch.device("cuda"))
    config = quantisation._config("fp8", torch.device("cuda"))
    assert {type(granularity).__name__ for granularity in config.granularity} == {"PerRow"}
    assert not config.set_inductor_config


def test_fp8_wants_bfloat16(denoiser, monkeypatch) -> None:
    monkeypatch.setattr(quantisation, "check_kind", lambda *_: None)
    with pytest.raises(ValueError, match="precision=bf16"):
        quantise(denoiser, "fp8")


def test_int8_dynamic_wants_fbgemm(monkeypatch) -> None:
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    with pytest.raises(ValueError, match="no FBGEMM"):
        check_kind("int8_dynamic", torch.device("cpu"))


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no linear layer in its blocks"):
        quantise(nn.Linear(16, 16), "int8_weight")


def test_without_torchao_the_extra_is_named(denoiser, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"foley\[quantise\]"):
        quantise(denoiser, "int8_weight")


def test_the_text_encoders_of_a_pipeline_are_quantised_too() -> None:
    parts = {
        name: nn.Sequential(nn.ModuleList([nn.Linear(16, 16)])) for name in ("transformer", "text_encoder_2", "vae")
    }

    class Pipeline:
        components = {**parts, "scheduler": None, "text_encoder": None}

    quantise_pipeline(Pipeline(), parts["transformer"], "int8_dynamic")
    assert {name: type(part[0][0]) for name, part in parts.items()} == {
        "transformer": Int8Linear,
        "text_encoder_2": Int8Linear,
        "vae": nn.Linear,
    }


def test_dynamic_quantisation_of_torch_works_on_every_linear_layer() -> None:
    denoiser = build(guidance_embedding=True)
    inputs = torch.randn(2, CHANNELS, FRAMES), torch.tensor([10, 10]), torch.randn(2, 3, CONTEXT_DIM)
    scale = torch.tensor([3.0])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch announces that torchao takes its place
        exact = denoiser(*inputs, guidance_scale=scale)
        rounded = torch.ao.quantization.quantize_dynamic(denoiser, {nn.Linear})
        plain = rounded(*inputs, guidance_scale=scale)
        run = rounded.prepare(torch.tensor([10, 5]), FRAMES, inputs[2], guidance_scale=scale)
        assert 0 < relative_error(plain, exact) < 0.1
        assert relative_error(rounded(inputs[0], inputs[1], run=run), exact) < 0.1
    assert not list(rounded.time_embedding.mlp.parameters())


# ---------------------------------------------------------------- whole systems


def test_a_frozen_encoder_is_quantised_apart_from_those_that_share_it(tmp_path) -> None:
    text = FrozenT5Conditioner(str(save_t5(tmp_path)), dim=16)
    other, exact, identity = copy.deepcopy(text), text(["rain"]).embeddings, text.cache.identity
    text.change_weights("int8_dynamic", partial(quantise_layers, kind="int8_dynamic"))
    assert 0 < relative_error(text(["rain"]).embeddings, exact) < 0.1
    assert torch.equal(other(["rain"]).embeddings, exact)
    assert text.cache.identity != identity  # a store of embeddings on disk is another one
    kept = [name for name, layer in text.encoder.named_modules() if type(layer) is nn.Linear]
    assert kept
    assert all(name.endswith(".wo") for name in kept)


def test_a_system_generates_records_and_is_not_saved_quantised(tmp_path) -> None:
    generator = TextToAudio.load()
    exact = generator.generate(["rain"], 0.2, num_steps=2)
    generator.optimise(quantised="int8_dynamic")
    result = generator.generate(["rain"], 0.2, num_steps=2)
    assert 0 < relative_error(result.audio, exact.audio) < 1
    assert result.settings["quantise"] == "int8_dynamic"
    assert result.settings["model_hash"] == exact.settings["model_hash"]
    result.write(tmp_path)
    record = json.loads(next(tmp_path.glob("[0-9]*.json")).read_text(encoding="utf-8"))
    assert record["settings"]["quantise"] == "int8_dynamic"
    with pytest.raises(ValueError, match="save: the denoiser's weights are rounded to int8_dynamic"):
        generator.save(tmp_path / "system")
    with pytest.raises(ValueError, match=r"quantise=int8_weight: .* rounded to int8_dynamic"):
        generator.optimise(quantised="int8_weight")
    generator.optimise(quantised="int8_dynamic")  # once more changes nothing
    assert any(isinstance(layer, Int8Linear) for layer in generator.text.modules())
