"""Bucketing loses and repeats nothing, pads little and resumes; mixtures keep their weights, step by step."""

from collections import Counter

import numpy as np
import pytest
import torch

from foley.core.seeding import numpy_generator
from foley.data.datamodule import AudioDataModule
from foley.data.dataset import AudioItem
from foley.data.ordering import LengthBuckets, ResumableSampler, padding_fraction
from foley.data.splits import MixtureSource

SIZE, UNIT = 1003, 8
LENGTHS = np.random.default_rng(0).gamma(2.0, 3.0, SIZE).clip(0.3, 30.0)


class TimedNoise:
    """Clip i is `i % 50 + 1` hundredths of a second of the value i / size."""

    sample_rate_hz = 1000

    def __init__(self, size=300, name="n"):
        self.size, self.name = size, name

    def __len__(self):
        return self.size

    def durations_seconds(self, epoch):
        return ((np.arange(self.size) % 50 + 1) / 100).astype(np.float32)

    def render(self, index, epoch):
        return AudioItem(torch.full((10 * (index % 50 + 1),), index / self.size), "x", "", f"{self.name}{index}")


def buckets(window_batches=10, seed=0):
    return LengthBuckets(lambda epoch: LENGTHS, window_batches, seed)


def sampler(rank=0, world_size=1, window_batches=10, **options):
    return ResumableSampler(
        SIZE, 3, UNIT // world_size, rank=rank, world_size=world_size, arrange=buckets(window_batches), **options
    )


def test_a_bucketed_order_is_a_permutation_whose_remainder_stays_last():
    order = numpy_generator(1).permutation(SIZE)
    arranged = buckets()(order, 0, UNIT)
    assert sorted(arranged) == list(range(SIZE))
    remainder = SIZE % UNIT
    assert np.array_equal(arranged[-remainder:], order[-remainder:])
    window = 10 * UNIT
    assert set(arranged[:window]) == set(order[:window])
    few = order[:5]
    assert np.array_equal(buckets()(few, 0, UNIT), few)


def test_batches_are_neighbours_in_length_and_come_in_a_mixed_order():
    arranged = buckets(10**6)(numpy_generator(1).permutation(SIZE), 0, UNIT)
    batches = LENGTHS[arranged[: SIZE // UNIT * UNIT]].reshape(-1, UNIT)
    order = np.argsort(batches.min(axis=1))
    assert (batches.max(axis=1)[order][:-1] <= batches.min(axis=1)[order][1:]).all()
    assert abs(np.corrcoef(batches.mean(axis=1), np.arange(len(batches)))[0, 1]) < 0.3


def test_padding_shrinks_with_the_window():
    order = numpy_generator(1).permutation(SIZE)
    fractions = [padding_fraction(LENGTHS, buckets(window)(order, 0, UNIT), UNIT) for window in (1, 10, 100)]
    assert padding_fraction(LENGTHS, order, UNIT) == pytest.approx(fractions[0])
    assert fractions[0] > 0.4 > 0.2 > fractions[1] > 0.05 > fractions[2]
    assert padding_fraction(np.array([1.0, 3.0]), np.array([0, 1]), 2) == pytest.approx(1 / 3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_bucketed_batches_without_overlap_and_resume(world_size):
    ranks = [list(sampler(rank, world_size)) for rank in range(world_size)]
    joined = [key.index for keys in ranks for key in keys]
    assert len(set(joined)) == len(joined) == SIZE // UNIT * UNIT
    size = UNIT // world_size
    steps = [[key.index for keys in ranks for key in keys[i : i + size]] for i in range(0, len(ranks[0]), size)]
    spreads = [np.ptp(LENGTHS[step]) for step in steps]
    assert np.median(spreads) < 2.0 < np.std(LENGTHS)
    for rank, keys in enumerate(ranks):
        resumed = sampler(rank, world_size)
        resumed.load_state_dict({"epoch": 0, "consumed": 5 * UNIT, "size": SIZE})
        assert list(resumed) == keys[5 * size :]


def test_orders_differ_by_epoch_and_repeat_by_seed():
    one, again = sampler(), sampler()
    first, second = list(one), list(one)
    assert first == list(again)
    assert [key.index for key in first] != [key.index for key in second]


def module(source, **options):
    return AudioDataModule({"train": source, "val": source}, 1000, 0.4, batch_size=4, seed=5, **options)


def test_bucketed_batches_are_as_long_as_their_longest_clip():
    fixed, bucketed = module(TimedNoise()), module(TimedNoise(), bucket_batches=20)
    padding = []
    for data in (fixed, bucketed):
        batches = list(data.train_dataloader())
        ids = [id for batch in batches for id in batch["id"]]
        assert len(set(ids)) == len(ids) == 300
        real = sum(int(batch["length_samples"].sum()) for batch in batches)
        padding.append(1 - real / sum(batch["audio"].numel() for batch in batches))
    assert {batch["audio"].shape[-1] % 100 for batch in batches} == {0}
    assert padding[0] > 0.35 > 0.2 > padding[1]
    assert sum(len(batch["id"]) for batch in bucketed.val_dataloader()) == 300


def test_a_source_without_durations_cannot_be_bucketed():
    class Untimed(TimedNoise):
        durations_seconds = None

    class Unknown:
        sample_rate_hz = 1000

        def __len__(self):
            return 10

    with pytest.raises(ValueError, match=r"Unknown does not know how long .* bucket_batches"):
        next(iter(module(Unknown(), bucket_batches=2).train_dataloader()))


def ids_of(data, epoch, consumed=0):
    """Of every batch from there on."""
    state = {"epoch": epoch, "consumed": consumed, "size": len(data.datasets["train"]), "batches": 0}
    data.load_state_dict(state)
    return [batch["id"] for batch in data.train_dataloader()]


def test_weights_are_exact_in_every_epoch_and_close_in_every_stretch():
    sizes, weights = {"a": 40, "b": 400, "c": 4000}, [2.0, 1.0, 1.0]
    mixture = MixtureSource([TimedNoise(size, name) for name, size in sizes.items()], weights, size=2000, seed=1)
    for epoch in range(2):
        names = [id[0] for batch in ids_of(module(mixture), epoch) for id in batch]
        assert Counter(names) == {"a": 1000, "b": 500, "c": 500}
        assert all(abs(names[start : start + 400].count("a") / 400 - 0.5) < 0.1 for start in range(0, 2000, 400))


def test_a_mixture_resumes_at_the_next_step_and_knows_its_durations():
    mixture = MixtureSource([TimedNoise(30, "a"), TimedNoise(70, "b")], [1, 1], size=60, seed=2)
    data = module(mixture, bucket_batches=5)
    epochs = [ids_of(data, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert ids_of(module(mixture, bucket_batches=5), 1, consumed=16) == epochs[1][4:]
    for epoch in (0, 3):
        lengths = [len(mixture.render(slot, epoch).audio) / 1000 for slot in range(60)]
        assert mixture.durations_seconds(epoch) == pytest.approx(lengths)
