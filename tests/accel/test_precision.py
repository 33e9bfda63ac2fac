"""Half precision and compiled blocks: the same model, cheaper."""

import pytest
import torch
import torch._dynamo.config
from stirring_parts import stir
from torch import nn
from torch._dynamo.utils import counters

from foley.accel.attention.local_global import LocalGlobal
from foley.accel.caching.calibration import CalibrationRecorder
from foley.accel.caching.fora import Fora
from foley.accel.combined import Combined
from foley.accel.precision import choose_precision, compile_blocks, computing_in, set_precision
from foley.core.hashing import hash_module
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola

CHANNELS, FRAMES, CONTEXT_DIM, DEPTH = 4, 12, 6, 12


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    model = DiffusionTransformer(CHANNELS, 16, DEPTH, 2, CONTEXT_DIM, AdaLNSola(rank=2, alpha=2))
    stir(model)
    return model.eval()


def generate(denoiser, accelerator=None, num_steps=8):
    generator = torch.Generator().manual_seed(1)
    text = [Conditioning(torch.randn(1, 3, CONTEXT_DIM, generator=generator), torch.ones(1, 3).bool()) for _ in "ab"]
    guidance, solver = ClassifierFreeGuidance(3.0), Solver("ddim", num_steps)
    return generate_latents(denoiser, DiffusionProcess(), *text, [0], FRAMES, guidance, solver, accelerator)


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend():
    """Too many graphs of one function are an error instead of a silent return to eager."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield Backend()
    torch.compiler.reset()


def test_half_precision_is_close_and_counts_as_the_same_model(denoiser) -> None:
    exact, digest = generate(denoiser), hash_module(denoiser)
    set_precision(denoiser, "bf16")
    rounded = generate(denoiser)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
    assert hash_module(denoiser) == digest
    with torch.no_grad():
        denoiser.input_projection.weight.mul_(2)
    assert hash_module(denoiser) != digest


def test_an_unknown_precision_is_refused(denoiser) -> None:
    with pytest.raises(ValueError, match=r"float32, bf16, fp16, got 'int4'"):
        set_precision(denoiser, "int4")


def test_compiled_blocks_change_nothing_and_share_their_graphs(denoiser, backend) -> None:
    exact = generate(denoiser)
    compile_blocks(denoiser, backend=backend)
    torch.testing.assert_close(generate(denoiser), exact, atol=1e-5, rtol=1e-5)
    assert backend.graphs <= 2  # with and without a long skip
    generate(denoiser, num_steps=5)
    assert backend.graphs <= 2


ACCELERATORS = {
    "cache": lambda: Fora(3),
    "extrapolating cache": lambda: Fora(3, "taylor"),
    "recorder": CalibrationRecorder,
    "sparse attention": lambda: LocalGlobal(window_frames=3, ratio=0.2),
    "both": lambda: Combined([Fora(3), LocalGlobal(window_frames=3, ratio=0.2)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCELERATORS)
def test_accelerators_on_compiled_blocks_cost_graphs_neither_for_each_block_nor_for_each_step(
    denoiser, backend, name
) -> None:
    make = ACCELERATORS[name]
    exact = generate(denoiser, make(), num_steps=6)
    compile_blocks(denoiser, backend=backend)
    counters.clear()
    torch.testing.assert_close(generate(denoiser, make(), num_steps=6), exact, atol=1e-5, rtol=1e-5)
    assert backend.graphs == (2 if name == "sparse attention" else 3)  # of blocks, or of layers
    generate(denoiser, make(), num_steps=9)
    first = backend.graphs
    assert first <= 3
    generate(denoiser)
    assert backend.graphs == first + 2  # whole blocks, with and without a long skip
    generate(denoiser, make(), num_steps=6)
    assert backend.graphs == first + 2
    assert not counters["graph_break"]


def test_a_denoiser_without_blocks_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="Linear does not say which blocks"):
        compile_blocks(nn.Linear(2, 2))


class Cuda:
    """Says what a machine with a GPU says, and notes the settings that are in force where work is done."""

    def __init__(self, monkeypatch, bf16=True) -> None:
        self.products = "highest"
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: setattr(self, "products", value))
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: self.products)


@pytest.mark.parametrize(("device", "bf16", "chosen"), [("cuda", True, "bf16"), ("cuda", False, "float32")])
def test_auto_is_bf16_where_cuda_computes_in_it(monkeypatch, device, bf16, chosen) -> None:
    Cuda(monkeypatch, bf16)
    assert choose_precision("auto", torch.device(device)) == chosen


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_auto_is_float32_on_other_devices_and_a_name_is_itself(monkeypatch, device) -> None:
    assert choose_precision("auto", torch.device(device)) == "float32"
    assert choose_precision("fp16", torch.device(device)) == "fp16"


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of auto, float32, bf16, fp16, got 'half'"):
        choose_precision("half", torch.device("cpu"))


@pytest.mark.parametrize(("precision", "products", "tf32"), [("float32", "highest", False), ("bf16", "high", True)])
def test_float32_is_exact_on_cuda_and_nothing_else_is_and_all_is_as_before_afterwards(
    monkeypatch, precision, products, tf32
) -> None:
    cuda, before = Cuda(monkeypatch), torch.backends.cudnn.allow_tf32
    with computing_in(precision, torch.device("cuda")):
        assert cuda.products == products
        assert torch.backends.cudnn.allow_tf32 is tf32
    assert cuda.products == "highest"
    assert torch.backends.cudnn.allow_tf32 is before


def test_autocast_is_of_the_precision_and_off_in_float32(monkeypatch) -> None:
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    for precision, autocast, dtype in [
        ("bf16", True, torch.bfloat16),
        ("bf16", False, torch.float32),
        ("float32", True, torch.float32),
    ]:
        with computing_in(precision, torch.device("cpu"), autocast):
            assert linear(x).dtype == dtype
