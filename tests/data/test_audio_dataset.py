import numpy as np
import pytest
import soundfile
import torch

from foley.core.seeding import torch_generator
from foley.data.audio import AudioError
from foley.data.dataset import (
    AudioCollate,
    AudioDataset,
    AudioItem,
    Augmentation,
    DataFaultError,
    PeakLevel,
    RmsLevel,
    SampleKey,
)
from foley.data.manifest import read_manifest
from foley.data.splits import CachedSource, ClipSource, MixtureSource

RATE = 24000


class NoiseSource:
    """Clip i is `length` samples of noise; indices in `faulty` raise."""

    def __init__(self, size=10, length=500, faulty=(), rate=RATE, name="n"):
        self.size, self.length, self.faulty, self.sample_rate_hz, self.name = size, length, faulty, rate, name
        self.rendered = 0

    def __len__(self):
        return self.size

    def render(self, index, epoch):
        self.rendered += 1
        if index in self.faulty:
            raise AudioError(f"{index}.wav", "is faulty")
        audio = torch.rand(self.length, generator=torch_generator(index)) - 0.5
        return AudioItem(audio, f"caption {index}", "label", f"{self.name}{index}")


def test_items_depend_on_seed_epoch_and_index_alone():
    def dataset(seed):
        return AudioDataset(NoiseSource(), 100, seed, augmentation=Augmentation())

    one, other = dataset(0), dataset(0)
    other[SampleKey(3, 0)]
    assert torch.equal(one[SampleKey(5, 2)].audio, other[SampleKey(5, 2)].audio)
    assert not torch.equal(one[SampleKey(5, 2)].audio, one[SampleKey(5, 3)].audio)
    assert not torch.equal(one[SampleKey(5, 2)].audio, dataset(1)[SampleKey(5, 2)].audio)
    assert torch.equal(one[5].audio, one[SampleKey(5, 0)].audio)


def test_crop_without_chance_is_the_beginning():
    source = NoiseSource()
    dataset = AudioDataset(source, 100, random_crop=False)
    assert torch.equal(dataset[SampleKey(1, 9)].audio, source.render(1, 0).audio[:100])
    assert len(AudioDataset(source, None)[0].audio) == 500


def test_faulty_clips_are_replaced_by_the_next_good_one_and_counted_once():
    dataset = AudioDataset(NoiseSource(faulty=(3, 4, 9)), 100, max_fault_fraction=0.5)
    assert [dataset[SampleKey(i, e)].id for e in range(2) for i in (3, 4, 9)] == ["n5", "n5", "n0"] * 2
    assert dataset.faults == {name: "is faulty" for name in ("3.wav", "4.wav", "9.wav")}
    with pytest.raises(AudioError):
        dataset.load(SampleKey(3, 0))


def test_too_many_faulty_clips_stop_the_run():
    dataset = AudioDataset(NoiseSource(faulty=(3, 4, 5)), 100, max_fault_fraction=0.2)
    with pytest.raises(DataFaultError, match=r"3 of 10 clips cannot be used.*5\.wav: is faulty"):
        dataset[3]
    with pytest.raises(DataFaultError, match="none of 2 clips"):
        AudioDataset(NoiseSource(2, faulty=(0, 1)), 100, max_fault_fraction=1.0)[1]


def test_any_source_s_absurd_samples_are_rejected():
    class Absurd(NoiseSource):
        def render(self, index, epoch):
            return AudioItem(torch.full((10,), float("nan")), "x", id="absurd")

    for source in (Absurd(), CachedSource(Absurd(), 1)):
        with pytest.raises(AudioError, match="absurd: holds NaN"):
            AudioDataset(source, 10).load(SampleKey(0))


@pytest.mark.parametrize("level", [None, PeakLevel(), RmsLevel()])
def test_silent_clips_are_kept_or_dropped(level, tmp_path, write_clip, write_jsonl):
    soundfile.write(tmp_path / "silent.wav", np.zeros(1000), RATE)
    write_clip("loud.wav", 1000)
    entries = read_manifest(write_jsonl(*({"path": f"{n}.wav", "caption": n} for n in ("silent", "loud"))))
    for source in (ClipSource(entries), CachedSource(ClipSource(entries), 1)):
        kept = AudioDataset(source, 100, level=level, augmentation=Augmentation())[0]
        assert kept.id == "silent.wav"
        assert torch.equal(kept.audio, torch.zeros(100))
        assert AudioDataset(source, 100, level=level, drop_silent=True)[0].id == "loud.wav"


def test_a_clip_of_one_sample_is_padded_and_its_length_kept(tmp_path, write_jsonl):
    soundfile.write(tmp_path / "one.wav", np.array([0.25]), RATE)
    entries = read_manifest(write_jsonl({"path": "one.wav", "caption": "a click"}))
    item = AudioDataset(ClipSource(entries), 4800, level=PeakLevel(0.0), augmentation=Augmentation(0.0, 0.0))[0]
    batch = AudioCollate(4800)([item, AudioItem(torch.ones(4800), "x")])
    assert batch["audio"].shape == (2, 1, 4800)
    assert batch["length_samples"].tolist() == [1, 4800]
    assert batch["audio"][0, 0, :2].tolist() == pytest.approx([1.0, 0.0])
    assert batch["caption"] == ["a click", "x"]
    assert AudioCollate(None)([item])["audio"].shape == (1, 1, 1)


def test_levels():
    audio = torch.tensor([0.1, -0.2, 0.1, 0.0])
    assert PeakLevel(-6.0)(audio).abs().max().item() == pytest.approx(10 ** (-6 / 20))
    assert RmsLevel(-20.0)(audio).square().mean().sqrt().item() == pytest.approx(0.1)
    spike = torch.zeros(10000).index_fill(0, torch.tensor([5]), 0.1)
    assert RmsLevel(-20.0, -1.0)(spike).max().item() == pytest.approx(10 ** (-1 / 20))


def test_augmentation_flips_and_attenuates_within_its_range():
    audio = torch.ones(1)
    gains = [float(Augmentation(0.5, 6.0)(audio, np.random.default_rng(seed))) for seed in range(200)]
    assert 60 < sum(gain < 0 for gain in gains) < 140
    assert all(10 ** (-6 / 20) <= abs(gain) <= 1 for gain in gains)


def test_cache_changes_the_time_and_nothing_else():
    source = NoiseSource()
    cached, full = CachedSource(source, 1), CachedSource(source, 0)
    first, again, uncached = cached.render(2, 0), cached.render(2, 1), full.render(2, 1)
    assert torch.equal(first.audio, again.audio)
    assert torch.equal(first.audio, uncached.audio)
    assert source.rendered == 2
    torch.testing.assert_close(first.audio, source.render(2, 0).audio, atol=1e-4, rtol=0)
    assert first.caption == "caption 2"


def test_mixture_takes_every_source_whole():
    mixture = MixtureSource([NoiseSource(3, name="a"), NoiseSource(4, name="b")])
    for epoch in range(2):
        ids = [mixture.render(index, epoch).id for index in range(len(mixture))]
        assert sorted(ids) == ["a0", "a1", "a2", "b0", "b1", "b2", "b3"]


def test_mixture_by_weight_hears_every_clip_equally_often():
    mixture = MixtureSource([NoiseSource(3, name="a"), NoiseSource(4, name="b")], [1, 3], size=8)
    assert mixture.shares == [2, 6]
    ids = [mixture.render(index, epoch).id for epoch in range(6) for index in range(len(mixture))]
    assert {ids.count(f"a{i}") for i in range(3)} == {4}
    assert {ids.count(f"b{i}") for i in range(4)} == {9}


def test_mixture_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one sample rate"):
        MixtureSource([NoiseSource(), NoiseSource(rate=16000)])
    with pytest.raises(ValueError, match="expected 1 weights"):
        MixtureSource([NoiseSource()], [0.5, 0.5])
