import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from foley.cli.overrides import quote_overrides
from foley.generation.prompts import Clip, PromptColumns, read_prompts, request_clips


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a dog\n\n  rain, heavy  \n"),
        ("a.csv", '\ufeffid,caption\n1,a dog\n2,"rain, heavy"\n'),
        ("a.jsonl", '{"caption": "a dog"}\n\n{"caption": "rain, heavy", "id": 2}\n'),
    ],
)
def test_prompts_are_read_from_every_format(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["a dog", "rain, heavy"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "holds no prompt"),
        (
            "a.csv",
            "id,text\n1,dog\n",
            r"line 1: lacks .*'caption'.*, has .*'id', 'text'.*; set caption_column=",
        ),
        ("a.jsonl", '{"caption": "dog"}\n{"text": "dog"}\n', "line 2"),
        ("a.jsonl", "{dog}\n", "line 1: not valid UTF-8 JSON"),
    ],
)
def test_unusable_files_are_refused_with_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_prompts(tmp_path / "none.txt")


def test_clips_are_prompts_times_seeds():
    assert request_clips("dog", None, 3, 2) == [Clip("dog", 3), Clip("dog", 4)]
    assert request_clips("", None, 0, 1) == [Clip("", 0)]
    for bad in [(None, None, 0, 1), ("dog", "file", 0, 1), ("dog", None, 0, 0)]:
        with pytest.raises(ValueError, match=r"prompt=|num=0: give a whole number >= 1"):
            request_clips(*bad)


@pytest.mark.parametrize(
    "prompt",
    [
        "a dog, barking",
        "",
        "it's {odd} [text] a=b:c",
        "${oc.env:HOME}",
        "back\\slash\\",
        "🐕 $5 #1",
        "\\'",
        "null",
        "12",
    ],
)
def test_a_prompt_survives_the_command_line(prompt):
    quoted = quote_overrides([f"prompt={prompt}", "seed=1"])
    assert quoted[1] == "seed=1"
    override = OverridesParser.create().parse_override(quoted[0])
    assert OmegaConf.create({"prompt": override.value()}).prompt == prompt


def test_a_files_labels_and_ids_travel_with_its_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"caption": "a bell", "label": "bell", "id": "b1"}\n{"caption": "rain"}\n')
    once, twice = request_clips(None, str(file), 5, 1), request_clips(None, str(file), 5, 2)
    assert once == [Clip("a bell", 5, {"label": "bell", "id": "b1"}), Clip("rain", 6)]
    assert [clip.notes for clip in twice[:2]] == [{"label": "bell"}] * 2
    assert len({clip.seed for clip in twice}) == 4


def test_a_manifest_as_prompts_gives_its_own_ids(tmp_path):
    file = tmp_path / "clips.csv"
    file.write_text("path,caption\na.wav,a bell\nb.wav,rain\n")
    assert [clip.notes for clip in request_clips(None, str(file), 0, 1)] == [{"id": "a.wav"}, {"id": "b.wav"}]
    file.write_text("path,caption\na.wav,a bell\na.wav,rain\n")
    assert [clip.notes for clip in request_clips(None, str(file), 0, 1)] == [{}, {}]
    first = request_clips(None, str(file), 0, 1, captions="first")
    assert [(clip.prompt, clip.notes) for clip in first] == [("a bell", {"id": "a.wav"})]


def test_lists_of_captions_are_rows_of_one_recording(tmp_path):
    file = tmp_path / "clips.jsonl"
    file.write_text('{"path": "a.wav", "id": "a", "texts": ["a bell", "a gong"]}\n')
    columns = PromptColumns("texts")
    every = request_clips(None, str(file), 0, 1, columns)
    assert [(clip.prompt, clip.notes["id"]) for clip in every] == [("a bell", "a"), ("a gong", "a#2")]
    assert [clip.prompt for clip in request_clips(None, str(file), 0, 1, columns, "first")] == ["a bell"]


def test_a_split_of_a_manifest_is_asked_for_by_any_of_its_names(tmp_path):
    file = tmp_path / "clips.csv"
    file.write_text("path,caption,split\na.wav,rain,train\nb.wav,wind,evaluation\nc.wav,surf,\n")
    for split, captions in ((None, ["rain", "wind", "surf"]), ("test", ["wind"]), ("training", ["rain"])):
        assert [clip.prompt for clip in request_clips(None, str(file), 0, 1, split=split)] == captions
    with pytest.raises(ValueError, match=r"split=val: the file has none of it, only \['', 'evaluation', 'train'\]"):
        request_clips(None, str(file), 0, 1, split="val")
    with pytest.raises(ValueError, match=r"no column 'fold' .* set split_column=, or split=null"):
        request_clips(None, str(file), 0, 1, PromptColumns(split="fold"), split="test")
