"""Caching and sparse attention together: an exception leaves nothing behind, and no generation touches the next."""

import subprocess
import sys

import composition_parts
import pytest
import torch
from composition_parts import both, build_denoiser, digest, generate
from torch import nn

from foley.accel.combined import Combined


def _state(denoiser: nn.Module) -> dict[str, object]:
    """All that an accelerator could leave behind: attributes, hooks and cores of each module."""
    return {
        name: (set(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks), vars(module).get("core"))
        for name, module in denoiser.named_modules()
    }


@pytest.mark.parametrize("stage", ["first evaluation", "later evaluation"])
def test_an_exception_inside_leaves_the_model_untouched(stage: str) -> None:
    denoiser = build_denoiser()
    plain, expected, before = generate(denoiser), generate(denoiser, both()), _state(denoiser)
    calls = [0]

    def break_down(module: nn.Module, args: object) -> None:
        calls[0] += 1
        if calls[0] == (1 if stage == "first evaluation" else 4):
            raise ArithmeticError("the layer breaks")

    accelerator = both()
    hook = denoiser.mid_block.register_forward_pre_hook(break_down)
    with pytest.raises(ArithmeticError):
        generate(denoiser, accelerator)
    hook.remove()
    assert _state(denoiser) == before
    assert torch.equal(generate(denoiser), plain)
    assert torch.equal(generate(denoiser, accelerator), expected)


def test_the_order_of_attaching_does_not_matter() -> None:
    denoiser = build_denoiser()
    for reuse in ("hold", "taylor"):
        forwards, backwards = both(reuse), Combined(both(reuse).accelerators[::-1])
        assert torch.equal(generate(denoiser, forwards), generate(denoiser, backwards))


def test_no_generation_touches_the_next() -> None:
    denoiser, accelerator = build_denoiser(), both()
    first = generate(denoiser, accelerator)
    generate(denoiser, both("hold"))
    generate(denoiser)
    assert torch.equal(generate(denoiser, accelerator), first)
    assert torch.equal(generate(build_denoiser(), both()), first)


@pytest.mark.slow
def test_two_generations_in_a_row_are_those_of_two_fresh_processes() -> None:
    denoiser, accelerator = build_denoiser(), both()
    in_a_row = [digest(generate(denoiser, accelerator)) for _ in range(2)]
    program = [sys.executable, composition_parts.__file__]
    fresh = [subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]
    assert in_a_row == fresh
