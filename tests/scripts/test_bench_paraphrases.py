"""Known wordings against paraphrases: which are asked for, and what is counted of them."""

import json
from pathlib import Path

import pytest
import torch
from commands import load_command, run_command

from foley.data.wordings import LabelWordings, Wordings

BENCH = load_command("bench/paraphrases")
TABLE = Wordings(
    {
        "rain": LabelWordings(held_out=["it is wet", "drops"]),
        "step": LabelWordings(["a step"], {"a step on ice": ["ice cracks"]}, ["a foot"]),
        "door": LabelWordings(["a door"]),
    }
)


def test_known_wordings_are_those_that_a_system_was_trained_on() -> None:
    known = BENCH["known_wordings"]
    assert known("step", TABLE, ()) == ["a step", "a step on ice", "ice cracks"]
    assert known("step", TABLE, {"a step on ice", "a bell"}) == ["a step on ice"]
    assert known("rain", TABLE, {"it is raining", "rain falls"}) == ["rain falls", "it is raining"]  # of the class


def test_pairs_take_wordings_in_turn_with_a_seed_each_and_leave_out_what_has_none() -> None:
    trained_on = {"rain falls", "it is raining", "a step", "a door"}
    pairs = BENCH["pairs_of"](["rain", "door", "whale", "step"], TABLE, trained_on, 3)
    assert [(pair.label, pair.known, pair.held_out, pair.near) for pair in pairs] == [
        ("rain", "rain falls", "it is wet", True),
        ("rain", "it is raining", "drops", False),
        ("rain", "rain falls", "it is wet", True),
        *[("step", "a step", "a foot", True)] * 3,
    ]
    assert [pair.seed for pair in pairs] == list(range(6))
    with pytest.raises(ValueError, match="trained on 'a foot', which the wordings hold out of 'step'"):
        BENCH["pairs_of"](["step"], TABLE, {"a step", "a foot"}, 1)
    with pytest.raises(ValueError, match="no label has"):
        BENCH["pairs_of"](["door"], TABLE, (), 1)


def test_ratios_are_of_shares_and_pairs_cancel() -> None:
    known = torch.tensor([True] * 30 + [False] * 10)
    same = BENCH["row"](known, known)
    assert (same["ratio"], same["ratio_low"], same["ratio_high"]) == (1.0, 1.0, 1.0)  # as both are drawn together
    half = BENCH["row"](known, torch.tensor([True] * 15 + [False] * 25))
    assert (half["n"], half["known"], half["held_out"], half["ratio"]) == (40, 0.75, 0.375, 0.5)
    assert half["held_out_low"] < 0.375 < half["held_out_high"]
    assert 0 < half["ratio_low"] < 0.5 < half["ratio_high"] < 1
    none = BENCH["row"](torch.zeros(4, dtype=torch.bool), known[:4])
    assert (none["known"], none["ratio"], none["ratio_low"]) == (0.0, None, None)


def test_rows_by_group_count_a_label_once_and_labels_that_lose_most_come_first() -> None:
    pairs = BENCH["pairs_of"](["rain", "step"], TABLE, (), 2)
    known, held_out = torch.tensor([True, True, True, True]), torch.tensor([True, True, False, True])
    groups = {"made": ["rain"], "recorded": ["rain", "step"], "spoken": ["one"]}
    rows = BENCH["rows_of"](pairs, groups, known, held_out)
    assert [(row["group"], row["n"], row["held_out"]) for row in rows] == [
        ("all", 4, 0.75),
        ("near", 3, pytest.approx(2 / 3)),
        ("far", 1, 1.0),
        ("made", 2, 1.0),
        ("recorded", 2, 0.5),
    ]
    assert BENCH["label_rows"](pairs, known, held_out) == [
        {"label": "step", "n": 2, "known": 1.0, "held_out": 0.5},
        {"label": "rain", "n": 2, "known": 1.0, "held_out": 1.0},
    ]


@pytest.mark.slow
def test_the_system_that_ships_is_asked(tmp_path: Path) -> None:
    run_command(
        "bench/paraphrases", "labels=[rain,five]", "seeds=1", "steps=1", "duration_seconds=1", f"output_dir={tmp_path}"
    )
    found = json.loads((tmp_path / "paraphrases.json").read_text())
    groups = [(row["judge"], row["group"], row["n"]) for row in found["rows"]]
    assert groups == [
        (judge, group, n)
        for judge in ("first", "second")
        for group, n in (("all", 2), ("near", 2), ("procedural", 1), ("fsdd", 1))
    ]
    with pytest.raises(ValueError, match="not every extractor knows them"):
        run_command("bench/paraphrases", "labels=[unicorn]", f"output_dir={tmp_path}")
