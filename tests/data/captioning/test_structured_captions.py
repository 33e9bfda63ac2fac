"""Structured captions of a chat endpoint: behind the captions that they belong to, in a manifest that trains."""

import json
from pathlib import Path

import pytest
from chat_server import completion
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pytorch_lightning import Trainer

from foley.core.captions import plain_caption, split_caption, with_structured
from foley.core.config import PROJECT_ROOT
from foley.data.annotating import annotate, read_results
from foley.data.captioning.answers import write_captioned_manifest
from foley.data.captioning.chat import StructuredCaptioner
from foley.data.captioning.endpoint import ChatEndpoint, Prices
from foley.data.manifest import read_manifest

ROWS = (
    {"id": "one", "path": "1.wav", "caption": "A man speaks, then laughter", "license": "CC0"},
    {"id": "two", "path": "2.wav", "captions": ["Rain falls", "it rains <drops& end>"], "license": "CC0"},
)
ANSWERS = ("Answer: <man speaking & start>@<laughter& END>.", "<rain falling& all>", "I am sorry, I cannot hear it.")


def caption(server, tmp_path: Path) -> Path:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    server.script = [(200, {}, completion(answer)) for answer in ANSWERS]
    endpoint = ChatEndpoint(server.url, "tiny", api_key_env=None, backoff_seconds=0.01, max_attempts=2)
    captioner = StructuredCaptioner(endpoint, "Structure.", Prices(1.0, 2.0), concurrency=1)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(**options, enable_model_summary=False, devices=1)
    annotate(captioner, manifest, tmp_path / "out", trainer, batch_size=2)
    estimate = captioner.estimate(ROWS)
    assert (estimate.requests, estimate.completion_tokens) == (3, 120)
    return manifest


def test_each_caption_of_a_clip_has_its_structure_behind_it(server, tmp_path: Path) -> None:
    manifest = caption(server, tmp_path)
    asked = [request["messages"][-1]["content"] for request in server.requests]
    assert asked == ["A man speaks, then laughter", "Rain falls", "it rains"]  # what stood there is replaced
    path, written = write_captioned_manifest(manifest, tmp_path / "out")
    one, two = read_manifest(path)
    assert written == 2
    assert one.caption == "A man speaks, then laughter <man speaking& start>@<laughter& end>"
    assert [two.caption, *two.other_captions] == ["Rain falls <rain falling& all>", "it rains <it rains& all>"]
    assert plain_caption(one.caption) == ROWS[0]["caption"]
    assert split_caption(two.caption) == ("Rain falls", "<rain falling& all>")
    counted = {result["id"]: result["structured_answers"] for result in read_results(tmp_path / "out")}
    assert counted == {"one": 1, "two": 1}  # of the second row one answer was none
    paid = {result["id"]: result["completion_tokens"] for result in read_results(tmp_path / "out")}
    assert paid == {"one": 9, "two": 18}


@pytest.mark.parametrize("caption", ["rock & roll", "a <b> c", "me@home < you"])
def test_captions_may_hold_the_marks_of_structure(caption: str) -> None:
    both = with_structured(caption, "<music& all>@<steps& end>")
    assert split_caption(both) == (caption, "<music& all>@<steps& end>")
    assert with_structured(both, "<wind& mid>") == f"{caption} <wind& mid>"
    without = with_structured(caption, split_caption(caption)[1])  # as for an answer of another form
    assert split_caption(without) == split_caption(caption) == (caption, f"<{caption}& all>")


def test_the_recipe_asks_for_the_published_form(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        cfg = compose("script/caption", ["captioner=structured", "manifest=x", "out=y"])
    captioner = instantiate(cfg.captioner, _convert_="all")
    assert isinstance(captioner, StructuredCaptioner)
    assert captioner.endpoint.options == {"temperature": 0.0, "max_tokens": 160}
    answers = [part.split(". Caption")[0].rstrip(".") for part in captioner.instruction.split("Answer: ")[1:]]
    assert all(split_caption(answer)[1] == answer for answer in answers)
    assert len(answers) == 2
