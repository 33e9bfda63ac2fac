"""Reliability rows 1 to 6 on whole data sets: what a run skips, counts and refuses, and what that costs in memory.

The rows' single cases are in test_audio_io.py, test_audio_dataset.py, test_manifest.py and test_shards.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import compose_command, run_command
from hydra.utils import instantiate
from torch.utils.data import DataLoader

from foley.cli.errors import describe
from foley.data.datamodule import AudioDataModule
from foley.data.dataset import AudioCollate, AudioDataset, DataFaultError
from foley.data.encoding import EncodingOptions, encode_latents
from foley.data.latents import LatentCacheIndex
from foley.data.manifest import ManifestError, read_manifest
from foley.data.preflight import preflight
from foley.data.shards_writer import write_shards
from foley.data.splits import clip_splits, folder_splits, joined_splits
from foley.models.codec.waveform_vae import WaveformVAE

RATE = 8000
FAULTY_EVERY = 20


def make_rows(folder: Path, count: int) -> Path:
    """A manifest of `count` rows over a few tiny files; every 20th row is faulty, in one of five ways in turn."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 400)
    soundfile.write(folder / "good.wav", samples, RATE)
    (folder / "empty.wav").touch()
    (folder / "cut.wav").write_bytes((folder / "good.wav").read_bytes()[:30])
    soundfile.write(folder / "nan.wav", np.full(400, np.nan), RATE, subtype="FLOAT")
    soundfile.write(folder / "absurd.wav", samples * 1e29, RATE, subtype="DOUBLE")
    faulty = ("gone", "empty", "cut", "nan", "absurd")
    with (folder / "clips.jsonl").open("w") as manifest:
        for row in range(count):
            name = faulty[row // FAULTY_EVERY % 5] if row % FAULTY_EVERY == 0 else "good"
            path = folder / f"{row}.wav"
            if name != "gone" and not path.exists():
                path.hardlink_to(folder / f"{name}.wav")
            manifest.write(json.dumps({"path": path.name, "caption": f"sound {row}", "id": str(row)}) + "\n")
    return folder / "clips.jsonl"


def run_over(manifest: Path) -> dict[str, float]:
    """One epoch over a manifest, in batches; what came out, and the peak memory of this process in kilobytes."""
    from resource import RUSAGE_SELF, getrusage

    data = AudioDataModule(clip_splits(str(manifest), RATE, check_files=False), RATE, 0.05, batch_size=20)
    samples = sum(int(batch["length_samples"].sum()) for batch in data.train_dataloader())
    faults = data.datasets["train"].num_faults
    return {"samples": samples, "faults": faults, "peak_kilobytes": getrusage(RUSAGE_SELF).ru_maxrss}


def run_in_subprocess(folder: Path, count: int) -> dict[str, float]:
    folder.mkdir()
    manifest = make_rows(folder, count)
    arguments = [sys.executable, __file__, str(manifest)]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # tests/parts among them
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, env=paths)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.slow
def test_ten_thousand_rows_with_5_percent_faulty_ones(tmp_path):
    """Exact counts, and memory for the manifest's entries alone: 8000 rows are 13 MB of audio and 6 MB of entries."""
    few, many = (run_in_subprocess(tmp_path / str(count), count) for count in (2_000, 10_000))
    assert (few["samples"], few["faults"]) == (2_000 * 400, 100)
    assert (many["samples"], many["faults"]) == (10_000 * 400, 500)
    assert many["peak_kilobytes"] - few["peak_kilobytes"] < 9_000


@pytest.fixture
def manifest(tmp_path):
    """200 rows, 10 of them faulty."""
    return make_rows(tmp_path, 200)


def test_preflight_names_every_faulty_row_and_training_counts_the_same(manifest):
    expected = set(range(0, 200, FAULTY_EVERY))
    assert {int(fault.entry.id) for fault in preflight(read_manifest(manifest), decode=True)} == expected
    dataset = AudioDataset(clip_splits(str(manifest), RATE)["train"], 400)
    assert [dataset[index].id for index in range(40)] == [str(index + (index % 20 == 0)) for index in range(40)]
    assert len([dataset[index] for index in range(200)]) == 200
    assert {int(Path(path).stem) for path in dataset.faults} == expected


def test_every_number_of_loader_processes_skips_the_same(manifest):
    dataset = AudioDataset(clip_splits(str(manifest), RATE)["train"], 400, max_fault_fraction=0.2)
    ids = [
        [
            id
            for batch in DataLoader(dataset, 8, num_workers=workers, collate_fn=AudioCollate(400))
            for id in batch["id"]
        ]
        for workers in (2, 0)
    ]
    assert ids[0] == ids[1]


def test_faults_of_all_loader_processes_are_counted_once(manifest, caplog):
    data = AudioDataModule(clip_splits(str(manifest), RATE), RATE, 0.05, batch_size=8, num_workers=2)
    for _ in range(2):
        assert sum(len(batch["id"]) for batch in data.train_dataloader()) == 200
    assert data.datasets["train"].num_faults == 10
    data.teardown("fit")
    assert "train: 10 of 200 clips could not be used" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_faults_stop_the_run_from_a_loader_process_too(manifest, num_workers):
    splits = clip_splits(str(manifest), RATE, check_files=False)
    data = AudioDataModule(splits, RATE, 0.05, 8, num_workers, max_fault_fraction=0.02)
    batches = iter(data.train_dataloader())
    with pytest.raises(
        DataFaultError, match=r"[5-6] of 200 clips cannot be used, more than the fraction 0\.02"
    ) as found:
        list(batches)
    shown = describe(found.value)
    assert re.match(r"[5-6] of 200 clips cannot be used", shown)
    assert "Traceback" not in shown
    if num_workers:
        batches._shutdown_workers()  # left to the garbage collector, each of them is waited for in vain for 5 s


def test_too_many_known_faults_are_the_error_before_anything_is_read(manifest):
    message = r"[6-9] of 200 clips cannot be used.*0\.02 \(data\.max_fault_fraction\).*0\.wav: .*; and \d more"
    with pytest.raises(DataFaultError, match=message):
        AudioDataModule(clip_splits(str(manifest), RATE), RATE, 0.05, 8, max_fault_fraction=0.02)


def test_a_manifest_of_absent_files_alone_is_refused_though_its_sources_are_cached_or_mixed(tmp_path):
    rows = [json.dumps({"path": f"{i}.wav", "caption": "x", "split": "train"}) + "\n" for i in range(8)]
    (tmp_path / "clips.jsonl").write_text("".join(rows))
    for megabytes in (0, 1):
        splits = clip_splits(str(tmp_path / "clips.jsonl"), RATE, cache_megabytes=megabytes)
        for given in (splits, joined_splits({"one": splits})):
            with pytest.raises(
                DataFaultError, match=r"none of 8 clips can be used; check their paths: .*/0\.wav: .*exist.*and 3 more"
            ):
                AudioDataModule(given, RATE, 0.05, 8)


def test_faults_of_a_folder_are_listed_by_file_and_once(tmp_path, caplog):
    soundfile.write(tmp_path / "good.wav", np.full(400, 0.5), RATE)
    (tmp_path / "bad.wav").touch()
    dataset = AudioDataset(folder_splits(str(tmp_path), RATE)["train"], 400)
    assert [dataset[index].id for index in (0, 1)] == ["good.wav", "good.wav"]
    assert caplog.text.count("bad.wav: is empty") == 1
    assert "line 0" not in caplog.text


def test_shards_and_latents_leave_out_and_count_the_same(manifest, tmp_path, caplog):
    index = write_shards(read_manifest(manifest), str(tmp_path / "shards"))
    assert (index.left_out, sum(shard.num_samples for shard in index.shards)) == (10, 190)
    splits = clip_splits(str(manifest), RATE, check_files=False)
    data = AudioDataModule(splits, RATE, 0.05, batch_size=8)
    encode_latents(_codec(), data.whole_clips(1.0), tmp_path / "latents", EncodingOptions(batch_size=50))
    assert len(LatentCacheIndex.read(tmp_path / "latents").entries) == 190
    assert "(10 so far)" in caplog.text


def _codec():
    torch.manual_seed(0)
    vae = WaveformVAE(channels=2, multipliers=[1], strides=[10], num_units=[1], latent_channels=2)
    vae.sample_rate_hz = RATE
    return vae


def test_a_clip_of_one_sample_is_one_frame_of_true_length(tmp_path, write_jsonl):
    for name, length in (("one", 1), ("frame", 10), ("long", 400)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(length, 0.25), RATE)
    rows = [{"path": f"{name}.wav", "caption": name, "id": name} for name in ("one", "frame", "long")]
    data = AudioDataModule(clip_splits(str(write_jsonl(*rows)), RATE), RATE, 0.05, batch_size=3)
    lengths = dict(zip(*(next(iter(data.train_dataloader()))[key] for key in ("id", "length_samples")), strict=True))
    assert {id: int(length) for id, length in lengths.items()} == {"one": 1, "frame": 10, "long": 400}
    encode_latents(_codec(), data.whole_clips(1.0), tmp_path / "latents")
    entries = {entry.id: entry for entry in LatentCacheIndex.read(tmp_path / "latents").entries}
    assert {id: entry.num_frames for id, entry in entries.items()} == {"one": 1, "frame": 1, "long": 40}
    assert entries["one"].duration_seconds == pytest.approx(1 / RATE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"path": "0.wav", "caption": "x", "id": "3"}', "duplicate id '3', first used on line 4"),
        ('{"path": "0.wav", "caption": " "}', "`caption` is empty"),
        ('{"path": "../0.wav", "caption": "x"}', "leaves the manifest's folder"),
        ('{"path": "0.wav", "caption": ', "not valid UTF-8 JSON"),
    ],
)
def test_a_wrong_line_stops_everything_before_anything_is_written(manifest, tmp_path, line, message):
    with manifest.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ManifestError, match=f"line 201: .*{message}"):
        clip_splits(str(manifest), RATE)
    with pytest.raises(ManifestError, match="line 201"):
        run_command("script/make_shards", f"manifest={manifest}", f"output={tmp_path / 'shards'}")
    assert not (tmp_path / "shards").exists()


def encoding(*overrides):
    return compose_command("script/encode_latents", *overrides)


def test_the_command_writes_shards_and_the_configs_read_them(manifest, tmp_path):
    shards = tmp_path / "shards"
    whole = ["val_fraction=0", "writer.sample_rate_hz=null"]
    run_command("script/make_shards", f"manifest={manifest}", f"output={shards}", *whole)
    part, settings = f"url={shards}", ["data.sample_rate_hz=8000", "data.duration_seconds=0.05", "codec_path=unused"]
    cfg = compose_command(
        "script/encode_latents", "data=shards", f"data.splits.{part}", "data.bucket_batches=10", *settings
    )
    data = instantiate(cfg.data, _convert_="all")
    assert sum(len(batch["id"]) for batch in data.train_dataloader()) == 190 // 16 * 16
    parts = [f"data.splits.parts.shards.{part}", f"data.splits.parts.manifest.manifest={manifest}"]
    third = ["+data/splits@data.splits.parts.more=shards", f"data.splits.parts.more.{part}"]
    weights = [f"{sign}data.splits.train_weights.{name}" for sign, name in (("", "shards=2"), ("+", "more=1"))]
    cfg = compose_command(
        "script/encode_latents", "data=mixture", *parts, *third, *weights, "data.splits.train_size=40", *settings
    )
    assert instantiate(cfg.data.splits, _convert_="all")["train"].shares == [20, 10, 10]
    one = ["data=mixture", parts[0], "~data.splits.parts.manifest", "~data.splits.train_weights.manifest"]
    assert len(instantiate(encoding(*one, *settings).data.splits, _convert_="all")["train"]) == 190


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_over(Path(sys.argv[1]))))
