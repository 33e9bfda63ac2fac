"""Absurd numbers in a request: refused by the name of the option, or made into a request that can be generated."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fuzzing import ABSURD_NUMBERS, bounded, right_or_named
from hypothesis import given
from hypothesis import strategies as st

from foley.accel.attention.litefocus import LiteFocus
from foley.accel.attention.local_global import LocalGlobal
from foley.accel.attention.token_merging import TokenMerging
from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.budget import Budget
from foley.accel.caching.fora import Fora
from foley.accel.caching.smoothcache import SmoothCache
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import DiffusionProcess
from foley.generation.editing import EditMask, Variation
from foley.generation.settings import GenerationSettings

ABSURD = st.one_of(ABSURD_NUMBERS, st.none(), st.just("five"), st.floats(), st.integers())
GOOD: dict[Callable[..., Any], Mapping[str, Any]] = {
    GenerationSettings: {
        **{"duration_seconds": 2.0, "num_steps": 10, "batch_size": 1, "window_seconds": 2.0, "overlap_seconds": 1.0},
        "decode_chunk_seconds": 10.0,
    },
    EditMask: {"mask_start_seconds": 1.0, "mask_length_seconds": 1.0, "boundary_seconds": 1.0},
    Variation: {"file": "dog.wav", "strength": 0.5},
    ClassifierFreeGuidance: {"scale": 3.0, "rescale": 0.0},
    AudioCache: {"calibration_dir": "calibration", "threshold": 0.2},
    SmoothCache: {"calibration_dir": "calibration", "alpha": 0.2, "max_lookahead": 3},
    Budget: {"calibration_dir": "calibration", "target_speedup": 2.0},
    Fora: {"interval": 2},
    LiteFocus: {"ratio": 0.1},
    LocalGlobal: {"window_frames": 10, "ratio": 0.1},
    TokenMerging: {"ratio": 0.5},
}
TEXT_OPTIONS = {"file", "calibration_dir"}


def numeric_options(kind: Callable[..., Any]) -> list[str]:
    return sorted(set(GOOD[kind]) - TEXT_OPTIONS)


CASES = [pytest.param(kind, name, id=f"{kind.__name__}.{name}") for kind in GOOD for name in numeric_options(kind)]


@pytest.mark.parametrize(("kind", "name"), CASES)
@bounded
@given(value=ABSURD)
def test_an_absurd_number_is_refused_by_its_name(kind: Callable[..., Any], name: str, value: Any) -> None:
    made = right_or_named(lambda: kind(**{**GOOD[kind], name: value}), name)
    assert made is None or not (isinstance(value, float) and value != value), "NaN was taken"


NUMBERS = [field.name for field in dataclasses.fields(GenerationSettings) if field.name in GOOD[GenerationSettings]]


@bounded
@given(st.dictionaries(st.sampled_from(NUMBERS), ABSURD))
def test_settings_that_are_taken_can_be_generated(given_numbers: dict[str, Any]) -> None:
    """Whatever passes gives a solver, and windows, of a plausible clip."""

    def plan() -> GenerationSettings:
        settings = GenerationSettings(**given_numbers)
        settings.choose_solver(DiffusionProcess())
        settings.windows(500, 50.0)
        settings.chunk_frames(50.0)
        return settings

    right_or_named(plan, *given_numbers, "steps")
