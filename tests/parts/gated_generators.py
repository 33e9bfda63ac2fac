"""What stops a generator where a test of the engine or the server wants to look."""

from threading import Event

import torch
from small_system import CountingAccelerator

from foley.accel.combined import NoAcceleration
from foley.generation.result import Generation, Timings

PATIENCE_SECONDS = 20.0


class Gated:
    """A generator whose batches are noted, and wait until the gate is open; a prompt "bad" fails its whole batch.

    `computes=False` is silence, for tests of what becomes a batch.
    """

    def __init__(self, generator, computes=False):
        self._generator, self._computes = generator, computes
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
        if self._computes:
            return self._generator.generate_clips(clips, settings)
        settings = {"model_hash": self.model_hash}
        return Generation(clips, torch.zeros(len(clips), 1, 100), self.sample_rate_hz, settings, Timings())


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
