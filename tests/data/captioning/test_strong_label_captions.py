"""Captions from strong labels, end to end: through Lightning, killed and resumed, with faults and costs."""

import json
import subprocess
import sys
import time

import pytest
from chat_server import completion
from hydra import compose, initialize_config_dir
from pytorch_lightning import Trainer

from foley.core.config import PROJECT_ROOT
from foley.core.sharding import Shard
from foley.data.annotating import AnnotationError, annotate, pending_rows, read_results
from foley.data.captioning.answers import write_captioned_manifest
from foley.data.captioning.endpoint import ChatEndpoint, Prices, estimate_cost
from foley.data.captioning.strong_labels import StrongLabelCaptioner
from foley.data.manifest import read_manifest


@pytest.fixture
def captioner(server):
    def build(instruction: str = "Caption.", concurrency: int = 2) -> StrongLabelCaptioner:
        endpoint = ChatEndpoint(server.url, "tiny", api_key_env=None, backoff_seconds=0.01, max_attempts=2)
        return StrongLabelCaptioner(endpoint, instruction, Prices(1.0, 2.0), concurrency)

    return build


def run(captioner, manifest, out):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    annotate(captioner, manifest, out, Trainer(**options, enable_model_summary=False, devices=1), batch_size=2)


def faults(out):
    return [json.loads(line) for path in out.glob("faults-*") for line in path.read_text().splitlines()]


def test_captions_with_provenance(captioner, strong_manifest, tmp_path, server):
    server.script = [(200, {}, completion(' "A dog\nbarks." '))]
    run(captioner(concurrency=1), strong_manifest(1), tmp_path / "out")
    (result,) = read_results(tmp_path / "out")
    date = result.pop("date")
    assert result == {
        "id": "clip0",
        "caption": "A dog barks.",
        "source": "strong_labels",
        "model": "tiny",
        "prompt_sha256": captioner().identity["prompt_sha256"],
        "description": "Clip of 10.0 s: dog 0.5-1.0 s.",
        "prompt_tokens": 50,
        "completion_tokens": 9,
    }
    assert date.endswith("+00:00")
    path, written = write_captioned_manifest(tmp_path / "manifest.jsonl", tmp_path / "out")
    (entry,) = read_manifest(path)
    assert (written, entry.caption, entry.license) == (1, "A dog barks.", "CC0")
    assert json.loads(path.read_text())["captioning"]["model"] == "tiny"


def test_faults_are_listed_and_tried_again_and_nothing_is_asked_twice(captioner, strong_manifest, tmp_path, server):
    manifest, out = strong_manifest(5), tmp_path / "out"
    with manifest.open("a") as stream:
        stream.write('{"id": "clip5", "path": "../5.wav", "caption": "x"}\n')
        stream.write('{"id": "clip6", "path": "6.wav", "caption": "x", "events": [[0, "soon", "Dog"]]}\n{"torn')
    server.script = [(400, {}, b"refused")]
    run(captioner(concurrency=1), manifest, out)
    assert sorted((fault["line"], fault.get("id")) for fault in faults(out)) == [
        (1, "clip0"),
        (6, None),
        (7, "clip6"),
        (8, None),
    ]
    assert len(server.requests) == 5
    assert {result["id"] for result in read_results(out)} == {"clip1", "clip2", "clip3", "clip4"}
    run(captioner(concurrency=1), manifest, out)
    assert len(server.requests) == 6
    assert {fault["line"] for fault in faults(out)} == {6, 7, 8}
    assert write_captioned_manifest(manifest, out)[1] == 5


def test_a_killed_run_goes_on_at_the_clip(captioner, strong_manifest, tmp_path, server):
    manifest, out = strong_manifest(6), tmp_path / "out"
    server.script = [None, None, None, (401, {}, b"the key was withdrawn")]
    with pytest.raises(AnnotationError, match="answers 401: the key was withdrawn"):
        run(captioner(concurrency=1), manifest, out)
    assert len(list(read_results(out))) == 3
    with (out / "results-rank0000.jsonl").open("a") as stream:
        stream.write('{"id": "clip3", "capt')
    server.requests.clear()
    run(captioner(concurrency=1), manifest, out)
    assert len(server.requests) == 3
    assert sorted(result["id"] for result in read_results(out)) == [f"clip{n}" for n in range(6)]


def test_results_of_two_prompts_do_not_mix(captioner, strong_manifest, tmp_path):
    manifest, out = strong_manifest(1), tmp_path / "out"
    run(captioner(), manifest, out)
    with pytest.raises(AnnotationError, match="choose another folder"):
        run(captioner("Another instruction."), manifest, out)


def test_a_service_that_fails_at_every_row_ends_the_run(captioner, strong_manifest, tmp_path, server):
    server.script = [(400, {}, b"no")] * 30
    with pytest.raises(AnnotationError, match=r"21 rows in a row have no result; the last: .* answers 400"):
        run(captioner(), strong_manifest(30), tmp_path / "out")
    assert len(faults(tmp_path / "out")) == 22


def test_ranks_share_out_every_row_once_whatever_is_finished(strong_manifest, tmp_path):
    manifest = strong_manifest(7)
    (tmp_path / "results-rank0004.jsonl").write_text('{"id": "clip3"}\n')
    shares = [[row["id"] for _, row in pending_rows(manifest, tmp_path, ("id",), Shard(rank, 3))] for rank in range(3)]
    assert shares == [["clip0", "clip6"], ["clip1", "clip4"], ["clip2", "clip5"]]


def test_the_estimate_is_arithmetic(captioner, strong_manifest, tmp_path):
    estimate = estimate_cost("s" * 36, ["u" * 44] * 1000, 30, Prices(1.0, 2.0))
    assert (estimate.requests, estimate.prompt_tokens, estimate.completion_tokens) == (1000, 28_000, 30_000)
    assert estimate.usd == pytest.approx(0.028 + 0.06)
    rows = [row for _, row in pending_rows(strong_manifest(3), tmp_path / "out", ("id",))]
    assert captioner().estimate([*rows, {"id": "without events"}]).requests == 3


def test_configs_hold_no_key():
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        cfg = compose("script/caption", ["captioner=strong_labels", "manifest=m", "out=o"])
    assert cfg.captioner.endpoint.api_key_env == "OPENAI_API_KEY"
    assert not [name for name in cfg.captioner.endpoint if name in ("key", "api_key", "token")]


def test_rows_at_fault_do_not_end_the_run(captioner, tmp_path, write_jsonl, server):
    bad = [{"id": f"bad{n}", "path": "a.wav", "caption": "x"} for n in range(30)]
    good = {"id": "good", "path": "b.wav", "caption": "x", "events": [[0, 1, "Dog"]]}
    run(captioner(), write_jsonl(*bad, good), tmp_path / "out")
    assert (len(faults(tmp_path / "out")), len(list(read_results(tmp_path / "out"))), len(server.requests)) == (
        30,
        1,
        1,
    )


@pytest.mark.slow
def test_a_run_killed_while_it_waits_goes_on(strong_manifest, tmp_path, server):
    manifest, out = strong_manifest(6), tmp_path / "out"
    server.script = [None] * 4 + [300.0]
    command = [sys.executable, str(PROJECT_ROOT / "scripts" / "caption.py"), "captioner=strong_labels", "batch_size=1"]
    endpoint = [f"captioner.endpoint.base_url={server.url}", "captioner.endpoint.api_key_env=null"]
    process = subprocess.Popen([*command, *endpoint, f"manifest={manifest}", f"out={out}"])
    while len(server.requests) < 5 and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert [result["id"] for result in read_results(out)] == [f"clip{n}" for n in range(4)]
    server.silence.set()
    subprocess.run([*command, *endpoint, f"manifest={manifest}", f"out={out}"], check=True)
    assert sorted(result["id"] for result in read_results(out)) == [f"clip{n}" for n in range(6)]
    assert len(server.requests) == 7


@pytest.mark.slow
def test_two_processes_caption_every_clip_once(strong_manifest, tmp_path, server):
    command = [sys.executable, str(PROJECT_ROOT / "scripts" / "caption.py"), "captioner=strong_labels"]
    where = [f"manifest={strong_manifest(9)}", f"out={tmp_path / 'out'}", "trainer=ddp_cpu", "batch_size=2"]
    endpoint = [f"captioner.endpoint.base_url={server.url}", "captioner.endpoint.api_key_env=null"]
    subprocess.run([*command, *where, *endpoint], check=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("results-*")) == [
        "results-rank0000.jsonl",
        "results-rank0001.jsonl",
    ]
    assert sorted(result["id"] for result in read_results(tmp_path / "out")) == [f"clip{n}" for n in range(9)]
    assert len(server.requests) == 9
    assert len(read_manifest(tmp_path / "out" / "manifest.jsonl")) == 9
