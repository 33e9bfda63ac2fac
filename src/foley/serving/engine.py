"""The engine of the server, free of HTTP: a bounded line of jobs, and one thread a device that takes batches off it.

Requests of equal shape that wait together, or come within a few milliseconds, are one batch. Each clip has its own seed
and ignores the rest of its batch, so that a result is what `sample.py` makes of the same request. Accelerators that
decide by a mean over the batch (`foley.accel.combined.decides_by_batch`) get batches of one request.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Thread

from foley.accel.combined import NoAcceleration, decides_by_batch
from foley.core.devices import on_device
from foley.core.logs import get_logger
from foley.diffusion.context import Accelerator
from foley.generation.pipeline_to_audio import PipelineToAudio, check_pipeline_settings
from foley.generation.result import Generation
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.serving.jobs import DEFAULT_ACCELERATOR, Job, SoundRequest, WaitingLine

_MEMORY = 0.8  # of the running mean of a job's seconds
_JOIN_SECONDS = 10.0  # for a thread to come to its next evaluation
_log = get_logger(__name__)


@dataclass(frozen=True)
class Served:
    """A system on one device.

    Args:
        generator: of this device alone.
        accelerators: that requests may name, made for this generator alone; those that name none get
            `DEFAULT_ACCELERATOR`.
        defaults: what requests leave open, where the system is not to choose.
    """

    generator: TextToAudio | PipelineToAudio
    accelerators: Mapping[str, Accelerator] = field(default_factory=lambda: {DEFAULT_ACCELERATOR: NoAcceleration()})
    defaults: GenerationSettings = field(default_factory=GenerationSettings)

    def __post_init__(self) -> None:
        if isinstance(self.generator, TextToAudio) and self.generator.text.prompt_field != "caption":
            raise ValueError("the prompts of this system are paths of files (features=): no client may name those")

    def check(self, settings: GenerationSettings) -> None:
        """Raises ValueError for what the system cannot do, before it is its turn."""
        if isinstance(self.generator, PipelineToAudio):
            check_pipeline_settings(settings, type(self.generator.audio))
            return
        settings.refuse_lyrics()
        settings.choose_guidance(self.generator.student)
        settings.choose_solver(self.generator.process, self.generator.student)


@dataclass(frozen=True)
class ComputedBatch:
    """What has been computed together, for who counts: its jobs, and how long it took."""

    jobs: Sequence[Job]
    seconds: float

    @property
    def num_clips(self) -> int:
        return sum(len(job.request.clips) for job in self.jobs)


class _AbandonedError(RuntimeError):
    """Nobody wants any clip of the batch any more."""


class Engine:
    """Makes what is submitted, each job once, in the order in which they came but for those that share a batch.

    Args:
        devices: for each the systems on it, by name; the same names on all.
        queue_size: jobs that wait, at most; more are refused.
        batch_size: clips denoised together, at most.
        batch_wait_seconds: how long a job waits for others like it.
        timeout_seconds: from a job's submission to its end.
        observe: is told of each batch that was computed, from the thread of its device.

    >>> from foley import Clip
    >>> engine = Engine([{"demo": Served(TextToAudio.load())}])
    >>> settings = GenerationSettings(num_steps=2, duration_seconds=0.5)
    >>> request = SoundRequest("demo", (Clip("a dog barks", seed=1),), settings)
    >>> engine.submit(request).outcome.result().audio.shape
    torch.Size([1, 1, 12000])
    >>> engine.close()
    """

    def __init__(
        self,
        devices: Sequence[Mapping[str, Served]],
        queue_size: int = 64,
        batch_size: int = 8,
        batch_wait_seconds: float = 0.005,
        timeout_seconds: float = 300.0,
        observe: Callable[[ComputedBatch], None] = lambda batch: None,
    ) -> None:
        self.models = dict(devices[0])
        self.batch_size, self.timeout_seconds = batch_size, timeout_seconds
        self.observe = observe
        self._batch_wait_seconds = batch_wait_seconds
        self._line = WaitingLine(queue_size)
        self._unfinished: dict[Job, None] = {}
        self._seconds_per_job = 1.0
        self._threads = [
            Thread(target=self._work, args=(served,), name=f"device {number}", daemon=True)
            for number, served in enumerate(devices)
        ]
        for thread in self._threads:
            thread.start()

    # ---------------------------------------------------------------- asked from any thread

    def submit(self, request: SoundRequest) -> Job:
        """Raises QueueFullError, DrainingError, and ValueError for what the system cannot do."""
        self.models[request.model].check(request.settings)
        job = Job(request, self.timeout_seconds)
        self._unfinished[job] = None  # before a thread may take it
        job.outcome.add_done_callback(lambda outcome: self._unfinished.pop(job))
        try:
            self._line.put(job, self._retry_after_seconds)
        except RuntimeError as error:
            job.fail(error)
            raise
        return job

    def _retry_after_seconds(self) -> int:
        """By when half of those who wait should have had their turn."""
        return max(1, math.ceil(self._line.size / 2 * self._seconds_per_job / len(self._threads)))

    def position(self, job: Job) -> int | None:
        """How many jobs are before this one; None where it does not wait."""
        return self._line.position(job)

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @property
    def num_running(self) -> int:
        return max(0, len(self._unfinished) - len(self._line))

    @property
    def is_accepting(self) -> bool:
        return not self._line.is_closed

    @property
    def is_alive(self) -> bool:
        """Whether every device has its thread."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def is_idle(self) -> bool:
        return not self._unfinished

    def stop_accepting(self) -> None:
        """Finish what waits and runs, and refuse what comes."""
        self._line.close()

    def close(self, drain_seconds: float = 0.0) -> None:
        """Stop, at once or as soon as nothing is left to do, `drain_seconds` from now at the latest."""
        self.stop_accepting()
        until = time.monotonic() + drain_seconds
        while not self.is_idle and time.monotonic() < until:
            time.sleep(0.01)
        for job in list(self._unfinished):
            job.cancel()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    # ---------------------------------------------------------------- a device's thread

    def _work(self, served: Mapping[str, Served]) -> None:
        take = partial(self._line.take, partial(self._go_together, served), self.batch_size, self._batch_wait_seconds)
        with on_device(next(iter(served.values())).generator.device):
            while batch := take():
                self._run(served, batch)

    def _go_together(self, served: Mapping[str, Served], first: Job, other: Job) -> bool:
        accelerator = served[first.request.model].accelerators[first.request.accelerator]
        return first.request.goes_with(other.request) and not decides_by_batch(accelerator)

    def _run(self, served: Mapping[str, Served], batch: Sequence[Job]) -> None:
        """Make what the jobs want; where that fails, each alone, so that one takes no other with it."""
        wanted = [job for job in batch if job.begin()]
        if not wanted:
            return
        start = time.perf_counter()
        try:
            made = self._generate(served[wanted[0].request.model], wanted)
            self._hand_out(wanted, made, time.perf_counter() - start)
        except _AbandonedError:
            return
        except Exception as error:  # noqa: BLE001 -- the boundary: whatever it is, the next batch is to have its turn
            self._fail(served, wanted, error)

    def _fail(self, served: Mapping[str, Served], batch: Sequence[Job], error: Exception) -> None:
        if len(batch) == 1:
            if not isinstance(error, ValueError):  # by which a request is refused
                _log.error("job %s failed", batch[0].id, exc_info=error)
            batch[0].fail(error)
            return
        _log.warning("a batch of %d jobs failed (%s); each is made alone", len(batch), error)
        for job in batch:
            self._run(served, [job])

    def _generate(self, served: Served, batch: Sequence[Job]) -> Generation:
        request = batch[0].request
        clips = [clip for job in batch for clip in job.request.clips]
        accelerator = served.accelerators[request.accelerator]
        settings = replace(
            request.settings,
            # Of a plain run nobody asks what it saves: counting its MACs takes a third of a two-step clip's time.
            accelerator=None if type(accelerator) is NoAcceleration else accelerator,
            batch_size=self.batch_size,
            progress=_Watch(batch, math.ceil(len(clips) / self.batch_size), self._line),
        )
        return served.generator.generate_clips(clips, settings)

    def _hand_out(self, batch: Sequence[Job], made: Generation, seconds: float) -> None:
        first = 0
        for job in batch:
            last = first + len(job.request.clips)
            job.succeed(made if len(batch) == 1 else made.part(first, last))
            first = last
        mean = seconds / len(batch)
        self._seconds_per_job = _MEMORY * self._seconds_per_job + (1 - _MEMORY) * mean
        self.observe(ComputedBatch(batch, seconds))


class _Watch:
    """Wraps the evaluations of each batch of a run: tells the jobs how far they are, and stops where none is wanted."""

    def __init__(self, jobs: Sequence[Job], num_batches: int, line: WaitingLine) -> None:
        self._jobs, self._num_batches, self._line = jobs, num_batches, line
        self._batches_done = 0

    def __call__(self, evaluations: Iterable[int]) -> Iterator[int]:
        numbers = list(evaluations)
        for done, number in enumerate(numbers):
            self._look(done / len(numbers))
            yield number
        self._batches_done += 1

    def _look(self, share: float) -> None:
        self._line.drop_ended()  # this thread alone is awake while all devices compute
        for job in self._jobs:
            job.expire()
            # Some pipelines take a batch prompt by prompt: more runs than batches.
            job.evaluated = min(1.0, (self._batches_done + share) / self._num_batches)
        if all(job.has_ended for job in self._jobs):
            raise _AbandonedError("nobody wants the clips of this batch any more")
