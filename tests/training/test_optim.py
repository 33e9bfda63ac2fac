"""Parameter groups and schedules."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from foley.training.optim import (
    constant_schedule,
    cosine_schedule,
    inverse_power_schedule,
    parameter_groups,
    reapply_options,
    scale_rates,
)


def rates(make, steps: int, **options) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make(optimizer, **options)
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return seen


def test_only_matrices_and_kernels_decay() -> None:
    module = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 2),
            "conv": weight_norm(nn.Conv1d(3, 2, 3)),
            "norm": nn.LayerNorm(3),
            "table": nn.Embedding(5, 3),
        }
    )
    module.register_parameter("bias_table", nn.Parameter(torch.zeros(6, 3)))
    names = {parameter: name for name, parameter in module.named_parameters()}
    decayed, exempt = parameter_groups(module)
    assert {names[p] for p in decayed["params"]} == {"linear.weight", "conv.parametrizations.weight.original1"}
    assert exempt["weight_decay"] == 0
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_frozen_and_shared_parameters() -> None:
    linear = nn.Linear(3, 3)
    linear.bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(linear, nn.Sequential(linear))] == [1]


def test_a_part_that_learns_slower_has_groups_of_its_own_under_the_schedule() -> None:
    part, rest = nn.Linear(3, 2), nn.Linear(2, 2, bias=False)
    groups = parameter_groups(nn.Sequential(part, rest), slowed=[part], rate=0.1)
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(rest.weight)],
        [id(part.weight)],
        [id(part.bias)],
    ]
    optimizer = scale_rates(torch.optim.AdamW(groups, lr=2.0, weight_decay=0.5))
    schedule = constant_schedule(optimizer, warmup_steps=2)
    assert schedule.get_last_lr() == pytest.approx([1.0, 0.1, 0.1])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0]
    assert len(parameter_groups(nn.Sequential(part, rest), slowed=[part])) == 2  # as without it


def test_schedules_in_closed_form() -> None:
    assert rates(constant_schedule, 4, warmup_steps=2) == [1.0, 2.0, 2.0, 2.0]
    cosine = rates(cosine_schedule, 7, total_steps=6, warmup_steps=2, final_ratio=0.1)
    assert cosine == pytest.approx([1.0, 2.0, 2.0, 2 * (0.1 + 0.9 * 0.8535534), 1.1, 2 * (0.1 + 0.9 * 0.1464466), 0.2])
    assert rates(inverse_power_schedule, 4, inv_gamma=1.0, power=1.0) == pytest.approx([2.0, 1.0, 2 / 3, 0.5])


def test_a_cosine_needs_an_end() -> None:
    with pytest.raises(ValueError, match="total_steps=-1"):
        rates(cosine_schedule, 1, total_steps=-1)


def test_a_warm_up_that_leaves_nothing_is_named_and_by_how_much() -> None:
    wanted = r"lr_schedule\.warmup_steps=100 leaves nothing .* by 61 at least, as by lr_schedule\.warmup_steps=4,"
    with pytest.raises(ValueError, match=wanted):
        rates(cosine_schedule, 1, total_steps=40, warmup_steps=100)
    assert rates(cosine_schedule, 1, total_steps=40, warmup_steps=100 - 61) == [2.0 / 39]


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (None, "cpu")])
def test_steps_counted_on_a_cpu_go_to_where_a_fused_kernel_wants_them(fused: bool | None, device: str) -> None:
    """A checkpoint of a CPU, or of loss scaling, that a GPU goes on from."""
    weight = nn.Parameter(torch.zeros(2, device="meta"))  # stands for a GPU
    resumed = torch.optim.AdamW([weight])
    resumed.state[weight] = {"step": torch.tensor(3.0)}
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], fused=fused)
    reapply_options(fresh, SimpleNamespace(optimizers=[resumed], lr_scheduler_configs=[]))
    assert resumed.param_groups[0]["fused"] == fused
    assert resumed.state[weight]["step"].device.type == device
