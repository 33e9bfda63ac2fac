"""Bytes that a forward pass keeps for its backward pass."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_parts import run

from foley.training.callbacks.monitoring import TrainingMemory, activation_bytes, state_bytes

FLOAT = 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_two_layers_keep(device: str) -> None:
    with torch.device(device):
        model, x = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)), torch.ones(3, 10)
    # The input of each linear layer; the ReLU's output is the second's input and counts once. No weight counts.
    assert activation_bytes(model, lambda: model(x).sum()) == FLOAT * (3 * 10 + 3 * 20)


def test_checkpointing_keeps_only_the_input() -> None:
    model, x = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)), torch.ones(3, 10)
    kept = activation_bytes(model, lambda: checkpoint(model, x, use_reentrant=False).sum())
    assert kept == FLOAT * 3 * 10


def test_nothing_is_kept_without_gradients() -> None:
    model = nn.Linear(10, 20)
    with torch.no_grad():
        assert activation_bytes(model, lambda: model(torch.ones(3, 10)).sum()) == 0


def test_what_a_process_holds_is_weights_moments_and_averages(tmp_path: Path) -> None:
    trainer, module, _ = run(tmp_path, 2, callbacks=[TrainingMemory()])
    parameters, buffers = list(module.parameters()), list(module.buffers())
    numbers = sum(parameter.numel() for parameter in parameters)
    steps = len(parameters)  # AdamW counts them for each parameter
    assert state_bytes(trainer) == FLOAT * (4 * numbers + steps) + sum(buffer.nbytes for buffer in buffers)
    assert trainer.callback_metrics["memory/state_mib"] == pytest.approx(state_bytes(trainer) / 2**20)


def test_counting_leaves_no_graph_behind() -> None:
    x, outputs = torch.ones(3, requires_grad=True), []

    def forward() -> torch.Tensor:
        output = x.exp()  # saves its own output
        outputs.append(weakref.ref(output))
        return output.sum()

    activation_bytes(nn.Linear(1, 1), forward)
    gc.collect()
    assert outputs[0]() is None
