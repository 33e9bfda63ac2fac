"""The engine: what becomes a batch, what ends a job, and that nothing else ends with it."""

from dataclasses import replace

import pytest
import torch
from gated_generators import PATIENCE_SECONDS, Gated, Held
from small_system import STEPS

from foley.accel import Fora
from foley.accel.combined import NoAcceleration, decides_by_batch
from foley.core import devices
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.prompts import Clip
from foley.generation.settings import GenerationSettings
from foley.serving.engine import Served
from foley.serving.jobs import (
    DEFAULT_ACCELERATOR,
    DrainingError,
    Job,
    JobCancelledError,
    JobTimeoutError,
    KeptJobs,
    QueueFullError,
    SoundRequest,
)

SETTINGS = GenerationSettings(**STEPS)


def request(prompt="rain", seed=0, num=1, accelerator=DEFAULT_ACCELERATOR, **changes):
    clips = tuple(Clip(prompt, seed + row) for row in range(num))
    if "guidance" in changes:  # as requests come: an object of its own each
        changes["guidance"] = ClassifierFreeGuidance(changes["guidance"])
    return SoundRequest("tiny", clips, replace(SETTINGS, **changes), accelerator)


def made(job):
    return job.outcome.result(PATIENCE_SECONDS)


def busy(engine, gated):
    """A job that runs, so that what is submitted now waits."""
    job = engine.submit(request(seed=1000, num_steps=2))
    assert gated.reached.wait(PATIENCE_SECONDS)
    return job


def test_what_waits_is_one_batch_and_each_clip_is_what_it_would_be_alone(start, generator):
    gated = Gated(generator, computes=True)
    engine = start(gated)
    busy(engine, gated)
    prompts = ["a dog barks", "rain on a tin roof while someone speaks", ""]
    jobs = [engine.submit(request(prompt, seed)) for seed, prompt in enumerate(prompts)]
    jobs.append(engine.submit(request("a bell", 3, num=2)))
    gated.gate.set()
    results = [made(job) for job in jobs]
    assert gated.batches == [[1000], [0, 1, 2, 3, 4]]
    for job, result in zip(jobs, results, strict=True):
        clips = job.request.clips
        alone = generator.generate([clip.prompt for clip in clips], seeds=[clip.seed for clip in clips], **STEPS)
        assert [clip.seed for clip in result.clips] == [clip.seed for clip in clips]
        torch.testing.assert_close(result.audio, alone.audio, atol=1e-4, rtol=1e-3)
    assert {result.rtf.batch_size for result in results} == {5}
    assert results[0].rtf.value == pytest.approx(results[3].rtf.value)  # shares of one time


def test_a_request_alone_is_to_the_bit_what_the_generator_makes(start, generator):
    result = made(start(generator).submit(request("a bell", 5, num=2)))
    assert torch.equal(result.audio, generator.generate(["a bell"] * 2, seeds=[5, 6], **STEPS).audio)
    assert result.settings["num_steps"] == STEPS["num_steps"]


def test_a_run_without_accelerator_counts_no_cost_and_is_that_of_the_generator(start, generator):
    plain = made(start(generator).submit(request("a bell", 5)))
    assert plain.tmacs is None
    assert plain.settings == generator.generate(["a bell"], seeds=[5], **STEPS).settings


OTHERS = [
    {"duration_seconds": 0.25},
    {"num_steps": 3},
    {"solver": "heun"},
    {"guidance": 5.0},
    {"negative_prompt": "speech"},
]


def test_requests_of_another_shape_have_batches_of_their_own(start, gated):
    engine = start(gated)
    busy(engine, gated)
    jobs = [
        engine.submit(request(seed=2 * row + again, **other)) for again in (0, 1) for row, other in enumerate(OTHERS)
    ]
    gated.gate.set()
    for job in jobs:
        made(job)
    assert gated.batches[1:] == [[2 * row, 2 * row + 1] for row in range(len(OTHERS))]


def test_batches_hold_no_more_clips_than_they_may_and_a_large_request_stays_whole(start, gated):
    engine = start(gated, batch_size=2)
    busy(engine, gated)
    jobs = [engine.submit(request(seed=seed, num=num)) for seed, num in ((0, 1), (10, 3), (20, 1), (30, 1))]
    gated.gate.set()
    for job in jobs:
        made(job)
    assert gated.batches[1:] == [[0, 20], [10, 11, 12], [30]]


def test_an_accelerator_that_decides_by_the_batch_gets_requests_one_by_one(start, gated):
    assert not decides_by_batch(Fora(interval=2))
    engine = start(gated)
    busy(engine, gated)
    jobs = [engine.submit(request(seed=seed, num=2, accelerator="mean")) for seed in (0, 10)]
    gated.gate.set()
    for job in jobs:
        made(job)
    assert gated.batches[1:] == [[0, 1], [10, 11]]


def test_requests_that_come_within_moments_share_a_batch(start, gated):
    gated.gate.set()
    engine = start(gated, batch_size=2, batch_wait_seconds=PATIENCE_SECONDS)  # a full batch waits for nobody
    jobs = [engine.submit(request(seed=seed)) for seed in (0, 1)]
    for job in jobs:
        made(job)
    assert gated.batches == [[0, 1]]


def test_a_full_line_refuses_and_a_cancelled_job_gives_its_place_away(start, gated):
    engine = start(gated, queue_size=2)
    busy(engine, gated)
    first, second = engine.submit(request(seed=1)), engine.submit(request(seed=2))
    assert (engine.position(first), engine.position(second), engine.num_waiting) == (0, 1, 2)
    with pytest.raises(QueueFullError, match="2 requests wait already; come again in") as refused:
        engine.submit(request(seed=3))
    assert refused.value.retry_after_seconds >= 1
    first.cancel()
    third = engine.submit(request(seed=3))
    gated.gate.set()
    assert made(second).clips[0].seed == 2
    assert made(third).clips[0].seed == 3
    assert first.state == "cancelled"
    assert engine.position(third) is None
    assert gated.batches[1:] == [[2, 3]]


def test_a_job_that_runs_is_cancelled_between_two_evaluations(start, generator):
    held = Held(at=1)
    engine = start(generator, {DEFAULT_ACCELERATOR: NoAcceleration(), "held": held})
    job = engine.submit(request(accelerator="held"))
    assert held.reached.wait(PATIENCE_SECONDS)
    job.cancel()
    held.gate.set()
    with pytest.raises(JobCancelledError):
        made(job)
    assert made(engine.submit(request(seed=1))).clips[0].seed == 1  # its turn comes only once the first has stopped
    assert (held.evaluations, held.ended, held.attached) == (2, 1, [])


def test_one_of_a_batch_is_cancelled_and_the_other_finished(start, generator):
    held = Held(at=1)
    engine = start(generator, {"held": held}, batch_size=2, batch_wait_seconds=PATIENCE_SECONDS)
    gone, stays = (engine.submit(request(seed=seed, accelerator="held")) for seed in (0, 1))
    assert held.reached.wait(PATIENCE_SECONDS)
    gone.cancel()
    held.gate.set()
    alone = generator.generate(["rain"], seeds=[1], **STEPS)
    torch.testing.assert_close(made(stays).audio, alone.audio, atol=1e-4, rtol=1e-3)
    assert (gone.state, stays.state) == ("cancelled", "done")
    assert gone.progress < stays.progress == 1  # it stays at where it was when it ended
    assert held.evaluations == STEPS["num_steps"]


def test_jobs_end_when_their_time_is_over_whether_they_run_or_wait(start, generator):
    held = Held(at=2)
    engine = start(generator, {DEFAULT_ACCELERATOR: NoAcceleration(), "held": held})
    runs, waits = engine.submit(request(accelerator="held")), engine.submit(request(seed=1))
    assert held.reached.wait(PATIENCE_SECONDS)
    for job in (runs, waits):
        job._deadline = 0.0
    held.gate.set()
    for job in (runs, waits):
        with pytest.raises(JobTimeoutError, match="not finished within 300 s"):
            made(job)
    assert made(engine.submit(request(seed=2))).clips[0].seed == 2
    assert held.evaluations == 3


def test_a_request_that_fails_takes_no_other_with_it(start, gated):
    engine = start(gated)
    busy(engine, gated)
    jobs = [engine.submit(request(prompt, seed)) for seed, prompt in enumerate(["rain", "bad", "wind"])]
    gated.gate.set()
    assert [made(job).clips[0].seed for job in (jobs[0], jobs[2])] == [0, 2]
    with pytest.raises(RuntimeError, match="not finite"):
        made(jobs[1])
    assert [job.state for job in jobs] == ["done", "failed", "done"]
    assert gated.batches[1:] == [[0, 1, 2], [0], [1], [2]]
    assert engine.is_alive


def test_what_was_taken_is_finished_and_nothing_new_is(start, gated):
    engine = start(gated)
    jobs = [busy(engine, gated), engine.submit(request(seed=1))]
    engine.stop_accepting()
    with pytest.raises(DrainingError, match="takes nothing new"):
        engine.submit(request(seed=2))
    assert not engine.is_idle
    gated.gate.set()
    engine.close(drain_seconds=PATIENCE_SECONDS)
    assert [job.state for job in jobs] == ["done", "done"]
    assert engine.is_idle


def test_what_is_not_finished_when_it_closes_is_cancelled(start, generator):
    held = Held(at=1)
    engine = start(generator, {"held": held})
    jobs = [engine.submit(request(seed=seed, accelerator="held", num_steps=3 + seed)) for seed in (0, 1)]
    assert held.reached.wait(PATIENCE_SECONDS)
    held.gate.set()
    engine.close()
    assert {job.state for job in jobs} <= {"cancelled", "done"}
    assert jobs[1].state == "cancelled"


def test_progress_is_the_share_of_evaluations_over_all_batches_of_a_request(start, generator):
    seen = []

    class Watching(NoAcceleration):
        def on_evaluation_start(self, context):
            seen.append(job.progress)

    engine = start(generator, {"watching": Watching()}, batch_size=1, batch_wait_seconds=0.2)
    job = engine.submit(request(num=2, accelerator="watching"))
    made(job)
    assert seen == [number / 8 for number in range(8)]
    assert job.progress == 1


def test_what_the_system_cannot_do_waits_for_no_turn(start, gated):
    engine = start(gated)
    with pytest.raises(ValueError, match="unknown solver"):
        engine.submit(request(solver="magic"))
    assert engine.is_idle
    assert gated.batches == []


def test_a_system_whose_prompts_are_paths_is_not_served(generator, monkeypatch):
    monkeypatch.setattr(type(generator.text), "prompt_field", "id")
    with pytest.raises(ValueError, match="paths of files"):
        Served(generator)


def test_of_kept_jobs_the_newest_stay(generator):
    result = generator.generate(["rain"], **STEPS)

    def ended():
        job = Job(request(), 60.0)
        job.succeed(result)
        return job

    for most_jobs, most_bytes in ((2, 1 << 20), (10, 2 * result.audio.nbytes)):
        kept = KeptJobs(most_jobs, most_bytes, seconds=60.0)
        jobs = [Job(request(), 60.0), *(ended() for _ in range(3))]
        for job in jobs:
            kept.add(job)
        assert [kept.get(job.id) for job in (jobs[0], *jobs[2:])] == [jobs[0], *jobs[2:]]
        with pytest.raises(KeyError):
            kept.get(jobs[1].id)
        assert not kept.are_taken(jobs[3].ended_at)
        for job in jobs[2:]:
            job.taken.add(0)
        assert kept.are_taken(jobs[3].ended_at)
    forgetful = KeptJobs(2, 1 << 20, seconds=-1.0)
    forgetful.add(jobs[3])
    with pytest.raises(KeyError):
        forgetful.get(jobs[3].id)


def test_auto_is_every_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.resolve_devices("auto") == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert devices.resolve_devices(["cuda:1", "cpu"]) == [torch.device("cuda", 1), torch.device("cpu")]
    with pytest.raises(ValueError, match=r"cuda:2: there is none here"):
        devices.resolve_devices(["cuda:2"])
    with pytest.raises(ValueError, match=r"device=\[\]"):
        devices.resolve_devices([])
