"""Channels on their way from files to batches: as many as are wanted, and what becomes of any other number."""

import logging

import numpy as np
import pytest
import soundfile
import torch

from foley.core.channels import (
    ChannelsError,
    channels_of,
    doubled_recordings,
    fit_channels,
    to_left_right,
    to_mid_side,
)
from foley.core.rates import resample
from foley.data.audio import AudioError, encode_audio, read_audio, read_encoded
from foley.data.datamodule import AudioDataModule
from foley.data.dataset import AudioCollate, AudioItem, PeakLevel
from foley.data.entries import ManifestEntry
from foley.data.hub_datasets import HubColumns
from foley.data.procedural import ProceduralDataset
from foley.data.shards import ShardIndex, ShardSource
from foley.data.shards_writer import write_shards
from foley.data.splits import CachedSource, ClipSource, MixtureSource, folder_splits

RATE = 16000


def noise(channels: int, num_samples: int = 1600, seed: int = 0) -> np.ndarray:
    """`[T, channels]` of 16 bits, which files give back as they are."""
    values = np.random.default_rng(seed).integers(-20000, 20000, (num_samples, channels)).astype(np.float32)
    return values / np.float32(2**15)


@pytest.fixture
def folder(tmp_path):
    """One file of each number of channels."""
    for channels in (1, 2, 6):
        soundfile.write(tmp_path / f"{channels}.wav", noise(channels), RATE)
    return tmp_path


def test_middle_and_side_keep_all_and_half_of_the_power():
    audio = torch.randn(3, 2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = to_mid_side(audio)
    torch.testing.assert_close(to_left_right(changed), audio, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(changed.square().sum(), audio.square().sum() / 2)
    assert not to_mid_side(audio[:, :1].expand(-1, 2, -1))[:, 1].any()  # equal channels have no side


@pytest.mark.parametrize(("stored", "wanted"), [(1, 1), (2, 1), (6, 1), (1, 2), (2, 2), (6, 2)])
def test_as_many_channels_as_are_wanted_are_kept_and_others_are_mixed(folder, stored, wanted):
    samples, audio = noise(stored), read_audio(folder / f"{stored}.wav", RATE, channels=wanted)
    if wanted == 1:
        np.testing.assert_array_equal(audio, samples.mean(axis=1, dtype=np.float32) if stored > 1 else samples[:, 0])
    elif stored == wanted:
        np.testing.assert_array_equal(audio, samples.T)
    else:
        np.testing.assert_array_equal(audio, np.stack([fit_channels(samples)] * wanted))


def test_refused_where_asked_and_only_what_would_be_mixed(folder):
    with pytest.raises(AudioError, match=r"2.wav: holds 2 channels, and downmix=refuse mixes none; downmix=mean"):
        read_audio(folder / "2.wav", RATE, downmix="refuse")
    with pytest.raises(AudioError, match="holds 6 channels"):
        read_audio(folder / "6.wav", RATE, downmix="refuse", channels=2)
    with pytest.raises(ChannelsError):
        fit_channels(noise(2), downmix="refuse")
    assert read_audio(folder / "2.wav", RATE, downmix="refuse", channels=2).shape == (2, 1600)
    assert read_audio(folder / "1.wav", RATE, downmix="refuse", channels=2).shape == (2, 1600)
    assert read_audio(folder / "1.wav", RATE, downmix="refuse").shape == (1600,)


def test_a_mono_file_among_stereo_is_said_once(folder, caplog, monkeypatch):
    monkeypatch.setattr(doubled_recordings, "count", 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            read_audio(folder / "1.wav", RATE, channels=2)
        read_audio(folder / "2.wav", RATE, channels=2)
    assert caplog.text.count("1.wav is mono: each of 2 channels is the same") == 1
    assert doubled_recordings.count == 2


def test_channels_are_resampled_each_by_itself():
    samples = noise(2).T
    both = resample(samples, RATE, 24000)
    np.testing.assert_array_equal(both, np.stack([resample(row, RATE, 24000) for row in samples]))
    decoded, rate = read_encoded(encode_audio(torch.from_numpy(samples.copy()), 22050, "opus"), "some.opus")
    assert (decoded.shape[1], rate) == (2, 24000)


def test_a_folder_becomes_batches_of_both_channels(folder):
    splits = folder_splits(str(folder), RATE, channels=2, check_files=False, cache_megabytes=1)
    assert {channels_of(source) for source in splits.values()} == {2}
    data = AudioDataModule(splits, RATE, 0.05, 3, channels=2, level=PeakLevel())
    batch = next(iter(data.train_dataloader()))
    assert batch["audio"].shape == (3, 2, 800)
    ends = batch["audio"].abs().amax((1, 2))
    assert bool((ends <= 10 ** (-1 / 20) + 1e-6).all())  # one gain for both, so that they stay in balance
    assert data.whole_clips(0.05)["train"][1].audio.shape == (2, 800)
    with pytest.raises(ValueError, match=r"split 'train' has clips of 2 channels, expected 1 \(data.channels\)"):
        AudioDataModule(splits, RATE, 0.05, 3)


def test_a_cache_and_a_mixture_have_the_channels_of_what_they_hold(folder):
    stereo = ClipSource([ManifestEntry(folder / "2.wav", "rain", "2")], RATE, channels=2)
    cached = CachedSource(stereo, 1)
    torch.testing.assert_close(cached.render(0, 0).audio, stereo.render(0, 0).audio, atol=2**-16, rtol=0)
    assert channels_of(MixtureSource([cached, stereo])) == 2
    with pytest.raises(ValueError, match=r"must share one number of channels, got \[1, 2\]"):
        MixtureSource([stereo, ClipSource([ManifestEntry(folder / "2.wav", "rain", "2")], RATE)])


def test_shards_hold_both_channels_and_give_one_where_it_is_wanted(folder, tmp_path):
    entries = [ManifestEntry(folder / f"{name}.wav", "rain", str(name)) for name in (1, 2)]
    write_shards(entries, str(tmp_path / "shards"), channels=2)
    index = ShardIndex.read(str(tmp_path / "shards"))
    source = ShardSource(index, "train", RATE, channels=2)
    found = {item.id: item for item in (source.render(index, 0) for index in range(2))}
    np.testing.assert_array_equal(found["2"].audio, noise(2).T)
    np.testing.assert_array_equal(found["1"].audio, noise(1).T.repeat(2, axis=0))
    mono = {item.id: item for item in (ShardSource(index, "train", RATE).render(index_, 0) for index_ in range(2))}
    np.testing.assert_array_equal(mono["2"].audio, noise(2).mean(axis=1, dtype=np.float32))
    assert source.durations_seconds(0).tolist() == pytest.approx([0.1, 0.1])


def test_a_row_of_the_hub_keeps_both_channels(folder):
    columns = HubColumns("audio", sample_rate_hz=RATE, channels=2)
    item = columns.item({"audio": {"path": str(folder / "2.wav")}}, {}, "train/0")
    np.testing.assert_array_equal(item.audio, noise(2).T)


def test_synthesised_stereo_is_the_mono_clip_somewhere_between_the_sides():
    mono, stereo = (ProceduralDataset(4, 0, 0.2, RATE, channels=channels) for channels in (1, 2))
    shares = []
    for index in range(4):
        one, both = mono.render(index).audio, stereo.render(index).audio
        assert mono.render(index).caption == stereo.render(index).caption
        torch.testing.assert_close(both.square().sum(0), one.square(), atol=1e-6, rtol=1e-5)
        shares.append(float(both[0].square().sum() / one.square().sum()))
    assert len(set(shares)) == 4
    with pytest.raises(ValueError, match="`channels` must be 1 or 2 for synthesised clips, got 3"):
        ProceduralDataset(4, 0, 0.2, RATE, channels=3)


def test_a_batch_pads_both_channels_at_the_end():
    items = [AudioItem(torch.ones(2, length), "") for length in (3, 5)]
    batch = AudioCollate(None)(items)
    assert batch["audio"].shape == (2, 2, 5)
    assert batch["length_samples"].tolist() == [3, 5]
    assert batch["audio"][0, :, 3:].eq(0).all()
