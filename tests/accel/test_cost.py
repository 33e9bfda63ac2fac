"""What a generation costs, counted while it runs: against the closed form, and without changing a bit of it."""

from typing import Any

import pytest
import torch
from tiny_pipelines import audioldm2, stable_audio_dit
from torch import Tensor

from foley.accel.attention.litefocus import LiteFocus
from foley.accel.caching.calibration import CalibrationRecorder
from foley.accel.caching.fora import Fora
from foley.accel.combined import Combined, NoAcceleration
from foley.accel.cost import CostMeter, MacCounter, count_call_macs
from foley.accel.diffusers.audioldm2 import find_self_attention
from foley.diffusion.context import RunContext, StepContext

ITEMS, FRAMES, TOKENS = 2, 16, 3


def _inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {"hidden_states": (ITEMS, 4, FRAMES), "encoder_hidden_states": (ITEMS, TOKENS, 16)}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**inputs, "global_hidden_states": torch.randn(ITEMS, 1, 32), "timestep": torch.tensor([0.5])}


def _run(model: Any, inputs: Any, accelerator: Any, num_evaluations: int = 5, first: int = 0) -> list[Tensor]:
    run, predictions = RunContext("ddim", num_evaluations, torch.arange(5).flip(0), 1.0, 0.0, ITEMS), []
    with torch.no_grad(), accelerator.attach(model):
        accelerator.on_run_start(run)
        for evaluation in range(first, 5):
            context = StepContext(evaluation, run.timesteps[evaluation], run)
            accelerator.on_evaluation_start(context)
            predictions.append(model(**inputs).sample)
            accelerator.on_evaluation_end(context, predictions[-1])
        accelerator.on_run_end()
    return predictions


def _stable_audio_macs() -> tuple[int, int]:
    """Of one item: outside the blocks, and within the two of them."""
    tokens, width, text = FRAMES + 1, 32, 16
    projections = 4 + 8 * width + 2 * width * width + 32 * width + 2 * TOKENS * text * text  # time, global, text
    outside = projections + FRAMES * (2 * 4 * 4 + 2 * 4 * width) + 4 * width  # the prepended token is projected out too
    self_attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    cross_attention = 2 * tokens * width * width + 2 * TOKENS * text * width // 2 + 2 * tokens * TOKENS * width
    feed_forward = tokens * width * 4 * width * 3
    return outside, 2 * (self_attention + cross_attention + feed_forward)


def test_the_count_is_the_closed_form_less_what_was_reused() -> None:
    model, meter = stable_audio_dit(), CostMeter(Fora(2))
    plain = _run(model, _inputs(), Fora(2))
    assert all(torch.equal(*pair) for pair in zip(_run(model, _inputs(), meter), plain, strict=True))
    outside, blocks = _stable_audio_macs()
    time = 4 + 8 * 32 + 32 * 32  # once for all items, so half of it for each of the two
    cost = meter.cost_per_item()
    assert cost is not None
    assert cost.macs_uncached == 5 * (outside + blocks) - 5 * time // 2
    assert cost.macs_cached == cost.macs_uncached - 2 * blocks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_run_that_begins_later_costs_what_is_left_of_it() -> None:
    model = stable_audio_dit()
    cost = []
    for first in (0, 3):
        meter = CostMeter(Fora(2))
        _run(model, _inputs(), meter, first=first)
        cost.append(meter.describe())
    _, blocks = _stable_audio_macs()
    assert cost[1]["macs_uncached"] == 2 * cost[0]["macs_uncached"] // 5
    assert cost[1]["macs"] == cost[1]["macs_uncached"]  # evaluation 3 computes where the run begins, 4 by the schedule
    assert cost[0]["macs"] == cost[0]["macs_uncached"] - 2 * blocks


def test_without_acceleration_both_are_the_same() -> None:
    meter = CostMeter(NoAcceleration())
    assert meter.cost_per_item() is None
    _run(stable_audio_dit(), _inputs(), meter)
    assert meter.describe()["macs"] == meter.describe()["macs_uncached"]


def test_of_a_recording_only_the_recorder_counts() -> None:
    model, recorder = stable_audio_dit(), CalibrationRecorder()
    meter, reference = CostMeter(recorder), CostMeter(NoAcceleration())
    _run(model, _inputs(), meter)
    _run(model, _inputs(), reference)
    assert meter.describe() == {}
    assert 5 * recorder.calibration().macs.total // ITEMS == reference.describe()["macs"]


def test_after_the_first_evaluation_nothing_is_watched() -> None:
    model, watched = stable_audio_dit(), []

    class Watching(Fora):
        def on_evaluation_start(self, context: StepContext) -> None:
            watched.append(any(module._forward_hooks for module in model.modules()))
            super().on_evaluation_start(context)

    _run(model, _inputs(), CostMeter(Watching(2)))
    assert watched == [True] + [False] * 4


def test_compiled_parts_are_not_counted() -> None:
    model, meter = stable_audio_dit(), CostMeter(Fora(2))
    model.transformer_blocks[0].compile(backend="eager")
    with torch.compiler.set_stance("force_eager"):
        _run(model, _inputs(), meter)
    assert meter.describe() == {}


def test_a_call_is_counted_from_shapes_alone() -> None:
    model, inputs, counter = stable_audio_dit(), _inputs(), MacCounter()
    counter.start()
    with torch.no_grad():
        model(**inputs)
    counter.stop()
    assert count_call_macs(model, (), inputs) == counter.total > 0


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_sparse_attention_is_compared_with_dense(cached: bool) -> None:
    unet, attention = audioldm2().unet.eval(), LiteFocus(ratio=0.1, blocks=["down_blocks.1"])
    inputs = {
        "sample": torch.randn(ITEMS, 4, 16, 4),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(ITEMS, 4, 8),
        "encoder_hidden_states_1": torch.randn(ITEMS, 5, 16),
    }
    meter = CostMeter(Combined([Fora(2), attention]) if cached else attention)
    _run(unet, inputs, meter)
    counter = MacCounter()
    counter.start()
    with torch.no_grad():
        unet(**inputs)
    counter.stop()
    cost = meter.describe()
    assert cost["macs_uncached"] == 5 * counter.total // ITEMS
    assert cost["macs"] < cost["macs_uncached"]
    # With the published layer's tokens: 16 frames of 4 frequencies at half resolution are 8 of 2.
    tokens, frames, shared, width = 16, 8, 1, 16
    saved = 5 * 2 * tokens * (tokens - frames - shared) * width
    if not cached:
        assert cost["macs_uncached"] - cost["macs"] == saved * len(find_self_attention(unet, ["down_blocks.1"]))
