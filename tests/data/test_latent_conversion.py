"""Caches of earlier formats: converted, they hold the same; what is wrong with them is named."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_parts import write_old_cache
from torch import Tensor

from foley.core.locks import FolderInUseError, only_writer
from foley.data.datamodule import LatentDataModule
from foley.data.latent_conversion import convert_latents
from foley.data.latent_format import LatentCacheError, LatentEntry
from foley.data.latents import LatentCacheIndex, LatentDataset

ENTRIES = [
    LatentEntry("a", "eine Tür", "door", "train", "latents-00000.safetensors", 0, 4, 0.04, ("a door", "it creaks")),
    LatentEntry("b", "rain", "", "train", "latents-00001.safetensors", 0, 6, 0.05),
    LatentEntry("c", "wind", "", "val", "latents-00000.safetensors", 4, 3, 0.03),
]


def tensors(frames: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    values = torch.randn(2, frames, 3, generator=torch.Generator().manual_seed(frames)).to(dtype)
    return {"mean": values[0].clone(), "std": values[1].abs()}


def old_cache(folder: Path, entries: list[LatentEntry] = ENTRIES, **options: Any) -> dict[str, dict[str, Tensor]]:
    shards = {"latents-00000.safetensors": tensors(7), "latents-00001.safetensors": tensors(6)}
    write_old_cache(folder, entries, {**shards, **options.pop("shards", {})}, **options)
    return shards


@pytest.mark.parametrize("format", ["foley-latents-1", "foley-latents-2"])
def test_a_converted_cache_holds_the_same(tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture) -> None:
    shards = old_cache(tmp_path / "old", format=format)
    with caplog.at_level(logging.WARNING):
        convert_latents(tmp_path / "old", tmp_path / "new")
    assert ("no hash binds its shards" in caplog.text) == (format == "foley-latents-1")
    index = LatentCacheIndex.read(tmp_path / "new")
    assert (index.codec_hash, index.sample_rate_hz, index.hop_samples) == ("c0dec", 1000, 10)
    assert index.statistics[0].tolist() == pytest.approx([0.1] * 3)
    assert index.latent_std == [0.7] * 3
    kept = [(e.id, e.caption, e.label, e.split, e.num_frames, e.duration_seconds, e.other_captions) for e in ENTRIES]
    assert kept == [
        (e.id, e.caption, e.label, e.split, e.num_frames, e.duration_seconds, e.other_captions) for e in index.entries
    ]
    for split in index.splits:
        dataset = LatentDataset(index, split, 10, random=False)
        for place, old in enumerate(entry for entry in ENTRIES if entry.split == split):
            rows = slice(old.first_frame, old.first_frame + old.num_frames)
            assert torch.equal(dataset[place].latent.T, shards[old.shard]["mean"][rows].float())


def test_a_run_on_the_old_cache_goes_on_with_the_new_one(tmp_path: Path) -> None:
    """The hash that training notes of its data is the one of earlier versions."""
    old_cache(tmp_path / "old")
    convert_latents(tmp_path / "old", tmp_path / "new")
    noted = json.dumps(["c0dec", [(entry.id, entry.split, entry.num_frames) for entry in ENTRIES]])
    data = LatentDataModule(str(tmp_path / "new"), 0.04, 2)
    assert data.content_hash == hashlib.sha256(noted.encode()).hexdigest()


def test_a_conversion_that_did_not_end_is_begun_again(tmp_path: Path) -> None:
    old_cache(tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/latents-00000-00000.safetensors").write_bytes(b"half")
    convert_latents(tmp_path / "old", tmp_path / "new")
    assert len(LatentDataset(LatentCacheIndex.read(tmp_path / "new"), "train", 10)) == 2
    with pytest.raises(LatentCacheError, match=r"holds clips\.safetensors already; choose another output_dir"):
        convert_latents(tmp_path / "old", tmp_path / "new")
    other = tmp_path / "other"
    with only_writer(other, "something"), pytest.raises(FolderInUseError):
        convert_latents(tmp_path / "old", other)


FAULTS = {
    "before the shard": ({"first_frame": -5}, "entry 'a': first_frame is -5"),
    "no frames": ({"num_frames": 0}, "entry 'a': num_frames is 0"),
    "half a frame": ({"num_frames": 1.5}, "entry 'a': num_frames is 1.5"),
    "beyond the shard": ({"first_frame": 10**9}, "has 7 frames, and index.json names more"),
    "no text": ({"caption": None}, "entry 'a': its texts must be texts"),
    "a text for captions": ({"other_captions": "rain"}, "entry 'a': its texts must be texts"),
    "another folder": ({"shard": "../x"}, "no file of this folder"),
    "an absent shard": ({"shard": "x"}, "x does not exist"),
    "an unknown field": ({"colour": 1}, "colour"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_an_impossible_entry_is_named(tmp_path: Path, case: str) -> None:
    old_cache(tmp_path / "old")
    stored = json.loads((tmp_path / "old/index.json").read_text())
    changes, message = FAULTS[case]
    stored["entries"][0].update(changes)
    (tmp_path / "old/index.json").write_text(json.dumps(stored))
    with pytest.raises(LatentCacheError, match=message):
        convert_latents(tmp_path / "old", tmp_path / "new")


SHARDS = {
    "int8": ({name: tensor.to(torch.int8) for name, tensor in tensors(7).items()}, "`mean` is torch.int8"),
    "narrow": ({name: tensor[:, 1:].contiguous() for name, tensor in tensors(7).items()}, r"not \[frames, 3\]"),
    "without std": ({"mean": tensors(7)["mean"]}, "it lacks the entry 'std'"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_latents_of_another_kind_are_refused(tmp_path: Path, case: str) -> None:
    shard, message = SHARDS[case]
    old_cache(tmp_path / "old", shards={"latents-00000.safetensors": shard}, format="foley-latents-1")
    stored = json.loads((tmp_path / "old/index.json").read_text())
    (tmp_path / "old/index.json").write_text(json.dumps({**stored, "latent_mean": [0.1] * 3, "latent_std": [0.7] * 3}))
    with pytest.raises(LatentCacheError, match=message):
        convert_latents(tmp_path / "old", tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": None}, "`shards` must give the hash of each shard"),
        ({"shards": {}}, "is not the shard that index.json describes"),
        ({"format": "foley-latents-3"}, "its format is 'foley-latents-3'"),
        ({"entries": []}, "no clips"),
        ({"sample_rate_hz": 0}, "sample_rate_hz"),
        ({"codec_hash": None}, "`codec_hash`"),
        ({"latent_mean": None}, "index.json is damaged"),
        ({"latent_std": [0.7]}, "index.json is damaged"),
    ],
)
def test_what_is_no_old_cache_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    old_cache(tmp_path / "old")
    stored = json.loads((tmp_path / "old/index.json").read_text())
    (tmp_path / "old/index.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(LatentCacheError, match=message):
        convert_latents(tmp_path / "old", tmp_path / "new")
    with pytest.raises(LatentCacheError, match="is no latent cache"):
        convert_latents(tmp_path / "absent", tmp_path / "new")
