"""The judges of sets of clips: who is asked, and of which clips."""

import json

import pytest
from commands import load_command, run_command

from foley.core.config import shipped
from foley.data.audio import write_wav
from foley.data.procedural import ProceduralDataset
from foley.metrics.features import ClipFile
from foley.metrics.recogniser import WordRecogniser

JUDGE = load_command("script/judge")
LABELLED = ((2, "two"), (7, "seven"), (3, "rain"))


def test_both_extractors_judge_a_folder_and_what_lies_about_its_label(tmp_path):
    for index in range(4):
        item = ProceduralDataset(4, 7, 2.0, 24000).render(index, 0)
        write_wav(tmp_path / f"clips/{index}.wav", item.audio, 24000)
        label = item.label if index else "seven"
        (tmp_path / f"clips/{index}.json").write_text(json.dumps({"label": label}))
    run_command("script/judge", f"sets={{made: {tmp_path}/clips}}", "spoken_group=null", f"output_dir={tmp_path}")
    rows = json.loads((tmp_path / "judges.json").read_text())["rows"]
    found = {(row["judge"], row["group"]): (row["set"], row["hits"], row["n"]) for row in rows}
    assert found == {
        ("first", "procedural"): ("made", 3, 3),
        ("first", "fsdd"): ("made", found["first", "fsdd"][1], 1),
        ("second", "procedural"): ("made", 3, 3),
        ("second", "fsdd"): ("made", found["second", "fsdd"][1], 1),
    }
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_the_recogniser_hears_labelled_words_alone(shared):
    pytest.importorskip("pocketsphinx")
    clips = [ClipFile(shared / f"data/fsdd/{digit}_theo_0.flac", str(digit), label) for digit, label in LABELLED]
    recogniser = WordRecogniser(["two", "seven"])
    (row,) = JUDGE["by_recogniser"](clips, "fsdd", recogniser)
    assert (row["hits"], row["n"]) == (2, 2)
    assert JUDGE["by_recogniser"](clips[2:], "fsdd", recogniser) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["sets=clips.jsonl"], r"sets=clips\.jsonl: give sets by name"),
        (["sets={a: FOLDER}", "spoken_group=digits"], "spoken_group must be one of .*fsdd.* got 'digits'"),
        (["sets={a: FOLDER}", "spoken_group=null"], "no clip has a label of a group that the judges know"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_words(tmp_path, options, words):
    write_wav(tmp_path / "clips/a.wav", ProceduralDataset(1, 7, 2.0, 24000).render(0, 0).audio, 24000)
    options = [option.replace("FOLDER", f"{tmp_path}/clips") for option in options]
    with pytest.raises(ValueError, match=words):
        run_command("script/judge", *options, f"output_dir={tmp_path}")
    assert not (tmp_path / "judges.json").exists()


def test_the_second_extractor_ships_beside_the_first():
    assert {file.name for file in shipped("second_extractor").iterdir()} == {
        file.name for file in shipped("extractor").iterdir()
    }
