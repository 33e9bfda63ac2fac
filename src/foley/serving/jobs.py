"""What is asked of the engine: requests, the jobs that they become, the line that jobs wait in, those that are kept."""

import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Lock

from foley.generation.prompts import Clip
from foley.generation.result import Generation
from foley.generation.settings import GenerationSettings

DEFAULT_ACCELERATOR = "default"
"""The accelerator of requests that name none."""
STUDENT = "-student"
"""What the name of a student's model adds to that of its system."""


class QueueFullError(RuntimeError):
    """As many jobs wait as may; the message says when to come again, as `retry_after_seconds` does."""

    def __init__(self, size: int, retry_after_seconds: int) -> None:
        super().__init__(f"{size} requests wait already; come again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class DrainingError(RuntimeError):
    """The engine finishes what it has, and takes nothing new."""

    retry_after_seconds = 10  # by when another process may have taken its place


class JobTimeoutError(TimeoutError):
    """The job was not finished in time."""


class JobCancelledError(RuntimeError):
    """Whoever asked for the job wants it no more."""


@dataclass(frozen=True)
class SoundRequest:
    """Clips to be made in one way.

    Args:
        model: by its name in the engine.
        clips: whose seeds are all that is random in them.
        settings: without accelerator, batch size and progress, which the engine gives.
        accelerator: by its name among those of the model.
        format: of the sounds, as whoever asked wants them; the engine does not look at it.
    """

    model: str
    clips: tuple[Clip, ...]
    settings: GenerationSettings
    accelerator: str = DEFAULT_ACCELERATOR
    format: str = "wav"

    def goes_with(self, other: "SoundRequest") -> bool:
        """Whether the clips of both may be one batch: all but the clips is equal, and no recording gives the length."""
        mine, its = ((one.model, one.accelerator, one.settings) for one in (self, other))
        return mine == its and self.settings.source is None


class Job:
    """A request on its way. `outcome` gets the `Generation`, or the error that ended it; whatever ends it first counts.

    Args:
        timeout_seconds: from now on.
    """

    def __init__(self, request: SoundRequest, timeout_seconds: float) -> None:
        self.id = secrets.token_hex(16)  # which no one guesses: it is all that is asked of who takes the result
        self.request = request
        self.timeout_seconds = timeout_seconds
        self.evaluated = 0.0  # the share of the evaluations that are done
        self.taken: set[int] = set()  # the clips that were fetched
        self.outcome: Future[Generation] = Future()
        self.outcome.set_running_or_notify_cancel()  # by `cancel` of ours alone, not by that of a future
        self.ended_at = float("inf")  # of the monotonic clock
        self._began = False
        self._deadline = time.monotonic() + timeout_seconds

    @property
    def state(self) -> str:
        """One of "queued", "running", "done", "failed", "cancelled"."""
        if not self.outcome.done():
            return "running" if self._began else "queued"
        error = self.outcome.exception()
        return "done" if error is None else "cancelled" if isinstance(error, JobCancelledError) else "failed"

    @property
    def has_ended(self) -> bool:
        return self.outcome.done()

    @property
    def progress(self) -> float:
        """The share of the evaluations that are done; of a job that was ended before, how far it came."""
        return 1.0 if self.state == "done" else self.evaluated

    @property
    def remaining_seconds(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def begin(self) -> bool:
        """Whether the job is still wanted; it runs from now on."""
        self.expire()
        self._began = True
        return not self.has_ended

    def succeed(self, made: Generation) -> None:
        self._end(lambda: self.outcome.set_result(made))

    def fail(self, error: BaseException) -> None:
        self._end(lambda: self.outcome.set_exception(error))

    def cancel(self) -> None:
        """End the job; a batch of which no job is wanted stops before its next evaluation."""
        self.fail(JobCancelledError("the job was cancelled"))

    def expire(self) -> None:
        """End the job where its time is over."""
        if not self.remaining_seconds:
            self.fail(JobTimeoutError(f"not finished within {self.timeout_seconds:g} s"))

    def _end(self, settle: Callable[[], None]) -> None:
        with suppress(InvalidStateError):  # it has ended already
            settle()
            self.ended_at = time.monotonic()


class WaitingLine:
    """Jobs in the order in which they came, at most `size` of them; threads put and take.

    Jobs that end while they wait, cancelled or too late, leave their places at once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._jobs: deque[Job] = deque()
        self._changed = Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            self._drop_ended()
            return len(self._jobs)

    def position(self, job: Job) -> int | None:
        """How many jobs are before this one; None where it does not wait."""
        with self._changed:
            return self._jobs.index(job) if job in self._jobs else None

    def put(self, job: Job, retry_after_seconds: Callable[[], int]) -> None:
        """Raises QueueFullError where there is no place, and DrainingError once the line is closed."""
        with self._changed:
            self._drop_ended()
            if self._closed:
                raise DrainingError("the server is shutting down: it finishes what it has, and takes nothing new")
            if len(self._jobs) >= self.size:
                raise QueueFullError(self.size, retry_after_seconds())
            self._jobs.append(job)
            self._changed.notify_all()

    def take(self, goes_with: Callable[[Job, Job], bool], most_clips: int, wait_seconds: float) -> list[Job]:
        """The first job, and those that go with it and are there or come within `wait_seconds`; nothing once closed.

        Waits for a first job; for others only as long as there is room for them among `most_clips`.
        """
        with self._changed:
            self._drop_ended()
            while not self._jobs:
                if self._closed:
                    return []
                self._changed.wait()
                self._drop_ended()
            batch = [self._jobs.popleft()]
            until = time.monotonic() + wait_seconds
            while self._gather(batch, goes_with, most_clips) and (left := until - time.monotonic()) > 0:
                if self._closed:
                    break
                self._changed.wait(left)
            return batch

    def _gather(self, batch: list[Job], goes_with: Callable[[Job, Job], bool], most_clips: int) -> bool:
        """Move what goes with the batch into it; whether another one could."""
        room = most_clips - sum(len(job.request.clips) for job in batch)
        for job in list(self._jobs):
            if len(job.request.clips) <= room and goes_with(batch[0], job):
                self._jobs.remove(job)
                batch.append(job)
                room -= len(job.request.clips)
        return room > 0 and goes_with(batch[0], batch[0])

    def drop_ended(self) -> None:
        """Give the places of jobs that have ended, or whose time is over, to others."""
        with self._changed:
            self._drop_ended()

    def _drop_ended(self) -> None:
        for job in list(self._jobs):
            job.expire()
            if job.has_ended:
                self._jobs.remove(job)

    def close(self) -> None:
        """Take nothing new; what waits is still given out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        return self._closed


class KeptJobs:
    """Jobs whose results are asked for later, by their ids; of those that ended, the newest.

    Args:
        most_jobs, most_bytes: of ended jobs, and of their samples; the oldest go first.
        seconds: that a job is kept after it ended.
    """

    def __init__(self, most_jobs: int, most_bytes: int, seconds: float) -> None:
        self._most_jobs, self._most_bytes, self._seconds = most_jobs, most_bytes, seconds
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = Lock()

    def add(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.id] = job
            self._forget_old()

    def get(self, job_id: str) -> Job:
        """Raises KeyError for a job that there is not, or no more."""
        with self._lock:
            self._forget_old()
            return self._jobs[job_id]

    def remove(self, job: Job) -> None:
        with self._lock:
            self._jobs.pop(job.id, None)

    def are_taken(self, since: float) -> bool:
        """Whether every clip of the jobs that were done since then, by the monotonic clock, has been fetched."""
        with self._lock:
            done = [job for job in self._jobs.values() if job.state == "done" and job.ended_at >= since]
        return all(len(job.taken) == len(job.request.clips) for job in done)

    def _forget_old(self) -> None:
        """From the newest to the oldest: what is beyond one of the three limits goes."""
        held, now = 0, time.monotonic()
        ended = [job for job in self._jobs.values() if job.has_ended]
        for count, job in enumerate(reversed(ended), start=1):
            held += num_bytes(job)
            if count > self._most_jobs or held > self._most_bytes or now - job.ended_at > self._seconds:
                del self._jobs[job.id]


def num_bytes(job: Job) -> int:
    """What the samples of an ended job take."""
    return job.outcome.result().audio.nbytes if job.state == "done" else 0
