"""Accelerators: what makes a generation cheaper, attached to a denoiser from outside and gone without a trace.

`with accelerator.attach(denoiser)` opens an accelerator for the length of one generation, whose sampler calls it as a
callback. `caching` reuses what layers computed before, `attention` lets queries see fewer keys, `diffusers` brings both
to the models and pipelines of that library (`accelerate`, `calibrate`), and `cost` counts what is saved.
"""

from foley.accel.attention.litefocus import LiteFocus
from foley.accel.attention.local_global import LocalGlobal
from foley.accel.attention.token_merging import TokenMerging
from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.budget import Budget
from foley.accel.caching.calibration import Calibration, CalibrationRecorder
from foley.accel.caching.dbcache import DBCache
from foley.accel.caching.first_block_cache import FirstBlockCache
from foley.accel.caching.fora import Fora
from foley.accel.caching.layer_cache import LayerCache
from foley.accel.caching.magcache import MagCache
from foley.accel.caching.prediction import PredictionReuse
from foley.accel.caching.schedule import CacheSchedule
from foley.accel.caching.smoothcache import SmoothCache
from foley.accel.caching.teacache import TeaCache
from foley.accel.combined import Combined, NoAcceleration
from foley.accel.cost import CostMeter
from foley.accel.diffusers.pipelines import accelerate, calibrate

__all__ = [
    "AudioCache",
    "Budget",
    "CacheSchedule",
    "Calibration",
    "CalibrationRecorder",
    "Combined",
    "CostMeter",
    "DBCache",
    "FirstBlockCache",
    "Fora",
    "LayerCache",
    "LiteFocus",
    "LocalGlobal",
    "MagCache",
    "NoAcceleration",
    "PredictionReuse",
    "SmoothCache",
    "TeaCache",
    "TokenMerging",
    "accelerate",
    "calibrate",
]
