"""A system of a few thousand weights, served, and what stops it where a test wants to look."""

from threading import Event

import pytest
import torch
from small_system import CONFIGS, CountingAccelerator

from foley.accel.combined import NoAcceleration
from foley.generation.text_to_audio import TextToAudio
from foley.serving.engine import Engine, Served
from foley.system.system import build_system

PATIENCE_SECONDS = 20.0


class Gated:
    """A generator whose batches are noted, and wait until the gate is open; a prompt "bad" fails its whole batch."""

    def __init__(self, generator):
        self._generator = generator
        self.gate, self.reached = Event(), Event()
        self.batches = []

    def __getattr__(self, name):
        return getattr(self._generator, name)

    def generate_clips(self, clips, settings):
        self.batches.append([clip.seed for clip in clips])
        self.reached.set()
        assert self.gate.wait(PATIENCE_SECONDS)
        if any(clip.prompt == "bad" for clip in clips):
            raise RuntimeError("audio that is not finite")
        return self._generator.generate_clips(clips, settings)


class Held(CountingAccelerator):
    """Waits at one evaluation of the first run."""

    def __init__(self, at):
        super().__init__()
        self.at, self.gate, self.reached = at, Event(), Event()

    def on_evaluation_start(self, context):
        super().on_evaluation_start(context)
        if context.evaluation == self.at:
            self.reached.set()
            assert self.gate.wait(PATIENCE_SECONDS)


class Mean(NoAcceleration):
    """Stands for one that decides by a mean over the batch."""

    decides_by_batch = True


@pytest.fixture(scope="session")
def generator():
    torch.manual_seed(0)
    system = build_system(CONFIGS)
    with torch.no_grad():  # zero-initialised layers would hide the text and the time
        for parameter in system.modules["denoiser"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return TextToAudio(system, max_duration_seconds=5.0)


@pytest.fixture
def gated(generator):
    return Gated(generator)


@pytest.fixture
def start():
    """Makes engines, which end with the test."""
    engines = []

    def make(generator, accelerators=None, **options):
        served = Served(generator, accelerators or {"none": NoAcceleration(), "mean": Mean()})
        engines.append(Engine([{"tiny": served}], **options))
        return engines[-1]

    yield make
    for engine in engines:
        gate = getattr(engine.models["tiny"].generator, "gate", None)
        if gate is not None:
            gate.set()
        engine.close()
