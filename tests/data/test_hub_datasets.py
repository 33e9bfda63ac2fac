"""Data sets of the `datasets` library, from folders: tables by row, and streams that go on where they stopped."""

import csv
import io
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from foley.core.config import PROJECT_ROOT
from foley.data.audio import AudioError
from foley.data.dataset import DataFaultError, SampleKey
from foley.data.hub_datasets import HubColumns, hub_data_module

datasets = pytest.importorskip("datasets")
RATE, SECONDS = 8000, 0.05
OPTIONS = {"sample_rate_hz": RATE, "duration_seconds": SECONDS, "batch_size": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s at the end of each stream
    datasets.disable_progress_bars()


def encoded(number, rate=RATE, file_format="FLAC", channels=1):
    """A clip of a constant level, by which it is known again."""
    content = io.BytesIO()
    samples = np.full((round(SECONDS * rate), channels), (number + 1) / 100, np.float32)
    soundfile.write(content, samples, rate, format=file_format)
    return content.getvalue()


def number_of(audio):
    return round(100 * float(audio[len(audio) // 2])) - 1


def rows(numbers, **more):
    return {
        "sound": [{"bytes": encoded(number), "path": f"{number}.flac"} for number in numbers],
        "text": [f"sound {number}" for number in numbers],
        "key": [f"clip-{number}" for number in numbers],
        **more,
    }


def table(numbers, **more):
    return datasets.Dataset.from_dict(rows(numbers, **more)).cast_column("sound", datasets.Audio(decode=False))


@pytest.fixture
def parquet(tmp_path):
    """24 clips in 4 files for training, 5 for validation, as Parquet."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    for part in range(4):
        table(range(6 * part, 6 * part + 6)).to_parquet(folder / f"train-{part}.parquet")
    table(range(24, 29)).to_parquet(folder / "validation-0.parquet")
    return folder


def opened(folder, **options):
    given = {"caption_column": "text", "id_column": "key", **OPTIONS, **options}
    return hub_data_module(str(folder), **given)


def ids(batches):
    return [clip for batch in batches for clip in batch["id"]]


def test_a_folder_of_parquet_is_read_by_row(parquet):
    module = opened(parquet)
    source = module.splits["train"]
    assert (len(source), len(module.splits["val"])) == (24, 5)
    item = source.render(7, 0)
    assert (item.caption, item.id, number_of(item.audio)) == ("sound 7", "clip-7", 7)
    assert source.clip_name(7) == "clip-7"
    assert sorted(ids(module.train_dataloader())) == sorted(f"clip-{n}" for n in range(24))
    assert "torchcodec" not in sys.modules


def test_the_config_names_it(parquet):
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        given = ["data=hf", f"data.name={parquet}", "data.caption_column=text", "data.sample_rate_hz=8000"]
        cfg = compose("script/encode_latents", overrides=["codec_path=unused", *given, "data.split='train[:10]'"])
    module = instantiate(cfg.data, _convert_="all")
    assert {name: len(source) for name, source in module.splits.items()} == {"train": 9, "val": 1}
    assert next(iter(module.whole_clips(1.0)["train"])).caption.startswith("sound ")


def test_clips_are_held_out_by_their_ids_and_stay_where_they_are(tmp_path):
    kept = {}
    for name, numbers in (("few", range(10)), ("more", range(20))):
        table(numbers).to_parquet(tmp_path / f"{name}/train.parquet")
        module = opened(tmp_path / name, val_fraction=0.3)
        kept[name] = {split: set(source.rows["key"]) for split, source in module.splits.items()}
        assert not kept[name]["train"] & kept[name]["val"]
    assert kept["few"]["val"] <= kept["more"]["val"]
    assert set(opened(tmp_path / "few", val_fraction=0.0).splits) == {"train"}


def test_a_folder_of_audio_files_and_labels(tmp_path):
    folder = tmp_path / "sounds"
    for split, count in (("train", 3), ("test", 2)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            (folder / split / f"{number}.wav").write_bytes(encoded(number, 2 * RATE, "WAV", channels=2))
        with (folder / split / "metadata.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows(
                [["file_name", "words"], *([f"{number}.wav", f"{split} {number}"] for number in range(count))]
            )
    module = opened(folder, caption_column="words", id_column=None, val_fraction=0.0)
    item = module.splits["test"].render(1, 0)
    assert (item.caption, item.id, number_of(item.audio), len(item.audio)) == (
        "test 1",
        "test/1",
        1,
        round(RATE * SECONDS),
    )
    assert type(module).__name__ == "AudioDataModule"


def test_cells_of_other_kinds_are_read_too(tmp_path):
    (tmp_path / "1.wav").write_bytes(encoded(1, file_format="WAV"))
    read = HubColumns("sound", "text", None, "kind", sample_rate_hz=RATE)
    names = datasets.ClassLabel(names=["dog", "rain"])
    place = f"file://{tmp_path}/1.wav"
    for cell in (str(tmp_path / "1.wav"), {"path": str(tmp_path / "1.wav"), "bytes": None}, encoded(1), place):
        item = read.item({"sound": cell, "text": ["a", "b"], "kind": 1}, {"kind": names}, "clip")
        assert (item.caption, item.other_captions, item.label, number_of(item.audio)) == ("a", ("b",), "rain", 1)
    for cell, reason in (
        (None, "neither a file nor the path"),
        (b"noise", "cannot be decoded"),
        (f"file://{tmp_path}/2.wav", "cannot be fetched"),
    ):
        with pytest.raises(AudioError, match=f"clip: .*{reason}"):
            read.item({"sound": cell, "text": None, "kind": None}, {"kind": names}, "clip")


def test_what_is_not_there_is_named(parquet, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data\.caption_column=words: .* has no such column, only sound, text, key"):
        opened(parquet, caption_column="words")
    with pytest.raises(ValueError, match=r"data\.name=.*nowhere: the data set cannot be opened"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"bucket_batches: nobody knows how long the clips of a stream are"):
        opened(parquet, streaming=True, bucket_batches=2)
    with pytest.raises(ValueError, match=r"a stream cannot be encoded"):
        opened(parquet, streaming=True).whole_clips(1.0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"data=hf wants datasets: pip install 'foley\[datasets\]'"):
        opened(parquet)


def test_columns_of_audio_are_found_or_asked_for():
    audio = datasets.Audio(decode=False)
    assert HubColumns().of({"x": 1, "sound": audio}, "SET").audio == "sound"
    with pytest.raises(ValueError, match=r"SET has no column of audio among x: say which by data\.audio_column="):
        HubColumns().of({"x": 1}, "SET")
    with pytest.raises(ValueError, match="SET has several columns of audio, a, b"):
        HubColumns().of({"a": audio, "b": audio}, "SET")


def test_what_save_to_disk_wrote_is_read(tmp_path):
    both = datasets.DatasetDict({"train": table(range(8)), "valid": table(range(8, 10))})
    both.save_to_disk(tmp_path / "saved")
    assert {name: len(source) for name, source in opened(tmp_path / "saved").splits.items()} == {"train": 8, "val": 2}
    assert len(ids(opened(tmp_path / "saved", streaming=True).train_dataloader())) == 8
    with pytest.raises(ValueError, match="it has no split 'other'"):
        opened(tmp_path / "saved", split="other")
    for streaming in (False, True):  # as of what the library opens itself
        part = opened(tmp_path / "saved", split="train[:5]+valid", streaming=streaming, val_fraction=0.0)
        assert sorted(ids(part.train_dataloader()))[-1] == "clip-9"
    sliced = opened(tmp_path / "saved", split="train[25%:75%]", val_fraction=0.0)
    assert sorted(set(ids(sliced.train_dataloader()))) == [f"clip-{number}" for number in range(2, 6)]


def test_that_a_stream_validates_on_nothing_is_said(parquet, caplog):
    opened(parquet, streaming=True)
    assert caplog.text == ""
    opened(parquet, streaming=True, split="train")
    assert "has no split for validation, and of a stream none is held out (data.val_fraction)" in caplog.text


def on_rank(module, rank, world_size):
    trainer = SimpleNamespace(global_rank=rank, world_size=world_size, accumulate_grad_batches=1)
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    module.trainer = trainer
    return module


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_clip_of_a_stream_comes_once_over_ranks_and_workers(parquet, world_size, num_workers):
    epochs = []
    for epoch in range(2 - num_workers // 2):
        seen = []
        for rank in range(world_size):
            module = on_rank(opened(parquet, streaming=True, num_workers=num_workers), rank, world_size)
            module._next = epoch, Counter()
            batches = list(module.train_dataloader())
            assert {len(batch["id"]) for batch in batches} == {4 // world_size}
            assert "worker" not in batches[0]
            seen.append(ids(batches))
        assert len({len(share) for share in seen}) == 1  # no rank waits for another
        epochs.append([clip for share in seen for clip in share])
        assert sorted(epochs[-1]) == sorted(f"clip-{n}" for n in range(24))
    assert num_workers or epochs[0] != epochs[1]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_goes_on_with_the_clips_that_are_left(parquet, num_workers):
    first = on_rank(opened(parquet, streaming=True, num_workers=num_workers), 0, 1)
    loader = iter(first.train_dataloader())
    seen = ids(next(loader) for _ in range(3))
    first.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 2  # one is drawn ahead
    state = first.state_dict()
    again = on_rank(opened(parquet, streaming=True, num_workers=num_workers), 0, 1)
    again.load_state_dict(state)
    rest = ids(again.train_dataloader())
    assert sorted(seen[:8] + rest) == sorted(f"clip-{n}" for n in range(24))
    if not num_workers:
        assert rest[:4] == seen[8:]
    again.trainer.fit_loop.epoch_loop.batch_progress.total.processed = len(rest) // 4
    ended = again.state_dict()
    later = on_rank(opened(parquet, streaming=True, num_workers=num_workers), 0, 1)
    later.load_state_dict(ended)
    assert len(ids(later.train_dataloader())) == 24  # the next epoch, for of this one nothing was left
    assert later._epoch == 1


def test_another_number_of_workers_begins_the_epoch_anew(parquet, caplog):
    module = on_rank(opened(parquet, streaming=True), 0, 1)
    module.load_state_dict({"epoch": 3, "rows": {"0": 8}, "workers": 2, "batches": 9})
    assert "was read by 2 workers (data.num_workers), and is by 0 now: epoch 3 begins anew" in caplog.text
    assert len(ids(module.train_dataloader())) == 24


def test_clips_of_a_stream_that_cannot_be_used_are_replaced_and_counted(tmp_path):
    for name, faulty in (("few", {2, 3, 7}), ("many", set(range(4, 40)))):
        content = rows(range(40))
        for number in faulty:
            content["sound"][number]["bytes"] = b"no sound"
        clips = datasets.Dataset.from_dict(content).cast_column("sound", datasets.Audio(decode=False))
        clips.to_parquet(tmp_path / f"{name}/train.parquet")
    few = opened(tmp_path / "few", streaming=True, shuffle_buffer=1)
    made = ids(few.train_dataloader())
    assert len(made) == 40
    assert {f"clip-{n}" for n in range(40) if n not in (2, 3, 7)} == set(made)
    with pytest.raises(DataFaultError, match=r"clips of train cannot be used, more than the fraction 0\.05"):
        list(opened(tmp_path / "many", streaming=True, shuffle_buffer=1).train_dataloader())


def test_validation_of_a_stream_keeps_its_order_and_its_end(parquet):
    module = opened(parquet, streaming=True)
    assert ids(module.val_dataloader()) == [f"clip-{n}" for n in range(24, 29)]
    assert module.test_dataloader() == []
    assert len(ids(on_rank(opened(parquet, streaming=True), 1, 2).val_dataloader())) == 2  # of 5 clips, 4 for two ranks


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 1), []
        self.automatic_optimization = True

    def training_step(self, batch, index):
        self.seen.extend(batch["id"])
        return self.layer(batch["audio"].mean().reshape(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.slow
def test_a_trainer_resumes_a_stream_within_an_epoch(parquet, tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"use_distributed_sampler": False, "enable_checkpointing": False, "limit_val_batches": 0}
    first, data = Recorder(), opened(parquet, streaming=True)
    trainer = pl.Trainer(max_steps=4, **quiet)
    trainer.fit(first, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = Recorder()
    pl.Trainer(max_steps=12, **quiet).fit(
        second, datamodule=opened(parquet, streaming=True), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    whole = Recorder()
    pl.Trainer(max_steps=12, **quiet).fit(whole, datamodule=opened(parquet, streaming=True))
    assert first.seen + second.seen == whole.seen
    assert Counter(whole.seen) == Counter({f"clip-{n}": 2 for n in range(24)})


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_codec_trains_on_a_data_set(parquet, tmp_path, streaming):
    from foley.training.run import train

    overrides = ["name=test", "experiment=tiny_vae", "data=hf", f"data.name={parquet}", "data.caption_column=text"]
    overrides += [f"data.streaming={streaming}", "data.batch_size=2", "data.duration_seconds=0.3"]
    overrides += ["trainer.max_steps=2", "trainer.max_time=null", "lr_schedule.warmup_steps=1"]
    overrides += ["trainer.limit_val_batches=1", "trainer.val_check_interval=2", "callbacks.progress=null"]
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [*overrides, f"paths.output_dir={tmp_path}/run"])
    metrics = train(cfg)
    assert all(np.isfinite(value) for value in metrics.values())
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()


def test_a_key_draws_the_same_clip_in_every_order(parquet):
    dataset = opened(parquet).datasets["train"]
    assert torch.equal(dataset[SampleKey(3, 1)].audio, dataset[SampleKey(3, 1)].audio)
