"""A guided evaluation as one graph: how many there are, and that they change nothing."""

from functools import partial
from typing import Any

import pytest
import torch
from small_system import CONFIGS, STEPS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from foley.accel.caching.fora import Fora
from foley.accel.combined import Combined, NoAcceleration
from foley.accel.compiling import check_choice, compile_evaluation, leaves_evaluations_whole
from foley.accel.precision import compile_blocks
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, KnownLatent
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.generation.text_to_audio import TextToAudio
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola
from foley.system.system import build_system

CHANNELS, FRAMES, CONTEXT_DIM = 4, 12, 6


@pytest.fixture
def denoiser() -> DiffusionTransformer:
    torch.manual_seed(0)
    model = DiffusionTransformer(CHANNELS, 16, 2, 2, CONTEXT_DIM, AdaLNSola(rank=2, alpha=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _generate(denoiser: DiffusionTransformer, compiler: Any, num_steps: int = 4, **changed: Any) -> Tensor:
    random = torch.Generator().manual_seed(1)
    text = [Conditioning(torch.randn(1, 3, CONTEXT_DIM, generator=random), torch.ones(1, 3).bool()) for _ in "ab"]
    guidance, solver = ClassifierFreeGuidance(3.0), Solver("ddim", num_steps)
    fixed = (DiffusionProcess(), *text, [0], FRAMES, guidance, solver)
    return generate_latents(denoiser, *fixed, compiler=compiler, **changed)


@pytest.mark.slow
def test_an_evaluation_is_one_graph_and_steps_and_runs_share_it(denoiser: DiffusionTransformer) -> None:
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    compiler = partial(compile_evaluation, backend=backend)
    exact = _generate(denoiser, None)
    torch.testing.assert_close(_generate(denoiser, compiler), exact, atol=1e-5, rtol=1e-5)
    assert backend.frame_count == 1
    torch.testing.assert_close(_generate(denoiser, compiler), exact, atol=1e-5, rtol=1e-5)
    assert backend.frame_count == 1  # the next run
    torch.compiler.reset()


@pytest.mark.slow
def test_other_numbers_of_steps_share_a_second_graph_and_edits_have_their_own(denoiser: DiffusionTransformer) -> None:
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    compiler = partial(compile_evaluation, backend=backend)
    for num_steps in (4, 5, 7, 9):
        _generate(denoiser, compiler, num_steps=num_steps)
    assert backend.frame_count == 2
    known = KnownLatent(torch.zeros(1, CHANNELS, FRAMES), torch.arange(FRAMES)[None] > 4)
    assert _generate(denoiser, compiler, known=known).isfinite().all()
    assert backend.frame_count == 3
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_blocks_are_traced_through(denoiser: DiffusionTransformer) -> None:
    torch.compiler.reset()
    backend, exact = CompileCounterWithBackend("eager"), _generate(denoiser, None)
    compile_blocks(denoiser, backend="eager")
    actual = _generate(denoiser, partial(compile_evaluation, backend=backend))
    torch.testing.assert_close(actual, exact, atol=1e-5, rtol=1e-5)
    assert backend.frame_count == 1
    torch.compiler.reset()


def test_evaluations_are_whole_where_nothing_is_attached() -> None:
    assert leaves_evaluations_whole(None)
    assert leaves_evaluations_whole(Combined([NoAcceleration(), Combined([])]))
    assert not leaves_evaluations_whole(Combined([NoAcceleration(), Fora(2)]))
    check_choice(True)
    with pytest.raises(ValueError, match="true, false or blocks, got 'layers'"):
        check_choice("layers")


@pytest.mark.slow
@pytest.mark.timeout(900)  # it compiles
def test_a_system_generates_the_same_compiled() -> None:
    torch.manual_seed(0)
    generator = TextToAudio(build_system(CONFIGS))
    exact = generator.generate(["a dog barks"], **STEPS)
    generator.optimise(compiled=True)
    result = generator.generate(["a dog barks"], **STEPS)
    torch.testing.assert_close(result.audio, exact.audio, atol=1e-3, rtol=1e-3)
    assert generator.inference["compile"] is True
    accelerated = generator.generate(["a dog barks"], accelerator=Fora(2), **STEPS)
    assert accelerated.audio.isfinite().all()
