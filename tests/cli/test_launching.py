"""Commands in shards: who does what, what failed and how it goes on, and that the results are those of one piece."""

import json
import os
import runpy
import sys
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import soundfile
from commands import run_command
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foley.cli import launching
from foley.cli.launching import ShardsFailedError, describe_failures, run_shards, watch
from foley.core.config import CONFIG_DIR, PROJECT_ROOT
from foley.core.sharding import Shard, ShardNotes
from foley.data.manifest import ManifestError


def config(tmp_path, **options):
    given = {"shards": 1, "shard": None, "merge": True, "gpus_per_job": 0, "output_dir": str(tmp_path / "out")}
    return OmegaConf.create(given | options)


class Command:
    """Notes what it was asked to do; `fails` are shards that do not end well."""

    def __init__(self):
        self.fails, self.worked, self.merged = set(), [], 0

    def work(self, cfg, shard):
        if shard.number in self.fails:
            raise ValueError(f"shard {shard.number} is ill")
        self.worked.append(shard)

    def merge(self, cfg):
        self.merged += 1

    def run(self, cfg):
        run_shards(cfg, self.work, self.merge)


@pytest.fixture
def command():
    return Command()


def test_a_command_is_one_shard_by_default(command, tmp_path):
    command.run(config(tmp_path))
    assert (command.worked, command.merged) == ([Shard(0, 1)], 1)
    assert not (tmp_path / "out").exists()


def test_shards_that_failed_are_done_again_and_the_others_are_not(command, tmp_path):
    command.fails = {1}
    with pytest.raises(ValueError, match="shard 1 is ill"):
        command.run(config(tmp_path, shards=3))
    assert (command.worked, command.merged) == ([Shard(0, 3)], 0)
    command.fails = set()
    command.run(config(tmp_path, shards=3))
    assert (command.worked, command.merged) == ([Shard(number, 3) for number in range(3)], 1)
    command.run(config(tmp_path, shards=3))  # all was merged: whatever there is to do is found anew
    assert (len(command.worked), command.merged) == (6, 2)


def test_of_shards_that_are_started_by_hand_the_last_merges(command, tmp_path):
    for number in (2, 0, 1):
        assert command.merged == 0
        command.run(config(tmp_path, shards=3, shard=number))
    assert (sorted(shard.number for shard in command.worked), command.merged) == ([0, 1, 2], 1)


def test_notes_of_another_request_count_for_nothing(command, tmp_path):
    command.run(config(tmp_path, shards=2, shard=0, seed=1))
    command.run(config(tmp_path, shards=2, shard=1, seed=2))
    assert command.merged == 0
    command.run(config(tmp_path, shards=2, shard=1, seed=1, merge=False))
    assert command.merged == 0
    command.run(config(tmp_path, shards=2, seed=1))
    assert (len(command.worked), command.merged) == (3, 1)


def test_notes_of_a_file_that_changed_count_for_nothing(command, tmp_path):
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("one\n")
    data = {"splits": {"manifest": str(manifest)}}
    command.run(config(tmp_path, shards=2, shard=0, data=data))
    manifest.write_text("one\ntwo\n")
    command.run(config(tmp_path, shards=2, data=data))
    assert [shard.number for shard in command.worked] == [0, 0, 1]


@pytest.mark.parametrize(("error", "worked"), [(ValueError, 4), (OSError, 2)])
def test_results_that_cannot_be_merged_are_looked_for_anew_but_a_full_disk_waits(command, tmp_path, error, worked):
    def refuse(cfg):
        raise error("none of the clips can be used")

    with pytest.raises(error):
        run_shards(config(tmp_path, shards=2), command.work, refuse)
    command.run(config(tmp_path, shards=2))
    assert (len(command.worked), command.merged) == (worked, 1)


@pytest.mark.parametrize("script", ["encode_latents", "encode_text"])
def test_a_cache_that_every_shard_left_to_another_is_no_success(script, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "_NOTES_SECONDS", 0.0)
    require_index = runpy.run_path(str(PROJECT_ROOT / f"scripts/{script}.py"))["require_index"]
    require_index(config(tmp_path))  # one piece says by itself what it lacks
    with pytest.raises(ShardsFailedError, match=r"out holds no index .* the same command"):
        require_index(config(tmp_path, shards=2))


def test_jobs_whose_notes_are_not_seen_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "_NOTES_SECONDS", 0.0)
    monkeypatch.setattr(launching, "_POLL_SECONDS", 0.0)
    notes = ShardNotes(str(tmp_path / "out"), {}, 3)
    notes.add(1)
    launching._require_notes([1], notes, "out")
    with pytest.raises(ShardsFailedError, match=r"2 shards ended well, 0, 2, but .*give as out= a folder"):
        launching._require_notes([0, 1, 2], notes, "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 0}, "shards=0: give a whole number >= 1"),
        ({"shards": 2, "shard": 2}, "shard=2: give a whole number >= 0 and <= 1"),
        ({"shards": 2, "overwrite": True}, "overwrite=true with shards=2 would remove what other shards make"),
        ({"shards": 2, "trainer": {"devices": "auto"}}, "trainer.devices=auto: a shard is one process"),
    ],
)
def test_what_does_not_go_together_is_refused(command, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        command.run(config(tmp_path, **options))
    assert command.worked == []


class Job:
    """Of submitit: ends when it was asked `patience` times."""

    def __init__(self, patience=1, result=None, error=None):
        self.patience, self.answer, self.error, self.cancelled = patience, result, error, False
        self.paths = SimpleNamespace(stderr="jobs/7.err")

    def done(self):
        self.patience -= 1
        return self.patience <= 0

    def exception(self):
        return self.error

    def result(self):
        return self.answer

    def stderr(self):
        return "first\nKilled\n"

    def cancel(self):
        self.cancelled = True


def test_jobs_run_in_as_many_places_as_there_are_and_failures_are_kept(monkeypatch):
    monkeypatch.setattr(launching, "_POLL_SECONDS", 0.0)
    jobs = {0: Job(3), 1: Job(1, "no such file"), 2: Job(2, error=RuntimeError()), 3: Job(1), 4: Job(1)}
    busy, most = {}, []

    def submit(number, place):
        assert jobs.get(busy.get(place), Job(0)).patience <= 0  # who had the place before has ended
        busy[place] = number
        most.append(place)
        return jobs[number]

    failed = watch(range(5), submit, at_once=2)
    assert failed == {1: "no such file", 2: "it ended without a result (jobs/7.err) / first / Killed"}
    assert set(most) == {0, 1}
    assert len(most) == 5


def test_jobs_that_run_are_cancelled_with_their_command(monkeypatch):
    jobs = [Job(100), Job(100)]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(launching.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        watch(range(2), lambda number, place: jobs[number], at_once=2)
    assert all(job.cancelled for job in jobs)


def test_failed_shards_are_named_with_the_command_that_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/caption.py", "out=a b", "launcher=slurm", "shards=64"])
    message = describe_failures({17: "no such file", 3: "out of memory"}, 64, "out=a b")
    assert message.startswith("2 of 64 shards failed, 3, 17;")
    assert "  shard 3: out of memory\n  shard 17: no such file\n" in message
    assert message.endswith("python scripts/caption.py 'out=a b' launcher=slurm shards=64")
    assert isinstance(ShardsFailedError(message), RuntimeError)
    monkeypatch.setattr(sys, "argv", ["sample.py", "prompts=P", "shards=2"])  # into a folder that is named by the time
    assert describe_failures({1: "ill"}, 2, "output_dir=samples/now").endswith(" shards=2 output_dir=samples/now")


def composed(name, *overrides):
    folder, _, config_name = name.rpartition("/")
    with initialize_config_dir(str(CONFIG_DIR / folder), version_base="1.3"):
        return compose(config_name, list(overrides), return_hydra_config=True)


COMMANDS = {
    "script/encode_latents": ["codec_path=CODEC"],
    "script/encode_text": ["captions=LATENTS"],
    "script/caption": ["manifest=M", "out=OUT"],
    "script/filter_clap": ["manifest=M", "audio_dir=AUDIO", "out=OUT"],
    "script/prepare": ["audio_dir=AUDIO", "out=OUT"],
    "evaluate": ["samples=S", "reference=R"],
    "sample": ["prompts=P"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_same_options_and_slurm_gets_them(name):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    asked = ["launcher=slurm", "shards=64", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=240"]
    cfg = composed(name, *COMMANDS[name], *asked, "hydra.launcher.mem_gb=32")
    assert (cfg.shards, cfg.shard, cfg.merge) == (64, None, True)
    assert cfg.gpus_per_job == (0 if name in ("script/prepare", "evaluate") else 1)
    launcher = launching._Launcher.of(cfg.hydra.launcher, cfg.gpus_per_job)
    wanted = {"slurm_partition": "gpu", "timeout_min": 240, "mem_gb": 32, "cpus_per_task": 8, "tasks_per_node": 1}
    assert wanted.items() <= launcher.parameters.items()
    assert launcher.parameters.get("gpus_per_node") == (cfg.gpus_per_job or None)
    assert (launcher.cluster, launcher.retries, launcher.environment(3)) == ("slurm", 10, {})


def test_processes_of_this_machine_share_its_gpus(monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    settings = composed("script/encode_latents", "codec_path=CODEC", "launcher=local").hydra.launcher
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two_each = launching._Launcher.of(settings, 2)
    assert (two_each.cluster, two_each.at_once) == ("local", 4)
    assert [two_each.environment(place)["CUDA_VISIBLE_DEVICES"] for place in (0, 3)] == ["0,1", "6,7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # the others are someone else's
    theirs = launching._Launcher.of(settings, 1)
    assert [theirs.environment(place) for place in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": name} for name in "57"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    without = launching._Launcher.of(settings, 1)
    assert (without.environment(0), without.threads) == ({"CUDA_VISIBLE_DEVICES": ""}, {"OMP_NUM_THREADS": "1"})
    assert without.at_once >= 1
    with launching._variables({"OMP_NUM_THREADS": "3", "FOLEY_TEST": "1"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["FOLEY_TEST"]) == ("3", "1")
    assert os.environ.get("OMP_NUM_THREADS") != "3"
    assert "FOLEY_TEST" not in os.environ


def test_a_script_of_slurm_asks_for_what_was_given(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    given = ["hydra.launcher.partition=gpu", "hydra.launcher.cpus_per_task=12"]
    cfg = composed("script/encode_latents", "codec_path=CODEC", "launcher=slurm", *given)
    executor = launching._Launcher.of(cfg.hydra.launcher, 1).executor(tmp_path)
    assert isinstance(executor._executor, submitit.SlurmExecutor)
    text = executor._executor._make_submission_file_text("run", "uid")
    for line in ("--partition=gpu", "--cpus-per-task=12", "--gpus-per-node=1", "--time=1440", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}" in text


def same_files(one, two, names):
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.fixture
def audiocaps(tmp_path):
    """Annotations with every kind of fault, and clips for most of them."""
    audio = tmp_path / "audio"
    audio.mkdir()
    soundfile.write(audio / "7fmOlUlwoNg_20.wav", np.full(800, 0.1), 8000)
    (audio / "--PJHxphWEs_0.wav").write_bytes(b"no sound")
    rows = [f"{number},7fmOlUlwoNg,20,Sound {number}" for number in range(20)]
    rows[5:5] = ["3,7fmOlUlwoNg,20,Again", "90,--PJHxphWEs,0,Bad file", "91,7fmOlUlwoNg,soon,Bad row", "92,abc,0,x,y"]
    (audio / "test.csv").write_text("\n".join(["audiocap_id,youtube_id,start_time,caption", *rows]) + "\n")
    return [f"audio_dir={audio}"]


def test_a_data_set_is_prepared_in_shards_as_in_one_piece(audiocaps, tmp_path):
    for name, options in (("one", []), ("three", ["shards=3"])):
        run_command("script/prepare", *audiocaps, f"out={tmp_path / name}", *options)
    same_files(tmp_path / "one", tmp_path / "three", ("manifest.jsonl", "ledger.jsonl", "summary.json"))
    assert {path.name for path in (tmp_path / "three").glob("*")} - {".shards"} == {
        *("manifest.jsonl", "ledger.jsonl", "summary.json")
    }
    assert json.loads((tmp_path / "one/summary.json").read_text())["left_out"].keys() >= {"bad_row", "duplicate_id"}


def test_a_data_set_whose_checked_rows_are_gone_is_checked_again(audiocaps, tmp_path):
    shards = [*audiocaps, f"out={tmp_path / 'out'}", "shards=2"]
    for number in (0, 1):
        run_command("script/prepare", *shards, f"shard={number}", "merge=false")
    (tmp_path / "out/checked-00001-of-00002.jsonl").unlink()
    (tmp_path / "out/checked-00002-of-00003.jsonl").touch()  # of another number of shards
    with pytest.raises(ManifestError, match=r"lacks checked-00001-of-00002\.jsonl: the same command checks"):
        run_command("script/prepare", *shards)
    run_command("script/prepare", *shards)
    assert (tmp_path / "out/manifest.jsonl").is_file()
    assert not list((tmp_path / "out").glob("checked-*"))


def test_results_go_to_a_url(audiocaps, tmp_path):
    run_command("script/prepare", *audiocaps, f"out={tmp_path / 'one'}")
    run_command("script/prepare", *audiocaps, f"out=memory://prepared{tmp_path}", "shards=2")
    found = fsspec.filesystem("memory").cat_file(f"/prepared{tmp_path}/manifest.jsonl")
    assert found == (tmp_path / "one/manifest.jsonl").read_bytes()
