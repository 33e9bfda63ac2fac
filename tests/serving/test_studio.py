"""What the page does, without its fields: requests of the API, files, histories, and times that are compared."""

import asyncio
import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import soundfile
import torch
from gated_generators import PATIENCE_SECONDS, Held
from small_system import STEPS

from foley.accel.combined import NoAcceleration
from foley.generation.novelty import KnownCaptions
from foley.generation.options import MAX_PROMPT_CHARACTERS
from foley.serving.jobs import DEFAULT_ACCELERATOR, KeptJobs
from foley.serving.service import Limits, Service
from foley.serving.studio import (
    Session,
    Studio,
    accelerator_names,
    examples,
    forget_oldest,
    models,
    say_marks,
    sliders,
    strength_range,
    unaccelerated,
)

FIELDS = {
    "kind": "generate",
    "prompt": "a dog barks",
    "model": "tiny",
    "accelerator": "none",
    "seed": 7,
    "num": 1,
    "steps": STEPS["num_steps"],
    "duration_seconds": STEPS["duration_seconds"],
}
EDIT = {name: value for name, value in FIELDS.items() if name != "duration_seconds"} | {
    "kind": "edit",
    **{"mask_start_seconds": 0.2, "mask_length_seconds": 0.1, "boundary_seconds": 0.2},
}


class Idle(NoAcceleration):
    """Stands for an accelerator."""


@pytest.fixture
def drawing_studio(start, generator, tmp_path):
    service = Service(start(generator, named()), Limits(3, 20, 1 << 20, 120.0), KeptJobs(10, 1 << 20, 60.0))
    return Studio(service, tmp_path / "takes", 1 << 20)


@pytest.fixture
def studio(drawing_studio, monkeypatch):
    """Without pictures, which take longer than these sounds."""
    monkeypatch.setattr("foley.serving.studio.draw_sheet", lambda path, *clips: path.write_bytes(b"picture"))
    return drawing_studio


def named(**more):
    return {DEFAULT_ACCELERATOR: NoAcceleration(), "none": NoAcceleration(), "idle": Idle(), **more}


def make(studio, session, compare=False, fields=FIELDS, **changes):
    """The stages of a request, all of them."""

    async def collect():
        return [stage async for stage in studio.make(session, {**fields, **changes}, compare)]

    return asyncio.run(collect())


def test_a_take_is_the_wav_of_the_command_line_with_its_settings_and_a_picture(drawing_studio, generator, tmp_path):
    session = Session()
    take = make(drawing_studio, session)[-1].take
    stem = generator.generate(["a dog barks"], seeds=[7], **STEPS).write_clip(tmp_path, 0, 0)
    assert take.file("wav").read_bytes() == (tmp_path / f"{stem}.wav").read_bytes()
    assert json.loads(take.file("json").read_text())["seed"] == 7
    assert take.file("png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in take.folder.iterdir()} == {"foley_7.wav", "foley_7.json", "foley_7.png"}
    assert session.choices() == [("a dog barks | seed 7, 0.5 s, tiny", take.folder.name)]
    assert session.find(take.folder.name) == take
    assert (session.find("../../etc"), session.find(None)) == (None, None)


def test_several_clips_are_so_many_takes_and_the_newest_request_comes_first(studio):
    session = Session()
    make(studio, session, num=2)
    make(studio, session, seed=1)
    assert [take.seed for take in session.takes] == [1, 7, 8]
    assert len({take.folder for take in session.takes}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}, f"prompt: String should have at most {MAX_PROMPT_CHARACTERS}"),
        ({"num": 4}, "num=4: give a whole number <= 3"),
        ({"steps": 21}, "steps=21: give a whole number <= 20"),
        ({"duration_seconds": 6}, "duration_seconds=6.0: give a number <= 5.0"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"accelerator": "other"}, "accelerator must be one of default, none, idle, got 'other'"),
        ({"_target_": "os.system"}, "_target_: Extra inputs are not permitted"),
    ],
)
def test_what_the_api_refuses_the_page_refuses_in_its_words(studio, changes, message):
    session = Session()
    with pytest.raises(ValueError, match=message):
        make(studio, session, **changes)
    assert (session.takes, session.jobs) == ([], set())


def test_an_edit_keeps_what_is_outside_and_its_file_lies_nowhere_that_is_said(studio, tmp_path):
    path = tmp_path / "tone.wav"
    samples = 0.1 * torch.sin(torch.arange(1000) / 5)
    soundfile.write(path, samples.numpy(), 2000)
    original = soundfile.read(path, dtype="float32")[0]
    wave = studio.waveform(str(path))
    assert (wave["seconds"], wave["start"], wave["length"]) == (0.5, 0.17, 0.17)
    assert wave["outline"].startswith("M0.000,")
    take = make(studio, Session(), fields=EDIT, file=str(path))[-1].take
    made = soundfile.read(io.BytesIO(take.file("wav").read_bytes()), dtype="float32")[0]
    kept = [*range(400), *range(600, 1000)]
    assert (made[kept] == original[kept]).all()
    assert (made[400:600] != original[400:600]).any()
    assert str(tmp_path) not in take.file("json").read_text()
    assert take.title.startswith("edit: a dog barks | seed 7")


def test_more_parts_are_made_anew_beside_the_one_that_was_dragged(studio, tmp_path):
    path = tmp_path / "tone.wav"
    samples = 0.1 * torch.sin(torch.arange(1000) / 5)
    soundfile.write(path, samples.numpy(), 2000)
    original = soundfile.read(path, dtype="float32")[0]
    take = make(studio, Session(), fields=EDIT, file=str(path), more_parts="[[0.05, 0.1]]")[-1].take
    made = soundfile.read(io.BytesIO(take.file("wav").read_bytes()), dtype="float32")[0]
    kept = [*range(100), *range(300, 400), *range(600, 1000)]
    assert (made[kept] == original[kept]).all()
    for part in (slice(100, 300), slice(400, 600)):
        assert (made[part] != original[part]).any()
    with pytest.raises(ValueError, match="masks=7: give one pair of seconds for each part"):
        make(studio, Session(), fields=EDIT, file=str(path), more_parts="7")


def test_what_is_no_recording_is_refused_without_its_place(studio, tmp_path):
    (tmp_path / "words.wav").write_text("no audio")
    with pytest.raises(ValueError, match="give an audio file that can be read") as refused:
        studio.waveform(str(tmp_path / "words.wav"))
    assert str(tmp_path) not in str(refused.value)
    assert studio.waveform(None) is None


def test_what_was_saved_is_said_of_a_request_that_was_made_both_ways_alone(studio):
    session = Session()
    alone = make(studio, session, accelerator="idle")[-1].take
    assert "not measured" in studio.say(session, alone)
    plain = make(studio, session)[-1].take
    said = studio.say(session, alone)
    assert f"{alone.denoise_seconds:.2f} s instead of {plain.denoise_seconds:.2f} s" in said
    assert "made by itself, in this session" in said
    assert "instead of" not in studio.say(session, plain)
    other = make(studio, session, accelerator="idle", seed=8)[-1].take
    assert "not measured" in studio.say(session, other)


def test_to_compare_makes_both_the_accelerated_one_first(studio):
    session = Session()
    stages = make(studio, session, compare=True, accelerator="idle")
    assert [take.accelerator for take in session.takes] == ["none", "idle"]
    assert stages[-1].take == session.takes[1]
    assert "made for this comparison" in studio.say(session, stages[-1].take)
    assert stages[-2].words == "Made (without acceleration)"
    make(studio, session, compare=True)  # nothing to compare with
    assert len(session.takes) == 3


def test_a_visitor_cancels_and_one_who_leaves_does_so_too(start, generator, tmp_path):
    held = Held(at=1)
    engine = start(generator, named(held=held))
    studio = Studio(Service(engine, Limits(8, 200, 1 << 20, 120.0), KeptJobs(10, 1 << 20, 60.0)), tmp_path, 1 << 20)
    session = Session()

    async def cancel(end):
        async for stage in studio.make(session, {**FIELDS, "accelerator": "held"}, False):
            if stage.words.startswith("Denoising") and held.reached.wait(PATIENCE_SECONDS):
                end()
                held.gate.set()

    with pytest.raises(ValueError, match="the job was cancelled"):
        asyncio.run(cancel(session.cancel))
    make_one = make(studio, session)[-1].take
    assert make_one.folder.exists()
    studio.leave(session)
    assert (session.takes, make_one.folder.exists()) == ([], False)


def test_files_are_bounded_over_all_visitors(studio, tmp_path):
    first, second = Session(), Session()
    size = sum(file.stat().st_size for file in make(studio, first)[-1].take.folder.iterdir())
    tight = Studio(studio.service, tmp_path / "tight", int(1.5 * size))
    oldest = make(tight, first)[-1].take
    make(tight, second)
    assert not oldest.folder.exists()
    assert [folder for _, folder in second.choices()] == [second.takes[0].folder.name]
    assert oldest.folder.name not in dict(map(reversed, first.choices()))


def test_of_copies_the_oldest_go_until_the_rest_is_few_enough(tmp_path):
    for age, name in enumerate(["new", "one/old", "two/older"]):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(10))
        os.utime(file, (1000 - age, 1000 - age))
    forget_oldest(tmp_path, 30)
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 3
    forget_oldest(tmp_path, 29)
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["new", "old"]
    forget_oldest(tmp_path / "nothing", 0)


def test_sliders_have_the_limits_of_the_api_and_begin_where_the_system_would(studio, generator):
    spans = sliders(studio.service, "tiny")
    assert (spans["num"].least, spans["num"].most, spans["num"].value) == (1, 3, 1)
    assert (spans["steps"].least, spans["steps"].most, spans["steps"].value) == (1, 20, 20)
    duration = spans["duration_seconds"]
    assert (duration.least, duration.most, duration.value) == (0.1, 5.0, generator.default_duration_seconds)
    assert (spans["guidance_scale"].least, spans["guidance_scale"].value) == (0, 3.0)
    assert (strength_range().least, strength_range().most) == (0, 1)
    assert not math.isnan(strength_range().value)


def test_examples_are_known_captions_evenly_spaced(studio, generator, monkeypatch):
    assert examples(studio.service) == []
    monkeypatch.setattr(generator, "known_captions", KnownCaptions([f"sound {number}" for number in range(80)]))
    assert examples(studio.service) == [f"sound {number}" for number in range(0, 80, 10)]


def test_a_student_is_switched_to_and_no_system_of_its_own(studio):
    served = studio.service.engine.models["tiny"]
    studio.service.engine.models |= {"tiny-student": served, "other-student": served}
    assert models(studio.service) == ["tiny", "other-student"]
    assert unaccelerated(served) == "none"
    assert accelerator_names(served) == ["none", "idle"]


def test_the_page_says_what_files_hold(studio):
    said = say_marks(studio.service)
    assert "Provenance is on" in said
    assert "Watermark is off" in said


def test_files_are_forgotten_by_requests_at_once(tmp_path):
    for round_number in range(8):
        for index in range(200):
            (tmp_path / f"{round_number}_{index}.wav").write_bytes(b"x")
        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(forget_oldest, tmp_path, 0) for _ in range(4)]
        assert [each.exception() for each in done] == [None] * 4
        assert not list(tmp_path.iterdir())
