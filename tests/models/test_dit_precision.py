"""What mixed precision keeps in half precision: counted below autocast, which on the CPU is made to act as on CUDA."""

from contextlib import contextmanager

import pytest
import torch
from stirring_parts import stir
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from foley.models.dit.llama import LlamaTransformer
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLN, AdaLNSingle, AdaLNSola, TimeToken
from foley.nn.attention import dense_core, key_mask
from foley.nn.norm import LayerNorm, RMSNorm

CHANNELS, FRAMES, TOKENS, CONTEXT_DIM, WIDTH = 4, 20, 5, 6, 32
SLOW = [pytest.mark.slow]
VARIANTS = {
    "sola": {"modulation": AdaLNSola(rank=2, alpha=2)},
    "single": {"modulation": AdaLNSingle()},
    "full": {"modulation": AdaLN()},
    "time_token": {"modulation": TimeToken()},
    "learned_positions": {"modulation": AdaLNSola(rank=2, alpha=2), "rotary": False, "learned_positions": 64},
    "llama": {},
}


class CudaAutocast(TorchFunctionMode):
    """Norms under autocast as on CUDA: in float32, whatever they are given. The CPU's autocast leaves them alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm) and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def cuda_autocast():
    with torch.autocast("cpu", torch.bfloat16), CudaAutocast():
        yield


class FullPrecision(TorchDispatchMode):
    """Notes every operation that makes float32 numbers, as many as `least` or more, while `watching`."""

    def __init__(self, least):
        super().__init__()
        self.least, self.watching, self.found = least, False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if self.watching and isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.numel() >= self.least:
                self.found.append(f"{func} {tuple(x.shape)}")
        return result


def make_model(variant, **changes):
    torch.manual_seed(0)
    build = LlamaTransformer if variant == "llama" else DiffusionTransformer
    options = {"width": WIDTH, "depth": 2, "num_heads": 2, "context_dim": CONTEXT_DIM, **VARIANTS[variant], **changes}
    model = build(latent_channels=CHANNELS, **options).eval()
    stir(model, 0.2)
    return model


def make_inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    return {
        "noisy": torch.randn(batch, CHANNELS, FRAMES, generator=generator),
        "timestep": torch.tensor([3, 800])[:batch],
        "context": torch.randn(batch, TOKENS, CONTEXT_DIM, generator=generator),
        "context_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()[:batch],
        "frame_mask": (torch.arange(FRAMES) < 15).expand(batch, -1),
    }


def watch_blocks(model, mode):
    """Watch inside of the blocks alone."""
    for block in model.blocks():
        block.register_forward_pre_hook(lambda *_: setattr(mode, "watching", True))
        block.register_forward_hook(lambda *_: setattr(mode, "watching", False))


def watch_attention(model):
    """The types in which queries, keys, values and masks reach attention."""
    seen = set()

    def core(query, key, value, mask):
        seen.update(x.dtype for x in (query, key, value, mask) if x is not None)
        return dense_core(query, key, value, mask)

    for module in model.modules():
        if hasattr(module, "core"):
            module.core = core
    return seen


def test_the_emulation_shows_what_cuda_does_to_a_plain_norm():
    with cuda_autocast():
        assert nn.LayerNorm(8)(torch.randn(2, 8).bfloat16()).dtype == torch.float32
        assert LayerNorm(8)(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
        assert RMSNorm(8)(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


# LLaMA's norm is one kernel on CUDA, and on the CPU several operations, of which some are in float32.
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "llama"])
def test_nothing_of_the_size_of_the_stream_is_float32_inside_a_block(variant):
    model, inputs = make_model(variant), make_inputs()
    mode = FullPrecision(least=2 * FRAMES * WIDTH // 2)  # half of the stream: a head of queries would show
    watch_blocks(model, mode)
    seen = watch_attention(model)
    with torch.no_grad(), cuda_autocast(), mode:
        prediction = model(**inputs)
    assert mode.found == []
    assert seen == {torch.bfloat16}
    assert prediction.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_context_is_embedded_in_the_type_of_its_weights(variant):
    model, context = make_model(variant), make_inputs()["context"]
    exact = model._embed_context(context)
    with cuda_autocast():
        assert torch.equal(model._embed_context(context), exact)
    halved = model.bfloat16()._embed_context(context)
    assert halved.dtype == torch.bfloat16


def test_a_single_float32_norm_would_be_found():
    model, inputs = make_model("sola"), make_inputs()
    model.mid_block.self_attention.attention.norm_q = nn.LayerNorm(WIDTH // 2)
    mode = FullPrecision(least=2 * FRAMES * WIDTH // 2)
    watch_blocks(model, mode)
    seen = watch_attention(model)
    with torch.no_grad(), cuda_autocast(), mode:
        model(**inputs)
    assert any("layer_norm" in line for line in mode.found)
    assert torch.float32 in seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_and_hoisting_keep_the_stream_in_half_precision_too(variant):
    model, inputs = make_model(variant), make_inputs()
    seen = watch_attention(model)
    streams = set()
    for block in model.blocks():
        block.register_forward_hook(lambda module, args, output: streams.update({args[0].dtype, output.dtype}))
    with cuda_autocast():
        loss = model(**inputs).square().mean()
        conditions = {name: inputs[name] for name in ("context", "context_mask", "frame_mask")}
        run = model.prepare(torch.tensor([800, 3]), FRAMES, **conditions)
        model(inputs["noisy"], torch.tensor([3, 3]), run=run)
    assert streams == seen == {torch.bfloat16}
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_output_projection_is_exact_under_autocast():
    layer = make_model("sola").output_layer
    tokens, time = torch.randn(2, FRAMES, WIDTH), torch.randn(2, WIDTH)
    expected = layer(tokens, layer.modulate(time))
    with cuda_autocast():
        modulation = layer.modulate(time)
        mixed = layer(tokens, modulation)
    torch.testing.assert_close(mixed, expected, atol=0.02, rtol=0.02)  # the modulation alone is rounded
    exact = layer(tokens, type(modulation)(*(part.float() for part in vars(modulation).values())))
    assert torch.equal(mixed, exact)


def test_a_mask_that_leaves_nothing_out_is_none_and_any_other_is_aligned_and_as_exact_as_a_boolean_one():
    assert key_mask(None, torch.float32) is None
    assert key_mask(torch.ones(2, 5).bool(), torch.float32) is None
    valid = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    mask = key_mask(valid, torch.bfloat16)
    assert (mask.shape, mask.dtype) == ((2, 1, 1, 5), torch.bfloat16)
    assert (mask.stride(0) % 8, mask.stride(-1)) == (0, 1)
    assert torch.equal(mask[:, 0, 0] == 0, valid)
    query, key, value = torch.randn(3, 2, 2, 7, 16)
    boolean = F.scaled_dot_product_attention(query, key[..., :5, :], value[..., :5, :], valid[:, None, None])
    added = dense_core(query, key[..., :5, :], value[..., :5, :], key_mask(valid, torch.float32))
    assert torch.equal(added, boolean)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "checkpointing"),
    [
        # Tracing takes seconds: the published one always, all others among the slow tests.
        pytest.param(variant, again, marks=[] if (variant, again) in {("sola", False), ("full", True)} else SLOW)
        for variant in VARIANTS
        for again in (False, True)
    ],
)
def test_the_whole_forward_is_one_graph(variant, checkpointing):
    model, inputs = make_model(variant, gradient_checkpointing=checkpointing), make_inputs()
    expected = model(**inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    output = compiled(**inputs)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    output.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(**inputs), model(**inputs))
    torch.compiler.reset()


def test_a_prepared_evaluation_is_one_graph_for_all_timesteps_and_runs():
    model, inputs = make_model("sola"), make_inputs()
    conditions = {name: inputs[name] for name in ("context", "context_mask", "frame_mask")}
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for seed in range(2):
            conditions["context"] = torch.randn(2, TOKENS, CONTEXT_DIM, generator=torch.Generator().manual_seed(seed))
            timesteps = torch.tensor([999, 800, 3])
            run = model.prepare(timesteps, FRAMES, **conditions)
            for timestep in timesteps:
                expected = model(inputs["noisy"], timestep.expand(2), run=run)
                hoisted = compiled(inputs["noisy"], timestep.expand(2), run=run)
                torch.testing.assert_close(hoisted, expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
    assert len(graphs) == 1
