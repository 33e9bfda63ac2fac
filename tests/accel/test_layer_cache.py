"""LayerCache: what it skips, that it leaves no trace, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foley.accel.caching.layer_cache import LayerCache
from foley.accel.caching.schedule import CacheSchedule, RunSignature, SignatureMismatchError
from foley.accel.layers import find_cacheable_layers
from foley.core.hashing import hash_module
from foley.diffusion.sampler import Start

NUM_STEPS = 6


def _schedule(denoiser: Any, num_steps: int = NUM_STEPS, every: int = 1, **changed: Any) -> CacheSchedule:
    layers = find_cacheable_layers(denoiser)
    signature = {
        "model_hash": hash_module(denoiser),
        "solver": "ddim",
        "num_steps": num_steps,
        "num_evaluations": num_steps,
        "guidance_scale": 3.0,
    } | changed
    table = torch.zeros(signature["num_evaluations"], len(layers), dtype=torch.bool)
    table[::every] = True
    names, kinds = tuple(layer.name for layer in layers), tuple(layer.kind for layer in layers)
    return CacheSchedule(table, names, kinds, RunSignature(**signature), {"name": "test"})


def _patched(denoiser: torch.nn.Module) -> list[str]:
    return [name for name, module in denoiser.named_modules() if "forward" in vars(module)]


def test_layers_are_found_by_full_name_in_order(denoiser: Any) -> None:
    layers = find_cacheable_layers(denoiser)
    assert [layer.name for layer in layers] == [
        f"blocks.{i}.{kind}" for i in range(2) for kind in ("self_attention", "cross_attention", "feed_forward")
    ]
    assert [layer.kind for layer in layers] == [layer.name.rpartition(".")[2] for layer in layers]


def test_a_denoiser_without_cacheable_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no cacheable layer"):
        find_cacheable_layers(torch.nn.Linear(2, 2))


def test_computing_always_is_bitwise_equal_to_no_cache(denoiser: Any, generate: Any) -> None:
    plain = generate(denoiser)
    cache = LayerCache(_schedule(denoiser))
    with cache.attach(denoiser):
        assert torch.equal(generate(denoiser, [cache]), plain)


def test_reused_layers_do_not_run_and_return_their_last_output(denoiser: Any, generate: Any) -> None:
    schedule = _schedule(denoiser)
    name = "blocks.1.cross_attention"
    schedule.compute[2:4, schedule.layer_names.index(name)] = False
    outputs: list[torch.Tensor] = []
    layer = denoiser.get_submodule(name)
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    cache = LayerCache(schedule)
    with cache.attach(denoiser):
        generate(denoiser, [cache])
    assert denoiser.runs() == {n: NUM_STEPS - 2 * (n == name) for n in schedule.layer_names}
    assert outputs[1] is outputs[2] is outputs[3]
    assert not torch.equal(outputs[3], outputs[4])


def test_a_run_that_begins_later_computes_every_layer_first_and_then_follows_the_schedule(
    denoiser: Any, generate: Any
) -> None:
    start = Start(torch.zeros(1, 4, 3), 4)  # the schedule computes at 0 and 3 and reuses at 1, 2, 4, 5
    cache = LayerCache(_schedule(denoiser, every=3))
    with cache.attach(denoiser):
        latent = generate(denoiser, [cache], start=start)
    assert set(denoiser.runs().values()) == {1}
    assert not torch.equal(latent, generate(denoiser, start=start))


def test_two_generations_in_a_row_are_equal_and_cached_alike(denoiser: Any, generate: Any) -> None:
    cache = LayerCache(_schedule(denoiser, every=2))
    with cache.attach(denoiser):
        first = generate(denoiser, [cache])
        second = generate(denoiser, [cache])
        other_size = generate(denoiser, [cache], seeds=(0,))
    with cache.attach(denoiser):
        third = generate(denoiser, [cache])
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    torch.testing.assert_close(other_size, first[:1])
    assert set(denoiser.runs().values()) == {4 * NUM_STEPS // 2}
    assert not torch.equal(first, generate(denoiser))


def test_an_exception_leaves_the_denoiser_as_before(denoiser: Any, generate: Any) -> None:
    plain = generate(denoiser)
    cache = LayerCache(_schedule(denoiser, every=2))
    layer = denoiser.blocks[1].feed_forward
    layer.broken_at = layer.runs + 2
    before = {name: set(vars(module)) for name, module in denoiser.named_modules()}
    with pytest.raises(ArithmeticError), cache.attach(denoiser):
        generate(denoiser, [cache])
    assert {name: set(vars(module)) for name, module in denoiser.named_modules()} == before
    assert torch.equal(generate(denoiser), plain)
    with cache.attach(denoiser):
        generate(denoiser, [cache])


def test_a_second_attachment_is_refused_and_the_first_survives(denoiser: Any, generate: Any) -> None:
    cache, other = LayerCache(_schedule(denoiser, every=2)), LayerCache(_schedule(denoiser))
    with cache.attach(denoiser):
        for second in (cache, other):
            with pytest.raises(RuntimeError, match="replaced already"), second.attach(denoiser):
                pass
        generate(denoiser, [cache])
    assert not _patched(denoiser)


def test_an_attached_cache_must_be_a_callback_and_a_callback_attached(denoiser: Any, generate: Any) -> None:
    cache = LayerCache(_schedule(denoiser))
    with pytest.raises(RuntimeError, match="pass it as a callback"), cache.attach(denoiser):
        generate(denoiser)
    with pytest.raises(RuntimeError, match="inside its `attach"):
        generate(denoiser, [cache])
    assert not _patched(denoiser)


@pytest.mark.parametrize(
    ("changed", "run", "values"),
    [
        ({"solver": "euler"}, {}, ("'euler'", "'ddim'")),
        ({"num_steps": 7}, {}, ("7", "6")),
        ({"num_evaluations": 11}, {}, ("11", "6")),
        ({"model_hash": "abc"}, {}, ("'abc'",)),
        ({}, {"solver": "euler"}, ("'ddim'", "'euler'")),
        ({}, {"num_steps": 4}, ("6", "4")),
    ],
)
def test_a_schedule_of_another_run_is_refused_with_both_values(
    denoiser: Any, generate: Any, changed: dict[str, Any], run: dict[str, Any], values: tuple[str, ...]
) -> None:
    cache = LayerCache(_schedule(denoiser, **changed))
    with cache.attach(denoiser), pytest.raises(SignatureMismatchError) as error:
        generate(denoiser, [cache], **run)
    assert all(value in str(error.value) for value in values)
    assert not any(denoiser.runs().values())


def test_a_schedule_is_refused_once_the_weights_change(denoiser: Any, generate: Any) -> None:
    cache = LayerCache(_schedule(denoiser))
    with torch.no_grad():
        denoiser.head.bias += 1
    with cache.attach(denoiser), pytest.raises(SignatureMismatchError, match="model_hash"):
        generate(denoiser, [cache])


def test_a_schedule_of_other_layers_is_refused(denoiser: Any, generate: Any) -> None:
    schedule = _schedule(denoiser)
    names = tuple(f"other.{name}" for name in schedule.layer_names)
    cache = LayerCache(replace(schedule, layer_names=names))
    with cache.attach(denoiser), pytest.raises(SignatureMismatchError, match=rf"layers {names[0]}.*cached here are"):
        generate(denoiser, [cache])


def test_another_guidance_scale_is_only_warned_of(denoiser: Any, generate: Any, caplog: Any) -> None:
    cache = LayerCache(_schedule(denoiser))
    with cache.attach(denoiser):
        generate(denoiser, [cache], guidance_scale=1.0)
    assert "guidance_scale 3" in caplog.text


def test_schedules_survive_the_disk_and_tampering_is_seen(denoiser: Any, tmp_path: Path) -> None:
    schedule = _schedule(denoiser, every=3)
    schedule.save(tmp_path / "s")
    loaded = CacheSchedule.load(tmp_path / "s")
    assert torch.equal(loaded.compute, schedule.compute)
    assert (loaded.layer_names, loaded.layer_kinds) == (schedule.layer_names, schedule.layer_kinds)
    assert (loaded.signature, loaded.policy) == (schedule.signature, schedule.policy)
    _schedule(denoiser, every=2).save(tmp_path / "other")
    (tmp_path / "other.safetensors").replace(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="do not belong together"):
        CacheSchedule.load(tmp_path / "s")


def test_tables_that_cannot_be_executed_are_refused(denoiser: Any) -> None:
    schedule = _schedule(denoiser)
    first_reused = schedule.compute.clone()
    first_reused[0, 1] = False
    for table, message in [
        (first_reused, "evaluation 0"),
        (schedule.compute[:3], "shape"),
        (schedule.compute.int(), "bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            CacheSchedule(table, schedule.layer_names, schedule.layer_kinds, schedule.signature)
