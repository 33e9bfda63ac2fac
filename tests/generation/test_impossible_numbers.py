"""Numbers that no request could mean are refused by name, by every class and command that takes them."""

import math
import subprocess
import sys

import pytest
from commands import compose_command

from foley.accel.attention.litefocus import LiteFocus
from foley.accel.attention.local_global import LocalGlobal
from foley.accel.attention.token_merging import TokenMerging
from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.budget import Budget
from foley.accel.caching.fora import Fora
from foley.accel.caching.smoothcache import SmoothCache
from foley.cli.sampling import requested_clips
from foley.core.config import PROJECT_ROOT
from foley.core.numbers import SEED, NumberRange
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.editing import EditMask, Variation
from foley.generation.options import NUMBERS, OPTION_NUMBERS
from foley.generation.prompts import Clip, request_clips
from foley.generation.settings import GenerationSettings

NO_NUMBERS = [math.nan, math.inf, -math.inf, -1, True, "2", 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("field", NUMBERS)
def test_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        GenerationSettings(**{field: value})


@pytest.mark.parametrize("field", ["batch_size", "overlap_seconds", "eta"])
def test_what_no_system_decides_cannot_be_left_open(field):
    with pytest.raises(ValueError, match=f"^{field}=null: give a"):
        GenerationSettings(**{field: None})


def test_a_number_that_is_none_is_refused_before_pytorch_is_loaded(tmp_path):
    program = (
        "import runpy, sys\n"
        f"try: runpy.run_path({str(PROJECT_ROOT / 'sample.py')!r}, run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "strength=null", f"output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()[-1]) == (1, "False")
    assert "strength=null: give a number >= 0 and <= 1" in done.stderr


ACCELERATORS = {
    "threshold": lambda value: AudioCache("calibration", threshold=value),
    "calibrated_steps": lambda value: AudioCache("calibration", calibrated_steps=value),
    "alpha": lambda value: SmoothCache("calibration", alpha=value),
    "max_lookahead": lambda value: SmoothCache("calibration", alpha=0.1, max_lookahead=value),
    "target_speedup": lambda value: Budget("calibration", target_speedup=value),
    "interval": lambda value: Fora(interval=value),
    "ratio": lambda value: LiteFocus(ratio=value),
    "seed": lambda value: LiteFocus(seed=value),
    "window_frames": lambda value: LocalGlobal(window_frames=value),
    "stride": lambda value: TokenMerging(stride=(2, value)),
}
OTHERS = {
    **ACCELERATORS,
    "guidance scale": lambda value: ClassifierFreeGuidance(value),
    "guidance rescale": lambda value: ClassifierFreeGuidance(3.0, value),
    "strength": lambda value: Variation("a.wav", value),
    "mask_start_seconds": lambda value: EditMask(value, 1.0),
    "mask_length_seconds": lambda value: EditMask(1.0, value),
    "boundary_seconds": lambda value: EditMask(1.0, 1.0, value),
    "num": lambda value: request_clips("rain", None, 0, value),
}


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", OTHERS)
def test_accelerators_guidance_and_recordings_name_the_argument(name, value):
    with pytest.raises(ValueError, match=name):
        OTHERS[name](value)


@pytest.mark.parametrize("ratio", [math.nan, -1, True, "2"])
def test_sparse_attention_takes_a_share(ratio):
    for make in (LiteFocus, TokenMerging, lambda ratio: LocalGlobal(8, ratio=ratio)):
        with pytest.raises(ValueError, match="ratio"):
            make(ratio=ratio)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, 1.0, None, "1"])
def test_a_seed_is_one_that_every_generator_takes(seed):
    with pytest.raises(ValueError, match=r"^seed="):
        Clip("rain", seed)
    assert 2**63 - 1 in SEED


@pytest.fixture(scope="module")
def composed():
    return compose_command("sample", "prompt=rain")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, True, "text"])
@pytest.mark.parametrize("option", OPTION_NUMBERS)
def test_sample_names_the_option(composed, option, value):
    cfg = composed.copy()
    cfg[option] = value
    with pytest.raises(ValueError, match=f"^{option}="):
        requested_clips(cfg)


TYPED = {
    "duration_seconds": [1e-9, 1e9, 0],
    "trained_seconds": [0],
    "strength": [None, 1.5],
    "num": [10**9, None, 0, 1.5],
    "seed": [2**70, None],
    "steps": [1e9, 0],
    "guidance_rescale": [2, None],
    "max_duration_seconds": [None, 0],
    "overlap_seconds": [None],
    "batch_size": [0, None],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in TYPED.items() for value in values])
def test_what_people_type_by_mistake_is_refused_by_name(composed, option, value):
    cfg = composed.copy()
    cfg[option] = value
    with pytest.raises(ValueError, match=f"^{option}="):
        requested_clips(cfg)


def test_more_clips_than_anyone_listens_to(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain\nwind\n", encoding="utf-8")
    with pytest.raises(ValueError, match="num=600000 of 2 prompts are 1200000 clips; at most 1000000"):
        request_clips(None, str(prompts), 0, 600_000)


def test_a_range_says_what_it_takes():
    assert str(NumberRange(above=0, most=1)) == "a number > 0 and <= 1"
    assert str(NumberRange(least=1, whole=True)) == "a whole number >= 1"
    assert [value in NumberRange(above=0, most=1) for value in (0, 0.5, 1, 1.5)] == [False, True, True, False]
