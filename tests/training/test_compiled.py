"""Compiled training: the forward pass is one graph, and weights, checkpoints and numbers are as without."""

from pathlib import Path

import pytest
import torch
from small_system import CONFIGS
from test_two_steps import in_small, on_the_cpu, state_after_two_steps
from torch._dynamo.testing import CompileCounter
from training_parts import build_module

from foley.core.components import build_component
from foley.training import diffusion
from foley.training.diffusion import DiffusionTraining

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("tiny", []),  # text, masks
        ("ezaudio_xl", ["stage=pretrain", "model.gradient_checkpointing=true"]),  # no text, data-parallel
        ("tiny_lcm", []),  # student, target and teacher
    ],
)
def test_a_compiled_run_is_the_run(recipe: str, overrides: list[str], tmp_path: Path) -> None:
    states = []
    for compiled in ("false", "eager"):
        torch._dynamo.reset()
        cfg = on_the_cpu(
            in_small(recipe, f"compile={compiled}", "trainer.precision=32-true", *overrides), tmp_path / compiled
        )
        states.append(state_after_two_steps(cfg, tmp_path / compiled))
    plain, compiled = states
    assert list(plain) == list(compiled)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_a_forward_pass_is_one_graph_at_every_step(autocast: bool) -> None:
    torch._dynamo.reset()
    counter, module = CompileCounter(), build_module(compile="eager")
    module.denoiser, module._backend = build_component(CONFIGS["denoiser"]), counter
    for timestep in (3, 999):
        inputs = torch.randn(2, 4, 12), torch.full((2,), timestep), torch.randn(2, 5, 16)
        hidden = torch.rand(2, 12) < 0.5
        masks = {"context_mask": torch.arange(5).expand(2, 5) < 3, "visible": inputs[0], "hidden_mask": hidden}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = module.network(module.denoiser)(*inputs, **masks)
            torch.testing.assert_close(result, module.denoiser(*inputs, **masks))
        result.square().mean().backward()
    assert counter.frame_count == 1
    assert all(parameter.grad is not None for parameter in module.denoiser.parameters())
    assert module.network(module.denoiser) is module.network(module.denoiser)
    assert not any("_orig_mod" in name for name in module.state_dict())


def test_noise_is_drawn_on_the_device_from_the_same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_module()
    host, own = module.generators("train", 0)
    assert host is own  # on a CPU every draw is where it was
    asked = []
    monkeypatch.setattr(DiffusionTraining, "device", torch.device("cuda", 1))
    monkeypatch.setattr(diffusion, "torch_generator", lambda *parts, device="cpu": asked.append((parts, str(device))))
    module.generators("train", 0, 7)
    assert asked == [(("train", 0, 7), "cpu"), (("train", 0, 7), "cuda:1")]
