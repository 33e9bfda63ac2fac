"""Every command that takes `shards=`: the results are those of one piece, on this machine's processes too."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import run_command
from small_system import CONFIGS
from tiny_clap import save_clap
from tiny_t5 import save_t5

from foley.core.config import PROJECT_ROOT
from foley.core.embeddings import EmbeddingStore
from foley.data.latents import LatentCacheIndex, LatentDataset
from foley.system.system import build_system, save_system

CAPTIONS = ("a dog barks", "rain falls on a roof", "a siren wails", "wind", "a door slams", "birds sing")
RATE_HZ = 2000
ID = "7fmOlUlwoN"  # without its last character


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Recordings with a manifest, a small system and a small CLAP."""
    folder = tmp_path_factory.mktemp("sounds")
    save_clap(folder / "clap")
    save_system(build_system(CONFIGS), folder / "system")
    save_t5(folder / "t5")
    rows = []
    for number, caption in enumerate(CAPTIONS):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, 48000)
        soundfile.write(folder / f"{number}.wav", noise, 48000)
        about = {"youtube_id": f"{ID}{number}", "start_seconds": 0.0, "split": "train"}
        rows.append({"path": f"{number}.wav", "caption": caption, **about})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = [f"Y{ID}{number},{caption}" for number, caption in enumerate(CAPTIONS)]
    for split, lines in (("train", known), ("test", [])):
        (folder / f"{split}.csv").write_text("\n".join(["youtube_id,caption", *lines]) + "\n")
    return folder


def of_filter(sounds):
    given = [f"manifest={sounds}/clips.jsonl", f"audio_dir={sounds}", f"scorer.name={sounds}/clap", "threshold=-1"]
    return "script/filter_clap", [*given, f"paths.output_dir={sounds}", "+trainer.enable_progress_bar=false"], "out"


def of_encode(sounds):
    data = [f"data.splits.manifest={sounds}/clips.jsonl", f"data.sample_rate_hz={RATE_HZ}", "data.duration_seconds=0.5"]
    return "script/encode_latents", ["data=manifest", *data, f"codec_path={sounds}/system"], "output_dir"


def of_encode_text(sounds):
    text = ["text=t5_base", f"text.name_or_path={sounds}/t5", "text.dim=16", "device=cpu"]
    return "script/encode_text", [f"captions={sounds}/clips.jsonl", *text], "output_dir"


def of_caption(sounds):
    given = [f"manifest={sounds}/clips.jsonl", f"annotations_dir={sounds}", "captioner=autoacd"]
    return "script/caption", [*given, f"paths.output_dir={sounds}", "+trainer.enable_progress_bar=false"], "out"


def of_sample(sounds):
    given = [f"prompts={sounds}/clips.jsonl", f"system={sounds}/system", "steps=1", "duration_seconds=0.2"]
    return "sample", [*given, "device=cpu", "batch_size=2"], "output_dir"


def of_evaluate(sounds):
    given = [f"samples={sounds}", f"reference={sounds}/clips.jsonl", "resamples=0", "pairing=none"]
    return "evaluate", given, "output_dir"


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def latents(folder):
    index = LatentCacheIndex.read(folder)
    items = [LatentDataset(index, "train", 10**6, random=False)[place] for place in range(len(index.clips))]
    return {item.id: (item.caption, item.latent) for item in items}


def assert_same(name, one, other):
    """That two outputs of a command hold the same."""
    if name == "script/encode_latents":
        first, second = latents(one), latents(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[id][1], second[id][1]) and first[id][0] == second[id][0] for id in first)
    elif name == "script/encode_text":
        first, second = EmbeddingStore.open(one), EmbeddingStore.open(other)
        assert all(torch.equal(first.get(text), second.get(text)) for text in (*CAPTIONS, ""))
    elif name == "sample":
        names = sorted(path.name for path in Path(one).glob("*.wav"))
        assert [path.name for path in sorted(Path(other).glob("*.wav"))] == names
        assert len(names) == len(CAPTIONS)
        for wave in names:  # sums of another batch are rounded otherwise
            audio = [soundfile.read(Path(folder) / wave)[0] for folder in (one, other)]
            np.testing.assert_allclose(*audio, rtol=0, atol=4 / 2**15)
        assert (Path(other) / "index.html").is_file()
    elif name == "evaluate":
        first, second = (
            json.loads((Path(folder) / "evaluation.json").read_text())["embedded"] for folder in (one, other)
        )
        assert first["n_generated"] == second["n_generated"] == len(CAPTIONS)
        values = [{key: score["value"] for key, score in found["scores"].items()} for found in (first, second)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-3)  # of features that are rounded otherwise
    elif name == "script/caption":
        first, second = (rows(Path(folder) / "manifest.jsonl") for folder in (one, other))
        assert [row["captioning"].pop("date") for row in (*first, *second)]
        assert first == second
        assert len(first) == len(CAPTIONS)
    else:
        for file in ("manifest.jsonl", "scores.jsonl"):
            first, second = (rows(Path(folder) / file) for folder in (one, other))
            scores = [[row.pop("clap_score") for row in found] for found in (first, second)]
            assert first == second
            assert len(first) == len(CAPTIONS)
            assert scores[0] == pytest.approx(scores[1], abs=1e-5)


ALL = {
    "caption": of_caption,
    "filter": of_filter,
    "encode": of_encode,
    "encode_text": of_encode_text,
    "sample": of_sample,
    "evaluate": of_evaluate,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ALL)
def test_shards_in_this_process_give_what_one_piece_gives(command, sounds, tmp_path):
    name, given, output = ALL[command](sounds)
    cache = lambda folder: [f"cache_dir={tmp_path}/{folder}"] if name == "evaluate" else []  # noqa: E731
    run_command(name, *given, *cache("a"), f"{output}={tmp_path}/one")
    run_command(name, *given, *cache("b"), f"{output}={tmp_path}/two", "shards=2")
    assert_same(name, tmp_path / "one", tmp_path / "two")


def command_line(name, given, *more):
    script = PROJECT_ROOT / (f"{name}.py" if "/" not in name else f"scripts/{name.removeprefix('script/')}.py")
    return [sys.executable, str(script), *given, *more]


def run(words, **more):
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=280, cwd=PROJECT_ROOT, **more)


@pytest.mark.slow
@pytest.mark.parametrize("command", ALL)
def test_processes_of_this_machine_give_what_one_piece_gives(command, sounds, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    name, given, output = ALL[command](sounds)
    if name == "evaluate":
        given = [*given, f"cache_dir={tmp_path}/features", f"hydra.run.dir={tmp_path}/run"]
    run_command(name, *given, f"{output}={tmp_path}/one")
    done = run(command_line(name, given, f"{output}=file://{tmp_path}/two", "launcher=local", "shards=2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 have ended" in done.stdout + done.stderr
    assert_same(name, tmp_path / "one", tmp_path / "two")
    assert not list((tmp_path / "two/.shards").glob("*/*.json"))


@pytest.mark.slow
def test_a_shard_that_fails_is_named_and_done_again_alone(sounds, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    name, given, _ = of_caption(sounds)
    broken = tmp_path / "clips.jsonl"
    broken.write_text((sounds / "clips.jsonl").read_text())
    given = [word for word in given if not word.startswith("manifest=")] + [f"manifest={broken}"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "faults-rank0001.jsonl").mkdir()  # which is no file to begin anew: as if its disk had failed
    words = command_line(name, given, f"out={out}", "launcher=local", "shards=2")
    failed = run(words)
    assert failed.returncode == 1
    assert "1 of 2 shards failed, 1; what they made so far is kept" in failed.stderr
    assert "shards=2" in failed.stderr.splitlines()[-2] + failed.stderr.splitlines()[-1]
    assert not (out / "manifest.jsonl").exists()
    (out / "faults-rank0001.jsonl").rmdir()
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 shards are done already; 1 to do" in done.stdout + done.stderr
    assert [row["caption"] for row in rows(out / "manifest.jsonl")] == list(CAPTIONS)
