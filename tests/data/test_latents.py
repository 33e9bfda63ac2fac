import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from foley.core.hashing import hash_module
from foley.core.locks import FolderInUseError
from foley.core.seeding import torch_generator
from foley.data.audio import AudioError
from foley.data.datamodule import AudioDataModule, LatentDataModule
from foley.data.dataset import AudioItem, SampleKey
from foley.data.encoding import EncodingOptions, _Bar, encode_latents, latent_cache_writer
from foley.data.latents import LatentCacheError, LatentCacheIndex, LatentCollate, LatentDataset, StaleCacheError

HOP = 10
RATE = 1000
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
    progress = Progress(get_time=lambda: now[0])
    task = progress.add_task("train", total=16, rate="")
    now[0] = 4.0
    _advance(progress, task, 16)
    assert progress.tasks[task].fields["rate"] == "4.0 clips/s"
    with caplog.at_level(logging.INFO, "foley.data.encoding"):
        encode(tmp_path / "cache")
    assert f"latents of 7 clips are in {tmp_path / 'cache'}: train with data.cache_dir=" in caplog.text


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
    tensors = load_file(tmp_path / "cache" / "latents-00000.safetensors")
    rows = [r for e in index.entries if e.split == "train" for r in range(e.first_frame, e.first_frame + e.num_frames)]
    mean, std = tensors["mean"][rows].double(), tensors["std"][rows].double()
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
    assert not batch["latent"][0, :, 20:].any()
    assert batch["id"] == ["00", "05"]


def test_several_shards_hold_the_same(tmp_path, monkeypatch):
    one = LatentDataset(encode(tmp_path / "one"), "train", 50, random=False)
    monkeypatch.setattr("foley.data.encoding._FRAMES_PER_SHARD", 40)
    index = encode(tmp_path / "many")
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


def test_a_failed_encoding_leaves_nothing_and_the_old_cache_intact(tmp_path):
    class Failing(FramesCodec):
        def posterior(self, audio):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        encode(tmp_path / "cache", Failing())
    assert list(tmp_path.iterdir()) == []
    before = encode(tmp_path / "cache")
    with pytest.raises(LatentCacheError, match="float16 cannot hold"):
        encode(tmp_path / "cache", FramesCodec(1e6))
    assert LatentCacheIndex.read(tmp_path / "cache") == before
    assert encode(tmp_path / "cache", FramesCodec(3.0)).codec_hash != before.codec_hash
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


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
    with pytest.raises(LatentCacheError, match="no clip of the split 'train'"):
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


def two_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("foley.data.encoding._FRAMES_PER_SHARD", 40)
    return encode(tmp_path / "cache")


def edit_index(folder, change):
    stored = json.loads((folder / "index.json").read_text())
    change(stored)
    (folder / "index.json").write_text(json.dumps(stored))


def swap(folder):
    names = [folder / f"latents-0000{number}.safetensors" for number in (0, 1)]
    contents = [name.read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        name.write_bytes(content)


@pytest.mark.parametrize("hashed_bytes", [0, 1 << 20])
def test_swapped_shards_are_refused(tmp_path, monkeypatch, hashed_bytes):
    monkeypatch.setattr("foley.data.latents._HASHED_BYTES", hashed_bytes)
    index = two_shards(tmp_path, monkeypatch)
    swap(tmp_path / "cache")
    with pytest.raises(
        LatentCacheError, match=r"latents-0000.\.safetensors is not the shard that index\.json describes"
    ):
        LatentDataset(index, "train", 50)


def test_a_shard_of_other_values_is_refused_in_a_small_cache(tmp_path):
    index = encode(tmp_path / "cache")
    shard = tmp_path / "cache/latents-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(LatentCacheError, match="is not the shard"):
        LatentDataset(index, "train", 50)


ENTRIES = {
    "beyond the shard": ({"first_frame": 10**9}, "frames, but index.json names"),
    "before the shard": ({"first_frame": -5}, "entry '00': first_frame is -5"),
    "no frames": ({"num_frames": 0}, "entry '00': num_frames is 0"),
    "half a frame": ({"num_frames": 1.5}, "entry '00': num_frames is 1.5"),
    "no text": ({"caption": None}, "entry '00': id, caption"),
    "a text for captions": ({"other_captions": "rain"}, "entry '00': other_captions must be a list"),
    "a number among captions": ({"other_captions": [3]}, "entry '00': other_captions must be a list"),
    "another folder": ({"shard": "../x"}, "no file of this folder"),
    "an absent shard": ({"shard": "x"}, "x does not exist"),
    "an unknown field": ({"colour": 1}, "colour"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_impossible_entry_is_refused_by_name(tmp_path, case):
    encode(tmp_path / "cache")
    changes, message = ENTRIES[case]
    edit_index(tmp_path / "cache", lambda stored: stored["entries"][0].update(changes))
    with pytest.raises(LatentCacheError, match=message):
        LatentDataset(LatentCacheIndex.read(tmp_path / "cache"), "train", 50)


def test_an_entry_twice_is_refused(tmp_path):
    encode(tmp_path / "cache")
    edit_index(tmp_path / "cache", lambda stored: stored["entries"].append(stored["entries"][2]))
    with pytest.raises(LatentCacheError, match="entries '02' and '02' share frames of latents-00000"):
        LatentCacheIndex.read(tmp_path / "cache")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 100_000, '{"format": "foley-latents-2"}', "9" * 10_000])
def test_a_damaged_index_is_named(tmp_path, content):
    encode(tmp_path / "cache")
    (tmp_path / "cache/index.json").write_text(content)
    with pytest.raises(LatentCacheError, match=r"index\.json"):
        LatentCacheIndex.read(tmp_path / "cache")


@pytest.mark.parametrize("shards", [None, [], "latents"])
def test_an_index_without_hashes_is_no_way_around_them(tmp_path, shards):
    encode(tmp_path / "cache")
    edit_index(tmp_path / "cache", lambda stored: stored.update(shards=shards))
    with pytest.raises(LatentCacheError, match="`shards` must give the hash of each shard"):
        LatentCacheIndex.read(tmp_path / "cache")


def older_cache(folder, change=lambda tensors: tensors):
    """As version 0.1 wrote it, with other latents."""
    encode(folder)
    shard = folder / "latents-00000.safetensors"
    save_file(change(load_file(shard)), shard)
    edit_index(folder, lambda stored: (stored.pop("shards"), stored.update(format="foley-latents-1")))
    return folder


def test_an_older_cache_is_read_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        index = LatentCacheIndex.read(older_cache(tmp_path / "cache"))
    assert "no hash binds its shards" in caplog.text
    assert len(LatentDataset(index, "train", 50)) == 6


OTHERS = {
    "int8": (lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()}, "is I8"),
    "narrow": (lambda tensors: {name: tensor[:, 1:].contiguous() for name, tensor in tensors.items()}, "not float16"),
    "short": (lambda tensors: {name: tensor[1:].contiguous() for name, tensor in tensors.items()}, "frames, but index"),
    "without std": (lambda tensors: {"mean": tensors["mean"]}, "damaged or not a shard"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_latents_of_another_kind_are_refused(tmp_path, case):
    change, message = OTHERS[case]
    index = LatentCacheIndex.read(older_cache(tmp_path / "cache", change))
    with pytest.raises(LatentCacheError, match=message):
        LatentDataset(index, "train", 50)


def test_a_latent_that_is_not_finite_is_refused_by_name(tmp_path):
    def change(tensors):
        tensors["mean"][:20] = torch.nan
        return tensors

    index = LatentCacheIndex.read(older_cache(tmp_path / "cache", change))
    dataset = LatentDataset(index, "train", 50)
    (damaged,) = [entry.id for entry in dataset.entries if entry.first_frame == 0]
    with pytest.raises(LatentCacheError, match=f"the latent of clip '{damaged}' is not finite"):
        dataset[[entry.id for entry in dataset.entries].index(damaged)]


def test_a_second_writer_of_a_cache_is_refused(tmp_path):
    with latent_cache_writer(tmp_path / "cache", "a", RATE, HOP) as writer:
        writer.add(torch.ones(2, 4), torch.ones(2, 4), "x", "", "", "train", 0.04)
        with pytest.raises(FolderInUseError, match="the latents of"):
            encode(tmp_path / "cache")
    assert [entry.id for entry in LatentCacheIndex.read(tmp_path / "cache").entries] == ["x"]


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
