from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from foley.core.config import PROJECT_ROOT
from foley.data.datamodule import AudioDataModule
from foley.data.dataset import Augmentation, SampleKey
from foley.data.manifest import ManifestEntry
from foley.data.splits import clip_splits, entries_of_split, folder_splits, hold_out, joined_splits, procedural_splits

SIZES = {"train": 8, "val": 3}


def procedural(**options):
    return procedural_splits(SIZES, seed=1, duration_seconds=0.5, sample_rate_hz=24000, **options)


def instantiate_data(*overrides):
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        cfg = compose("script/encode_latents", overrides=["codec_path=unused", *overrides])
    return instantiate(cfg.data, _convert_="all")


def test_audio_batches():
    module = AudioDataModule(procedural(), 24000, duration_seconds=0.25, batch_size=4, augmentation=Augmentation())
    batches = list(module.train_dataloader())
    assert [batch["audio"].shape for batch in batches] == [(4, 1, 6000)] * 2
    assert batches[0]["length_samples"].tolist() == [6000] * 4
    assert len({id for batch in batches for id in batch["id"]}) == 8
    first, again = (next(iter(module.val_dataloader())) for _ in range(2))
    assert torch.equal(first["audio"], again["audio"])
    assert module.test_dataloader() == []


def test_a_source_of_another_rate_is_refused():
    with pytest.raises(ValueError, match="'train' is at 24000 Hz, expected 16000"):
        AudioDataModule(procedural(), 16000, duration_seconds=0.25, batch_size=4)
    module = AudioDataModule({"val": procedural()["val"]}, 24000, duration_seconds=0.25, batch_size=1)
    with pytest.raises(ValueError, match="no split 'train'"):
        module.train_dataloader()


def test_sizes_that_make_no_batch_are_refused_by_the_name_of_their_option():
    AudioDataModule(procedural(), 24000, 0.25, batch_size=SIZES["train"]).require_a_batch()
    with pytest.raises(ValueError, match=r"8 samples do not fill one batch of 9 .*data\.batch_size=8 or less"):
        AudioDataModule(procedural(), 24000, 0.25, batch_size=9).require_a_batch()
    with pytest.raises(ValueError, match=r"data\.batch_size=-1: give a whole number >= 1"):
        AudioDataModule(procedural(), 24000, 0.25, batch_size=-1)
    with pytest.raises(ValueError, match=r"data\.num_workers=0\.5: give a whole number >= 0"):
        AudioDataModule(procedural(), 24000, 0.25, batch_size=1, num_workers=0.5)


@pytest.mark.parametrize("split", ["val", "test"])
def test_less_clips_than_processes_are_refused_with_the_numbers(split):
    sources = procedural()
    module = AudioDataModule({"train": sources["train"], split: sources["val"]}, 24000, 0.25, batch_size=4)
    trainer = SimpleNamespace(world_size=3, limit_val_batches=1.0, limit_test_batches=1.0)
    module.require_a_clip_each(trainer)
    trainer.world_size = 4
    with pytest.raises(
        ValueError, match=rf"'{split}' has 3 clips for 4 processes.*devices=3 .*limit_{split}_batches=0"
    ):
        module.require_a_clip_each(trainer)
    module.trainer = trainer
    with pytest.raises(ValueError, match="has 3 clips for 4 processes"):
        module.setup("fit")
    setattr(trainer, f"limit_{split}_batches", 0)
    module.require_a_clip_each(trainer)


def test_procedural_splits_share_no_clip_and_only_training_is_fresh():
    splits = procedural(fresh_each_epoch=True, cache_megabytes=1)
    assert {name: len(source) for name, source in splits.items()} == SIZES
    assert not torch.equal(splits["train"].render(0, 0).audio, splits["val"].render(0, 0).audio)
    assert not torch.equal(splits["train"].render(0, 0).audio, splits["train"].render(0, 1).audio)
    assert torch.equal(splits["val"].render(0, 0).audio, splits["val"].render(0, 1).audio)


def test_clip_splits_follow_the_manifest(tmp_path, write_clip, write_jsonl, caplog):
    write_clip("a.wav")
    rows = [{"path": "a.wav", "caption": "x", "id": i, "split": s} for i, s in enumerate(["val", "", "train"])]
    manifest = write_jsonl(*rows, {"path": "gone.wav", "caption": "x"})
    splits = clip_splits(str(manifest), 24000)
    assert {name: len(source) for name, source in splits.items()} == {"val": 1, "train": 3}
    assert "1 of 4 clips cannot be used" in caplog.text
    assert "gone.wav: the file does not exist" in caplog.text
    assert clip_splits(str(tmp_path / "absent.jsonl"), 24000, optional=True) == {}


def test_joined_splits():
    parts = {"a": procedural(), "b": procedural(), "absent": {}}
    whole = joined_splits(parts)
    assert {name: len(source) for name, source in whole.items()} == {"train": 16, "val": 6}
    shared_out = joined_splits(parts, {"a": 1, "b": 3, "absent": 5}, train_size=12)
    assert shared_out["train"].shares == [3, 9]
    assert len(shared_out["val"]) == 6
    with pytest.raises(ValueError, match="train_weights are for"):
        joined_splits(parts, {"a": 1})


@pytest.mark.parametrize("name", ["procedural", "demo"])
def test_configs_without_files(name, tmp_path):
    module = instantiate_data(f"data={name}", f"paths.shared_dir={tmp_path}", "data.batch_size=2")
    batch = next(iter(module.train_dataloader()))
    assert batch["audio"].shape == (2, 1, 48000)
    assert set(module.datasets) == {"train", "val", "test"}


def test_manifest_config(write_clip, write_jsonl):
    write_clip("a.wav")
    manifest = write_jsonl({"path": "a.wav", "caption": "x"})
    module = instantiate_data("data=manifest", f"data.splits.manifest={manifest}", "data.batch_size=1")
    assert next(iter(module.train_dataloader()))["caption"] == ["x"]


def test_audiocaps_config(tmp_path, write_clip):
    write_clip("abc_30.wav")
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text(f"audiocap_id,youtube_id,start_time,caption\n1,abc,30,a {split}\n")
    folders = f"data.splits.captions_dir={tmp_path}", f"data.splits.audio_dir={tmp_path}"
    module = instantiate_data("data=audiocaps", *folders)
    assert module.datasets["val"][0].caption == "a val"


def test_shared_clips_config(shared):
    module = instantiate_data("data=clips", f"paths.shared_dir={shared}", "data.splits.check_files=false")
    assert {name: len(dataset) for name, dataset in module.datasets.items()} == {"train": 3013, "val": 244, "test": 380}
    assert next(iter(module.train_dataloader()))["audio"].shape == (16, 1, 48000)


def entries_of(count: int, root: Path) -> list[ManifestEntry]:
    return [ManifestEntry(root / f"{n}.wav", "x", str(n)) for n in range(count)]


def val_of(entries, fraction: float, root: Path) -> set[str]:
    return {entry.id for entry in hold_out(entries, fraction, root, "clips.csv") if entry.split == "val"}


def test_a_share_is_held_out_by_the_hash_of_the_path(tmp_path, caplog):
    held = val_of(entries_of(1000, tmp_path), 0.05, tmp_path)
    assert 30 <= len(held) <= 70  # 50, give or take three standard deviations
    assert f"{1000 - len(held)} clips are for training, {len(held)} (val_fraction=0.05" in caplog.text
    assert val_of(entries_of(500, tmp_path), 0.05, tmp_path) == {clip for clip in held if int(clip) < 500}
    assert val_of(entries_of(1000, Path("/elsewhere")), 0.05, Path("/elsewhere")) == held
    twice = [replace(entry, id=f"{entry.id}#{n}") for entry in entries_of(1000, tmp_path) for n in range(2)]
    assert val_of(twice, 0.05, tmp_path) == {f"{clip}#{n}" for clip in held for n in range(2)}


def test_what_training_holds_out_is_what_an_evaluation_of_the_split_takes(tmp_path):
    manifest = tmp_path / "clips.csv"
    manifest.write_text("path,caption\n" + "".join(f"{n}.wav,rain\n" for n in range(100)))
    by_split = {split: entries_of_split(manifest, split, val_fraction=0.1) for split in ("train", "valid", None)}
    sources = clip_splits(str(manifest), 24000, check_files=False, val_fraction=0.1)
    assert [len(by_split[None]), len(by_split["valid"])] == [100, len(sources["val"].entries)]
    assert by_split["valid"] == sources["val"].entries
    assert by_split["train"] == sources["train"].entries
    assert len(entries_of_split(manifest, "train")) == 100
    with pytest.raises(ValueError, match="no split 'test', only \\['train', 'val'\\]"):
        entries_of_split(manifest, "test", val_fraction=0.1)


def test_what_is_held_out_of_few_clips_and_of_named_splits(tmp_path):
    assert [len(val_of(entries_of(count, tmp_path), 0.05, tmp_path)) for count in (1, 2)] == [0, 0]
    assert len(val_of(entries_of(20, tmp_path), 0.05, tmp_path)) >= 1
    assert len(val_of(entries_of(2, tmp_path), 0.999, tmp_path)) < 2
    named = [replace(entry, split="test" if entry.id == "0" else "") for entry in entries_of(100, tmp_path)]
    assert hold_out(named, 0.05, tmp_path, "clips.csv") == named
    with pytest.raises(ValueError, match="val_fraction must be"):
        hold_out(named, 1.0, tmp_path, "clips.csv")


def test_a_manifest_without_splits_and_with_columns_of_its_own(tmp_path, write_clip):
    for n in range(20):
        write_clip(f"{n}.wav", 800, 8000)
    rows = "".join(f"{tmp_path}/{n}.wav,rain {n},a shower {n}\n" for n in range(20))
    manifest = tmp_path / "lists" / "metadata.csv"
    manifest.parent.mkdir()
    manifest.write_text(f"file_name,text,more\n{rows}")
    columns = ["path_column=file_name", "caption_column=[text,more]", "absolute_paths=true"]
    options = [f"data.splits.{option}" for option in (f"manifest={manifest}", *columns)]
    module = instantiate_data("data=manifest", "data.sample_rate_hz=8000", "data.batch_size=1", *options)
    assert sum(len(dataset) for dataset in module.datasets.values()) == 20
    assert set(module.datasets) == {"train", "val"}
    drawn = {module.datasets["train"][SampleKey(0, epoch)].caption.rstrip("0123456789") for epoch in range(20)}
    assert drawn == {"rain ", "a shower "}
    assert {module.datasets["val"][SampleKey(0, epoch)].caption[:4] for epoch in range(20)} == {"rain"}
    again = [module.datasets["train"][SampleKey(0, epoch)].caption for epoch in (3, 3)]
    assert again[0] == again[1]


def test_a_folder_is_enough_for_a_codec(tmp_path, write_clip):
    for name in ("train/a.wav", "valid/b.wav", "valid/deep/c.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_clip(name)
    (tmp_path / "train" / "notes.txt").touch()
    module = instantiate_data("data=folder", f"data.splits.folder={tmp_path}", "data.batch_size=1")
    assert {name: len(dataset) for name, dataset in module.datasets.items()} == {"train": 1, "val": 2}
    assert next(iter(module.train_dataloader()))["caption"] == [""]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no audio"):
        folder_splits(str(tmp_path / "empty"), 8000)
    assert set(folder_splits(str(tmp_path / "valid"), 24000, val_fraction=0.5)) == {"train", "val"}


def test_splits_of_other_names_are_known_or_refused():
    splits = {"Train": procedural()["train"], "validation": procedural()["val"]}
    assert set(AudioDataModule(splits, 24000, 0.1, 2).datasets) == {"train", "val"}
    assert set(joined_splits({"a": splits})) == {"train", "val"}
    unknown = {"fold1": splits["Train"]}
    with pytest.raises(ValueError, match="split 'fold1' is none of train"):
        AudioDataModule(unknown, 24000, 0.1, 2)
    with pytest.raises(ValueError, match="split 'fold1' is none of train"):
        joined_splits({"a": unknown})
    with pytest.raises(ValueError, match="'validation' and 'dev' are both 'val'"):
        joined_splits({"a": splits | {"dev": splits["validation"]}})


def test_training_without_validation_says_so(caplog):
    AudioDataModule({"train": procedural()["train"]}, 24000, 0.1, 2).setup("fit")
    assert "no clip is for validation" in caplog.text
