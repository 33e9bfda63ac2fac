import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from foley.core.hashing import hash_module
from foley.core.seeding import torch_generator
from foley.data.audio import AudioError
from foley.data.datamodule import AudioDataModule, LatentDataModule
from foley.data.dataset import AudioItem, SampleKey
from foley.data.encoding import encode_latents
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
    encode_latents(codec or FramesCodec(), data.whole_clips(0.5), folder, 2, 0.2, **options)
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
