"""Pairs of latents: what is read, what a batch holds, and which folders are refused."""

import json
from pathlib import Path

import pytest
import torch
from latent_parts import latent_cache_writer
from preference_parts import HOP, RATE_HZ, SECONDS, pair_data, write_pairs
from training_parts import CHANNELS, FRAMES

from foley.core.reading import DamagedFileError
from foley.data.dataset import SampleKey
from foley.data.latents import LatentCacheIndex
from foley.data.preferences import (
    PREFERENCES_FILE,
    Preference,
    PreferenceDataModule,
    PreferenceError,
    Preferences,
    hash_of_latents,
)


def stored(folder: Path) -> dict:
    return json.loads((folder / PREFERENCES_FILE).read_text())


def rewrite(folder: Path, **changes: object) -> None:
    (folder / PREFERENCES_FILE).write_text(json.dumps({**stored(folder), **changes}))


def test_a_batch_holds_winners_and_their_losers(tmp_path: Path) -> None:
    data = pair_data(write_pairs(tmp_path / "pairs"))
    assert {name: len(dataset) for name, dataset in data.datasets.items()} == {"train": 8, "val": 2}
    items = [data.datasets["val"][row] for row in range(2)]
    batch = data.collate(items)
    assert batch["latent"].shape == batch["loser"].shape == (2, CHANNELS, FRAMES)
    assert batch["id"] == ["000008/0", "000009/1"]
    assert [item.loser.id for item in items] == ["000008/1", "000009/0"]
    assert torch.equal(batch["loser"][1], items[1].loser.latent)
    assert batch["caption"] == ["x", "xx"]


def test_both_are_cropped_at_the_same_place(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs", frames=2 * FRAMES)
    short, whole = (pair_data(folder, **{"seed": 3}), PreferenceDataModule(str(folder), 2 * SECONDS, 4))
    for key in (SampleKey(2, 0), SampleKey(2, 5)):
        item, full = short.datasets["train"][key], whole.datasets["train"][SampleKey(2, 0)]
        starts = []
        for crop, clip in ((item.winner, full.winner), (item.loser, full.loser)):
            gaps = [(crop.latent - clip.latent[:, s : s + FRAMES]).abs().mean() for s in range(FRAMES + 1)]
            starts.append(int(torch.stack(gaps).argmin()))  # up to draws of the posterior
        assert starts[0] == starts[1]


def test_a_content_hash_is_of_pairs_and_latents(tmp_path: Path) -> None:
    first = write_pairs(tmp_path / "first")
    again, other = write_pairs(tmp_path / "again"), write_pairs(tmp_path / "other", seed=1)
    hashes = [pair_data(folder).content_hash for folder in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    rewrite(first, pairs=stored(first)["pairs"][::-1])
    assert pair_data(first).content_hash != hashes[0]


def test_latents_without_pairs_are_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    (folder / PREFERENCES_FILE).unlink()
    with pytest.raises(PreferenceError, match=r"preferences.json does not exist: .* no pairs; foley prefer makes both"):
        pair_data(folder)


def test_pairs_of_other_latents_are_refused(tmp_path: Path) -> None:
    first, other = write_pairs(tmp_path / "first"), write_pairs(tmp_path / "other", seed=1)
    (first / PREFERENCES_FILE).write_bytes((other / PREFERENCES_FILE).read_bytes())
    with pytest.raises(PreferenceError, match=r"pairs of other latents \(\w{12}\) than lie beside it"):
        pair_data(first)


def test_a_folder_without_a_pair_to_train_on_is_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    rewrite(folder, pairs=stored(folder)["pairs"][-2:])
    with pytest.raises(PreferenceError, match=r"no pair of the split 'train' \(of 2 in all\).*lower least_gap"):
        pair_data(folder)


def test_a_validation_without_pairs_is_none(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    rewrite(folder, pairs=stored(folder)["pairs"][:-2])
    assert list(pair_data(folder).datasets) == ["train"]


def test_sounds_of_unequal_length_are_no_pair(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    with latent_cache_writer(folder, "c0dec", RATE_HZ, HOP) as writer:
        for n, frames in enumerate((FRAMES, FRAMES - 1)):
            mean = torch.zeros(CHANNELS, frames)
            writer.add(mean, mean, f"000000/{n}", "x", "", "train", frames * HOP / RATE_HZ)
    index = LatentCacheIndex.read(folder)
    Preferences(hash_of_latents(index), [Preference("000000/0", "000000/1")]).write(folder)
    with pytest.raises(PreferenceError, match=r"000000/0 and 000000/1 are no pair: \[12, 11\] frames"):
        pair_data(folder)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    rewrite(folder, pairs=[{"winner": "a"}])
    with pytest.raises(DamagedFileError, match=r"preferences.json is damaged .* ranks the sounds again"):
        pair_data(folder)
    rewrite(folder, format="foley-preferences-0")
    with pytest.raises(DamagedFileError, match="its format is not foley-preferences-1"):
        pair_data(folder)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    index = LatentCacheIndex.read(write_pairs(tmp_path / "pairs"))
    written = Preferences(hash_of_latents(index), [Preference("000000/0", "000000/1")], {"prompts": 1})
    written.write(tmp_path / "pairs")
    assert Preferences.read(index) == written
