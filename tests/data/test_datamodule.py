import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from foley.core.config import PROJECT_ROOT
from foley.data.datamodule import AudioDataModule
from foley.data.dataset import Augmentation
from foley.data.splits import clip_splits, joined_splits, procedural_splits

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
