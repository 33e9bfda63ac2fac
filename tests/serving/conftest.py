"""A system of a few thousand weights, and engines that serve it."""

import pytest
import torch
from gated_generators import Gated, Mean
from small_system import CONFIGS
from stirring_parts import stir

from foley.accel.combined import NoAcceleration
from foley.generation.text_to_audio import TextToAudio
from foley.serving.engine import Engine, Served
from foley.serving.jobs import DEFAULT_ACCELERATOR
from foley.system.system import build_system


@pytest.fixture(scope="session")
def generator():
    torch.manual_seed(0)
    system = build_system(CONFIGS)
    stir(system.modules["denoiser"])  # zero-initialised layers would hide the text and the time
    return TextToAudio(system, max_duration_seconds=5.0)


@pytest.fixture
def gated(generator):
    return Gated(generator)


@pytest.fixture
def start():
    """Makes engines, which end with the test."""
    engines = []

    def make(generator, accelerators=None, **options):
        served = Served(generator, accelerators or {DEFAULT_ACCELERATOR: NoAcceleration(), "mean": Mean()})
        engines.append(Engine([{"tiny": served}], **options))
        return engines[-1]

    yield make
    for engine in engines:
        gate = getattr(engine.models["tiny"].generator, "gate", None)
        if gate is not None:
            gate.set()
        engine.close()
