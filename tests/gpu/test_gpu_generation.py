"""Generation and codecs on a GPU against the CPU, none waiting for the other, through the kernels that are meant."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from commands import compose_command
from gpu_parts import DEVICE, FULL, ON_CUDA, random_weights, relative_difference
from hydra.utils import instantiate
from small_system import CONFIGS, STEPS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from foley.accel import Fora
from foley.core.devices import float32_products
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import SOLVERS, Solver
from foley.generation.text_to_audio import TextToAudio
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola
from foley.system.system import build_system

CHANNELS, FRAMES, TOKENS, TEXT_DIM = 4, 24, 6, 16
CODECS = ["tiny", "tiny_waveform", "mel_16khz_tiny", *(["waveform_24khz"] if FULL else [])]
ATTENTION = "scaled_dot_product"


@pytest.fixture
def denoiser() -> nn.Module:
    """Of two blocks with long skips; its heads are as wide as XL's, 72."""
    torch.manual_seed(0)
    shape = {"latent_channels": CHANNELS, "width": 144, "depth": 2, "num_heads": 2, "context_dim": TEXT_DIM}
    return random_weights(DiffusionTransformer(**shape, modulation=AdaLNSola(rank=2, alpha=2)))


def text(rows: int, seed: int, padded: int = 0) -> Conditioning:
    """Random embeddings `[B, S, Dc]`, of which the last `padded` tokens are none."""
    embeddings = torch.randn(rows, TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    return Conditioning(embeddings, (torch.arange(TOKENS) < TOKENS - padded).expand(rows, -1))


def on(device: torch.device, conditioning: Conditioning) -> Conditioning:
    return replace(conditioning, **{name: value.to(device) for name, value in vars(conditioning).items()})


@contextmanager
def without_waiting(denoiser: nn.Module) -> Iterator[None]:
    """From the first evaluation on, whatever waits for the device is an error."""
    if not ON_CUDA:
        yield
        return
    hook = denoiser.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    try:
        yield
    finally:
        hook.remove()
        torch.cuda.set_sync_debug_mode("default")


def generated(denoiser: nn.Module, solver: str, device: torch.device) -> Tensor:
    process = DiffusionProcess("flow" if solver.endswith("_flow") else "v")
    positive, negative = on(device, text(2, seed=1, padded=2)), on(device, text(1, seed=2))
    guidance, steps = ClassifierFreeGuidance(3.0), Solver(solver, 6)
    with without_waiting(denoiser):
        return generate_latents(denoiser, process, positive, negative, [7, 8], FRAMES, guidance, steps, device=device)


@pytest.mark.gpu(proof=8)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_seed_means_the_same_and_nothing_waits(denoiser: nn.Module, solver: str, record_property) -> None:
    """Each solver generates on the device what it does on a CPU, and no evaluation waits for the device."""
    expected = generated(denoiser, solver, torch.device("cpu"))
    with float32_products(tf32=False):
        result = generated(denoiser.to(DEVICE), solver, DEVICE)
    difference = relative_difference(result, expected)
    record_property("difference", f"{difference:.1e}")
    assert difference < 1e-2  # another seed's latent is 1.4 away


@pytest.mark.gpu(proof=9)
@pytest.mark.parametrize("padded", [0, 2], ids=["whole", "padded"])
def test_attention_reaches_a_fused_kernel(denoiser: nn.Module, padded: int, record_property) -> None:
    """In bfloat16 self- and cross-attention run in fused kernels, with and without padded text."""
    denoiser = denoiser.to(DEVICE, torch.bfloat16)
    noisy, conditioning = torch.randn(2, CHANNELS, FRAMES, device=DEVICE), on(DEVICE, text(2, 1, padded))
    mask = conditioning.mask if padded else None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_CUDA else [])]
    with profile(activities=activities) as profiler:
        denoiser(noisy, torch.full((2,), 500, device=DEVICE), conditioning.context.bfloat16(), mask)
    names = {event.key for event in profiler.key_averages()}
    operations = {name for name in names if name.startswith(f"aten::_{ATTENTION}")}
    kernels = {name for name in names if any(part in name.lower() for part in ("flash", "fmha", "sdpa"))}
    record_property("operations", ", ".join(sorted(name.removeprefix(f"aten::_{ATTENTION}_") for name in operations)))
    record_property("kernels", ", ".join(sorted(name[:60] for name in kernels - operations)))
    assert operations
    assert not any("math" in name for name in operations), operations


@pytest.mark.gpu(proof=10)
@pytest.mark.parametrize("hoisted", [False, True], ids=["plain", "hoisted"])
def test_the_whole_denoiser_compiles_to_one_graph(denoiser: nn.Module, hoisted: bool, record_property) -> None:
    """Compiled whole, as one graph, the denoiser computes what it does eagerly, also with a run's conditions."""
    denoiser, conditioning = denoiser.to(DEVICE), on(DEVICE, text(2, 1, padded=2))
    noisy, timesteps = torch.randn(2, CHANNELS, FRAMES, device=DEVICE), torch.tensor([800, 400], device=DEVICE)
    given = (conditioning.context, conditioning.mask)
    run = {"run": denoiser.prepare(timesteps, FRAMES, *given)} if hoisted else {}
    compiled = torch.compile(denoiser, fullgraph=True, dynamic=False, backend="inductor" if ON_CUDA else "eager")
    differences = []
    for timestep in timesteps:
        inputs = noisy, timestep.expand(2), *(() if hoisted else given)
        with torch.no_grad(), float32_products(tf32=False):
            differences.append(relative_difference(compiled(*inputs, **run), denoiser(*inputs, **run)))
    record_property("difference", f"{max(differences):.1e}")
    assert max(differences) < 1e-4


@pytest.mark.gpu(proof=10)
@pytest.mark.skipif(not ON_CUDA, reason="graphs of kernels are CUDA's alone")
def test_one_cuda_graph_serves_all_timesteps(denoiser: nn.Module, record_property) -> None:
    """The denoiser with its run's conditions is one CUDA graph, which is replayed at every timestep."""
    denoiser, conditioning = denoiser.to(DEVICE), on(DEVICE, text(2, 1, padded=2))
    noisy, timesteps = torch.randn(2, CHANNELS, FRAMES, device=DEVICE), torch.tensor([800, 400], device=DEVICE)
    run = denoiser.prepare(timesteps, FRAMES, conditioning.context, conditioning.mask)
    timestep, graph = timesteps[:1].expand(2).clone(), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            denoiser(noisy, timestep, run=run)
        stream.synchronize()
        with torch.cuda.graph(graph):
            output = denoiser(noisy, timestep, run=run)
        for value in timesteps:
            timestep.copy_(value.expand(2))
            graph.replay()
            difference = relative_difference(output, denoiser(noisy, timestep, run=run))
            assert difference < 1e-5
    record_property("difference", f"{difference:.1e}")


@pytest.mark.gpu(proof=10)
@pytest.mark.skipif(not ON_CUDA, reason="graphs of kernels are CUDA's alone")
@pytest.mark.parametrize("interval", [None, 2], ids=["uncached", "cached"])
def test_a_replayed_generation_is_the_eager_one(interval: int | None, record_property) -> None:
    """A generation whose evaluations are replayed as CUDA graphs is the eager one, with and without caching."""
    accelerator = None if interval is None else Fora(interval=interval)
    system, audio = build_system(CONFIGS), []
    for name in ("denoiser", "codec"):
        random_weights(system.modules[name])
    for graphs in (False, True):
        pipeline = TextToAudio(system, DEVICE)
        pipeline.optimise(precision="float32", cuda_graphs=graphs)
        audio.append(pipeline.generate(["a dog barks"], accelerator=accelerator, **STEPS).audio)
    difference = relative_difference(*audio)
    record_property("difference", f"{difference:.1e}")
    assert difference < 1e-4


@pytest.mark.gpu(proof=11)
@pytest.mark.parametrize("name", CODECS)
def test_codecs_agree_with_the_cpu(name: str, record_property) -> None:
    """A codec encodes and decodes as on a CPU: closely in float32, within the bits of TF32 with it."""
    torch.manual_seed(0)
    codec = instantiate(compose_command("bench/sampling", f"codec={name}").codec).eval()
    audio = 0.1 * torch.randn(1, 1, codec.sample_rate_hz // 2, generator=torch.Generator().manual_seed(1))
    differences = {}
    with torch.no_grad():
        latent = codec.encode(audio)
        expected = latent, codec.decode(latent)
        codec = codec.to(DEVICE)
        for precision, label in (("highest", "float32"), ("high", "TF32")):
            with float32_products(tf32=precision == "high"):
                result = codec.encode(audio.to(DEVICE)), codec.decode(latent.to(DEVICE))
            differences[label] = max(map(relative_difference, result, expected))
            record_property(label, f"{differences[label]:.1e}")
    assert differences["float32"] < 1e-3
    assert differences["TF32"] < 5e-2
