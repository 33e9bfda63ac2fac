import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from foley.core.columns import Texts, write_columns
from foley.core.hashing import hash_file, hash_module
from foley.core.seeding import torch_generator
from foley.data.audio import AudioError
from foley.data.datamodule import AudioDataModule, LatentDataModule
from foley.data.dataset import AudioItem, SampleKey
from foley.data.encoding import EncodingOptions, _Bar, encode_latents
from foley.data.latent_format import LatentCacheError, LatentClips, LatentEntry, LatentLayout, write_index, write_shard
from foley.data.latents import LatentCacheIndex, LatentCollate, LatentDataset, StaleCacheError

HOP = 10
RATE = 1000
FRAME_MEGABYTES = 2 * 2 * HOP / 2**20
STD = 0.05


class FramesCodec(nn.Module):
    """The mean is the HOP samples of a frame scaled by a weight; the standard deviation is constant."""

    sample_rate_hz = RATE
    hop_samples = HOP

    def __init__(self, weight=2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def posterior(self, audio):
        mean = audio.unflatten(-1, (-1, HOP)).squeeze(1).transpose(1, 2) * self.weight
        return SimpleNamespace(mean=mean, std=torch.full_like(mean, STD))


class Clips:
    sample_rate_hz = RATE

    def __init__(self, *lengths, faulty=()):
        self.lengths, self.faulty = lengths, faulty

    def __len__(self):
        return len(self.lengths)

    def render(self, index, epoch):
        if index in self.faulty:
            raise AudioError(f"{index}.wav", "is faulty")
        audio = torch.randn(self.lengths[index], generator=torch_generator(index)).clamp(-1, 1)
        return AudioItem(audio, f"caption {index}", "label", f"{index:02d}")


def encode(folder, codec=None, splits=None, **options):
    splits = splits or {"train": Clips(5, 195, 200, 200, 203, 900), "val": Clips(100)}
    data = AudioDataModule(splits, RATE, duration_seconds=0.2, batch_size=2, max_fault_fraction=0.5)
    encode_latents(codec or FramesCodec(), data.whole_clips(0.5), folder, EncodingOptions(2, 0.2, **options))
    return LatentCacheIndex.read(folder)


def test_index_tells_what_was_encoded(tmp_path):
    codec = FramesCodec()
    index = encode(tmp_path / "cache", codec)
    assert index.codec_hash == hash_module(codec)
    assert (index.sample_rate_hz, index.hop_samples, index.splits) == (RATE, HOP, ["train", "val"])
    train = [entry for entry in index.entries if entry.split == "train"]
    assert [entry.id for entry in train] == ["00", "01", "02", "03", "04", "05"]
    assert [entry.num_frames for entry in train] == [20, 20, 20, 20, 21, 50]
    assert [entry.duration_seconds for entry in train] == [0.005, 0.195, 0.2, 0.2, 0.203, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_bar_of_one_batch_says_how_fast_it_was_and_the_end_says_what_is_where(tmp_path, caplog):
    now = [0.0]
    bar = _Bar(20, 4, get_time=lambda: now[0])
    now[0] = 4.0
    bar.advance(16)
    (task,) = bar.progress.tasks
    assert (task.completed, task.fields["rate"]) == (20, "4.0 clips/s")
    with caplog.at_level(logging.INFO, "foley.data.encoding"):
        encode(tmp_path / "cache")
    assert f"latents of 7 clips are in {tmp_path / 'cache'}, 0 were left out: train with data.cache_dir=" in caplog.text


def test_latents_are_those_of_each_clip_alone(tmp_path):
    index = encode(tmp_path / "cache")
    dataset = LatentDataset(index, "train", 50, random=False)
    for i, length in enumerate([5, 195, 200, 200, 203, 500]):
        item = dataset[SampleKey(i, 3)]
        audio = Clips(*[900] * 6).render(i, 0).audio
        audio = torch.randn(900 if i == 5 else length, generator=torch_generator(i)).clamp(-1, 1)[:length]
        padded = functional.pad(audio, (0, item.latent.shape[1] * HOP - length))
        torch.testing.assert_close(item.latent, 2 * padded.unflatten(0, (-1, HOP)).T, atol=2e-3, rtol=1e-3)
        assert item.caption == f"caption {i}"


def test_statistics_are_those_of_posterior_samples_of_the_training_split(tmp_path):
    index = encode(tmp_path / "cache")
    latent = load_file(tmp_path / "cache" / index.shards[0].name)["latent"]
    rows = [r for e in index.entries if e.split == "train" for r in range(e.first_frame, e.first_frame + e.num_frames)]
    mean, std = latent[rows].double().unbind(1)
    assert std.mean().item() == pytest.approx(STD, abs=1e-4)
    expected = (mean.var(0, correction=0) + std.square().mean(0)).sqrt()
    torch.testing.assert_close(index.statistics[0], mean.mean(0).float())
    torch.testing.assert_close(index.statistics[1], expected.float())


def test_posterior_samples_depend_on_seed_epoch_and_index_alone(tmp_path):
    index = encode(tmp_path / "cache")
    dataset, other = LatentDataset(index, "train", 20, seed=1), LatentDataset(index, "train", 20, seed=1)
    other[SampleKey(0, 0)]
    assert torch.equal(dataset[SampleKey(5, 1)].latent, other[SampleKey(5, 1)].latent)
    assert not torch.equal(dataset[SampleKey(5, 1)].latent, dataset[SampleKey(5, 2)].latent)
    mean = LatentDataset(index, "train", 20, random=False)[2].latent
    draws = torch.stack([dataset[SampleKey(2, epoch)].latent for epoch in range(400)])
    torch.testing.assert_close(draws.mean(0), mean, atol=0.015, rtol=0)


def test_training_draws_one_of_several_captions_by_seed_and_epoch(tmp_path):
    class Captioned(Clips):
        def render(self, index, epoch):
            return replace(super().render(index, epoch), other_captions=("another",))

    index = encode(tmp_path / "cache", splits={"train": Captioned(200, 200), "val": Captioned(100)})
    datasets = [LatentDataset(index, "train", 10, seed=seed) for seed in (0, 0, 1)]
    drawn, again, other = ([data[SampleKey(0, epoch)].caption for epoch in range(20)] for data in datasets)
    assert drawn == again != other
    assert set(drawn) == {"caption 0", "another"}
    fixed = LatentDataset(index, "val", 10, random=False)
    assert {fixed[SampleKey(0, epoch)].caption for epoch in range(20)} == {"caption 0"}


def test_crops_are_padded_and_masked(tmp_path):
    index = encode(tmp_path / "cache")
    dataset = LatentDataset(index, "train", 30)
    batch = LatentCollate(30)([dataset[SampleKey(0)], dataset[SampleKey(5)]])
    assert batch["latent"].shape == (2, HOP, 30)
    assert batch["frame_mask"].sum(1).tolist() == [20, 30]
    assert batch["is_padded"]
    assert not LatentCollate(30)([dataset[SampleKey(5)]])["is_padded"]
    assert not batch["latent"][0, :, 20:].any()
    assert batch["id"] == ["00", "05"]


def test_several_shards_hold_the_same(tmp_path):
    one = LatentDataset(encode(tmp_path / "one"), "train", 50, random=False)
    index = encode(tmp_path / "many", shard_megabytes=40 * FRAME_MEGABYTES)
    assert len({entry.shard for entry in index.entries}) > 2
    many = LatentDataset(index, "train", 50, random=False)
    assert all(torch.equal(one[i].latent, many[i].latent) for i in range(6))


def test_a_stale_cache_is_refused_naming_both_codecs(tmp_path):
    codec, other = FramesCodec(), FramesCodec(3.0)
    encode(tmp_path / "cache", codec)
    module = LatentDataModule(str(tmp_path / "cache"), 0.2, 2)
    assert module.codec_hash == hash_module(codec)
    module.require_codec(hash_module(codec))
    with pytest.raises(StaleCacheError, match=rf"(?s){hash_module(codec)}.*{hash_module(other)}"):
        module.require_codec(hash_module(other))


def test_faulty_clips_are_left_out(tmp_path):
    index = encode(tmp_path / "cache", splits={"train": Clips(200, 200, 200, faulty=(1,))})
    assert [entry.id for entry in index.entries] == ["00", "02"]


def test_what_is_no_cache_is_refused(tmp_path):
    with pytest.raises(LatentCacheError, match="is no latent cache"):
        LatentCacheIndex.read(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").touch()
    with pytest.raises(LatentCacheError, match="not a latent cache; choose another"):
        encode(tmp_path / "cache")
    (tmp_path / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(LatentCacheError, match="not of the format"):
        LatentCacheIndex.read(tmp_path)
    with pytest.raises(LatentCacheError, match="the data has no split 'train'"):
        encode(tmp_path / "val_only", splits={"val": Clips(200)})
    with pytest.raises(LatentCacheError, match="no split 'test'"):
        LatentDataset(encode(tmp_path / "good"), "test", 20)


def test_the_codec_s_sample_rate_must_be_the_data_s(tmp_path):
    codec = FramesCodec()
    codec.sample_rate_hz = 2000
    with pytest.raises(ValueError, match="1000 Hz and the codec at 2000 Hz"):
        encode(tmp_path / "cache", codec)


def test_latent_batches(tmp_path):
    encode(tmp_path / "cache")
    module = LatentDataModule(str(tmp_path / "cache"), duration_seconds=0.2, batch_size=3)
    batches = list(module.train_dataloader())
    assert [batch["latent"].shape for batch in batches] == [(3, HOP, 20)] * 2
    assert sorted(id for batch in batches for id in batch["id"]) == ["00", "01", "02", "03", "04", "05"]
    (validation,) = module.val_dataloader()
    assert validation["frame_mask"].sum().item() == 20
    assert module.latent_statistics[0].shape == (HOP,)


def test_clips_of_a_source_can_occur_more_often(tmp_path, caplog):
    index = encode(tmp_path / "cache")
    repeated = LatentDataset(index, "train", 20, repeats={"05": 3, "nowhere/": 2})
    assert [entry.id for entry in repeated.entries] == ["00", "01", "02", "03", "04", "05", "05", "05"]
    assert not torch.equal(repeated[6].latent, repeated[7].latent)
    assert "nowhere/" in caplog.text
    module = LatentDataModule(str(tmp_path / "cache"), 0.2, 2, repeats={"05": 3})
    assert {split: len(data) for split, data in module.datasets.items()} == {"train": 8, "val": 1}


def edit_index(folder, change):
    stored = json.loads((folder / "index.json").read_text())
    change(stored)
    (folder / "index.json").write_text(json.dumps(stored))


def edit_clips(folder, **columns):
    """Change columns of the table, as somebody would who also mends the index that names it."""
    index = LatentCacheIndex.read(folder)
    write_columns(folder / "clips.safetensors", {**index.clips.columns(), **columns})
    about = {
        "clips_bytes": (folder / "clips.safetensors").stat().st_size,
        "clips_sha256": hash_file(folder / "clips.safetensors"),
    }
    edit_index(folder, lambda stored: stored.update(about))


def two_alike(tmp_path):
    """A cache of two shards of one size."""
    splits = {"train": Clips(200, 200)}
    return encode(tmp_path / "cache", splits=splits, shard_megabytes=20 * FRAME_MEGABYTES)


def swap(folder, index):
    names = [folder / shard.name for shard in index.shards]
    contents = [name.read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        name.write_bytes(content)


def test_swapped_shards_are_refused(tmp_path, monkeypatch):
    index = two_alike(tmp_path)
    swap(tmp_path / "cache", index)
    with pytest.raises(LatentCacheError, match=r"latents-.*\.safetensors is not the shard that index\.json describes"):
        LatentDataset(index, "train", 50)


def test_swapped_shards_of_a_large_cache_are_refused_when_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("foley.data.latents._HASHED_BYTES", 0)
    index = two_alike(tmp_path)
    swap(tmp_path / "cache", index)
    dataset = LatentDataset(index, "train", 50)
    with pytest.raises(LatentCacheError, match=r"latents-.*\.safetensors is not the shard that index\.json describes"):
        dataset[0]


def test_an_absent_shard_or_one_of_another_size_is_named_by_a_listing_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("foley.data.latents._HASHED_BYTES", 0)
    index = two_alike(tmp_path)
    first, second = (tmp_path / "cache" / shard.name for shard in index.shards)
    second.write_bytes(second.read_bytes() + b"x")
    with pytest.raises(LatentCacheError, match=rf"{second.name} has \d+ bytes, but index.json names"):
        LatentDataset(LatentCacheIndex.read(tmp_path / "cache"), "train", 50)
    first.unlink()
    with pytest.raises(LatentCacheError, match=f"{first.name} does not exist, but index.json names it"):
        LatentDataset(LatentCacheIndex.read(tmp_path / "cache"), "train", 50)


def test_a_shard_of_other_values_is_refused_in_a_small_cache(tmp_path):
    index = encode(tmp_path / "cache")
    shard = tmp_path / "cache" / index.shards[0].name
    content = bytearray(shard.read_bytes())
    content[index.shards[0].offset] ^= 1
    shard.write_bytes(content)
    with pytest.raises(LatentCacheError, match="is not the shard"):
        LatentDataset(index, "train", 50)


def changed(column, value):
    """A column whose first row has another value."""
    return np.concatenate([np.array([value], column.dtype), column[1:]])


CLIPS = {
    "beyond the shard": ({"first_frame": 10**9}, "clip '00': its frames are beyond its shard"),
    "far beyond the shard": ({"first_frame": 2**63 - 1}, "clip '00': its frames are beyond its shard"),
    "before the shard": ({"first_frame": -5}, "clip '00': its first frame is before its shard"),
    "no frames": ({"num_frames": 0}, "clip '00': it has no frames"),
    "no split": ({"split": 9}, "clip '00': its split has no name"),
    "no shard": ({"shard": 7}, "clip '00': its shard is not among those of the index"),
    "before all shards": ({"shard": -1}, "clip '00': its shard is not among those of the index"),
}


@pytest.mark.parametrize("case", CLIPS)
def test_an_impossible_clip_is_refused_by_name(tmp_path, case):
    index = encode(tmp_path / "cache")
    changes, message = CLIPS[case]
    edit_clips(
        tmp_path / "cache", **{name: changed(getattr(index.clips, name), value) for name, value in changes.items()}
    )
    with pytest.raises(LatentCacheError, match=message):
        LatentCacheIndex.read(tmp_path / "cache")


def test_clips_that_share_frames_are_refused(tmp_path):
    index = encode(tmp_path / "cache")
    first_frame = index.clips.first_frame.copy()
    first_frame[3] = first_frame[2]
    edit_clips(tmp_path / "cache", first_frame=first_frame)
    with pytest.raises(LatentCacheError, match=r"clips '0.' and '0.' share frames of a shard"):
        LatentCacheIndex.read(tmp_path / "cache")


def test_a_text_that_is_no_text_is_named_when_it_is_read(tmp_path):
    index = encode(tmp_path / "cache")
    captions = Texts(np.full_like(index.clips.caption.utf8, 0xFF), index.clips.caption.ends)
    edit_clips(tmp_path / "cache", caption=captions)
    dataset = LatentDataset(LatentCacheIndex.read(tmp_path / "cache"), "train", 50)
    with pytest.raises(ValueError, match=r"clips\.safetensors is damaged"):
        dataset[0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_clips", 3, "it names 3 clips"),
        ("clips_bytes", 3, "clips.safetensors is not the one that it describes"),
        ("clips_sha256", "0", "clips.safetensors is not the one that it describes"),
        ("channels", 3, "must have 3 values"),
        ("store", "median", "give mean_std, mean, sample"),
        ("hop_samples", 0, "hop_samples=0"),
        ("splits", "train", "must be a list"),
        ("shards", [], "its shard is not among"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, name, value, message):
    encode(tmp_path / "cache")
    edit_index(tmp_path / "cache", lambda stored: stored.update({name: value}))
    with pytest.raises(LatentCacheError, match=message):
        LatentCacheIndex.read(tmp_path / "cache")


def test_a_cache_without_its_table_is_refused(tmp_path):
    encode(tmp_path / "cache")
    (tmp_path / "cache/clips.safetensors").unlink()
    with pytest.raises(LatentCacheError, match=r"clips\.safetensors is not there"):
        LatentCacheIndex.read(tmp_path / "cache")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 100_000, '{"format": "foley-latents-3"}', "9" * 10_000])
def test_a_damaged_index_is_named(tmp_path, content):
    encode(tmp_path / "cache")
    (tmp_path / "cache/index.json").write_text(content)
    with pytest.raises(LatentCacheError, match=r"index\.json"):
        LatentCacheIndex.read(tmp_path / "cache")


def test_a_cache_of_an_earlier_format_names_the_command_that_converts_it(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"format": "foley-latents-2"}))
    with pytest.raises(LatentCacheError, match=f"foley convert-latents cache_dir={tmp_path} output_dir=FOLDER"):
        LatentCacheIndex.read(tmp_path)


def test_a_latent_that_is_not_finite_is_refused_by_name(tmp_path):
    layout = LatentLayout("a", RATE, HOP, 2, "mean", ("train",))
    entries = [LatentEntry(str(number), "", "", "train", "s", 4 * number, 4, 0.04) for number in range(3)]
    latent = torch.zeros(12, 1, 2, dtype=torch.float16)
    latent[5] = torch.nan
    clips = LatentClips.of(entries, ["train"], ["s"])
    shard = write_shard(tmp_path / "latents-00000-00000.safetensors", latent, clips, layout)
    write_index(tmp_path, layout, clips, [shard], (torch.zeros(2), torch.ones(2)))
    dataset = LatentDataset(LatentCacheIndex.read(tmp_path), "train", 4)
    assert not dataset[0].latent.any()
    with pytest.raises(LatentCacheError, match="the latent of clip '1' is not finite"):
        dataset[1]


def test_cut_padded_and_silent_clips_are_counted_and_named(tmp_path, caplog):
    class SomeSilent(Clips):
        def render(self, index, epoch):
            item = super().render(index, epoch)
            return item if index != 1 else AudioItem(torch.zeros(300), item.caption, item.label, item.id)

    with caplog.at_level(logging.WARNING):
        encode(tmp_path / "cache", splits={"train": SomeSilent(5, 300, 900, 800)})
    assert "train: 2 clips are cut to their first 0.5 s (windows=all): 02, 03" in caplog.text
    assert "train: 1 clips are shorter than 0.2 s and padded: 00" in caplog.text
    assert "train: 1 clips are silent: 01" in caplog.text


def test_all_windows_of_a_long_clip_are_encoded(tmp_path):
    index = encode(tmp_path / "cache", splits={"train": Clips(200, 1200)}, windows="all")
    assert [entry.id for entry in index.entries] == ["00", "01#0.00s", "01#0.50s", "01#0.70s"]
    assert [entry.caption for entry in index.entries] == ["caption 0", *["caption 1"] * 3]
    dataset = LatentDataset(index, "train", 50, random=False)
    audio = Clips(200, 1200).render(1, 0).audio
    for number, start in ((1, 0), (2, 500), (3, 700)):
        expected = 2 * audio[start : start + 500].unflatten(0, (-1, HOP)).T
        torch.testing.assert_close(dataset[number].latent, expected, atol=2e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="windows=some: give first or all"):
        encode(tmp_path / "cache", windows="some")


@pytest.mark.parametrize("half_of", ["caption", "others"])
def test_half_a_surrogate_pair_loses_one_clip_and_not_the_encoding(tmp_path, caplog, half_of):
    class Halved(Clips):
        def render(self, index, epoch):
            item = super().render(index, epoch)
            captions = ("a dog", ("a \ud800 dog",)) if half_of == "others" else ("a \ud800 dog", ())
            return item if index else AudioItem(item.audio, captions[0], item.label, item.id, captions[1])

    with caplog.at_level(logging.WARNING):
        index = encode(tmp_path / "cache", splits={"train": Halved(200, 200)})
    assert [entry.id for entry in index.entries] == ["01"]
    assert "its caption holds half a surrogate pair" in caplog.text
