"""The hash of a module: remembered, and forgotten as soon as a weight changes, however it changes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from foley.core import hashing
from foley.core.hashing import hash_module, hash_tensors


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))


def optimise(model: nn.Module, **options: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def add(model: nn.Module) -> None:
    model[0].weight.add_(1)


@torch.inference_mode()
def add_in_inference_mode(model: nn.Module) -> None:
    model[0].weight.add_(1)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


def replace_parameter(model: nn.Module) -> None:
    model[0].bias = nn.Parameter(torch.ones(7))


def replace_data(model: nn.Module) -> None:
    model[0].bias.data = torch.ones(7)


def round_to_half(model: nn.Module) -> None:
    model.half().float()


def count_batches(model: nn.Module) -> None:
    model(torch.randn(4, 5))


CHANGES = [add, add_in_inference_mode, load, replace_parameter, replace_data, round_to_half, count_batches, optimise]


@pytest.mark.parametrize("change", [*CHANGES, lambda model: optimise(model, fused=True)])
def test_a_change_of_weights_is_noticed(change: Callable[[nn.Module], None]) -> None:
    model = module()
    before = hash_module(model)
    change(model)
    assert hash_module(model) == hash_tensors(model.state_dict()) != before


def test_a_second_call_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = module()
    first = hash_module(model)
    monkeypatch.setattr(hashing, "hash_tensors", lambda tensors: pytest.fail("hashed again"))
    assert hash_module(model) == first


def test_equal_modules_have_equal_hashes() -> None:
    assert hash_module(module()) == hash_module(module())
