"""The benchmark of a new word: a sound that can be told from all others, and a whole run in small."""

import json
from pathlib import Path

import pytest
import torch
from commands import load_command, run_command


def test_clips_of_the_sound_are_drawn_anew_by_seed_and_index() -> None:
    make = load_command("bench/new_word")["clips_of_it"]
    first, again, other = make(3, 0, 2.0, 24000), make(3, 0, 2.0, 24000), make(3, 1, 2.0, 24000)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])
    for clip in first:
        assert (clip.shape, clip.dtype) == ((48000,), torch.float32)
        assert float(clip.abs().max()) == pytest.approx(0.7)


@pytest.mark.slow
def test_a_run_in_small_writes_a_row_with_and_without_adapters(tmp_path: Path) -> None:
    recipe = "trainer.max_steps=2 lr_schedule.warmup_steps=0 task.prior.count=1 task.prior.num_steps=1"
    small = ("own_clips=4", "clips=2", "clips_of_class=1", "steps=1", "device=cpu")
    run_command("bench/new_word", f"recipe='{recipe}'", *small, f"output_dir={tmp_path}", f"work_dir={tmp_path}")
    found = json.loads((tmp_path / "new_word.json").read_text())
    assert [(row["scale"], row["n"], row["known_n"]) for row in found["rows"]] == [(0.0, 2, 32), (1.0, 2, 32)]
    assert (found["training"]["clips"], found["training"]["steps"]) == (4, 2)
    assert found["training"]["megabytes"] < 5
    sound, codec = found["best"]["sound"], found["best"]["codec"]
    assert sound["n"] == codec["n"] == 2
    assert sound["nearest_distance"] < min(row["nearest_distance"] for row in found["rows"])
