"""Latent caches made for tests without a codec: in today's format from columns, and as earlier versions wrote them."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from foley.core.columns import TextLists, Texts
from foley.core.hashing import hash_tensors
from foley.data.entries import SPLIT_NAMES
from foley.data.latent_folder import LatentFolder, LatentWriter, clip_key
from foley.data.latent_format import (
    FORMAT,
    LatentClips,
    LatentEntry,
    LatentLayout,
    LatentShard,
    write_index,
    write_shard,
)


def write_cache(folder: Path, latent: Tensor, clips: LatentClips, layout: LatentLayout) -> LatentShard:
    """A cache of one shard, `latent [frames, K, C]`."""
    folder.mkdir(exist_ok=True)
    shard = write_shard(folder / "latents-00000-00000.safetensors", latent.half(), clips, layout)
    write_index(folder, layout, clips, [shard], (torch.zeros(layout.channels), torch.ones(layout.channels)))
    return shard


def many_clips(count: int, frames: int = 2) -> LatentClips:
    """A table of clips of one shard, a tenth of them for validation (code 1), whose ids say their number."""
    numbers = np.arange(count)
    return LatentClips(
        id=Texts.of(f"clip-{number:07d}" for number in range(count)),
        caption=Texts.of(f"a dog barks {number} times" for number in range(count)),
        label=Texts(np.empty(0, np.uint8), np.zeros(count, np.int64)),
        other_captions=TextLists(Texts.of([]), np.zeros(count, np.int64)),
        split=(numbers % 10 == 9).astype(np.uint8),
        shard=np.zeros(count, np.int32),
        first_frame=numbers * frames,
        num_frames=np.full(count, frames, np.int32),
        duration_seconds=np.full(count, 0.1 * frames),
    )


def write_old_cache(
    folder: Path,
    entries: list[LatentEntry],
    shards: Mapping[str, Mapping[str, Tensor]],
    format: str = "foley-latents-2",
) -> None:
    """As versions 0.1 and 0.2 wrote it: tensors `mean` and `std [frames, C]` by the name of their shard."""
    folder.mkdir()
    for name, tensors in shards.items():
        save_file(dict(tensors), folder / name)
    channels = next(iter(shards.values()))["mean"].shape[1]
    stored = {
        "format": format,
        **{"codec_hash": "c0dec", "sample_rate_hz": 1000, "hop_samples": 10},
        **{"latent_mean": [0.1] * channels, "latent_std": [0.7] * channels},
        "shards": {name: hash_tensors(tensors) for name, tensors in shards.items()},
        "entries": [dataclasses.asdict(entry) for entry in entries],
    }
    if format == "foley-latents-1":
        del stored["shards"]
    (folder / "index.json").write_text(json.dumps(stored))


class LatentCacheWriter:
    """Adds clips to a cache of latents that are at hand; use through `latent_cache_writer`."""

    def __init__(self, writer: LatentWriter) -> None:
        self._writer = writer
        self.keys: list[int] = []

    def add(
        self,
        mean: Tensor,
        std: Tensor,
        id: str,
        caption: str,
        label: str,
        split: str,
        duration_seconds: float,
        other_captions: Sequence[str] = (),
    ) -> None:
        """Append one clip's posterior, each `[C, L]`."""
        latent = torch.stack([mean, std]).permute(2, 0, 1).to("cpu", torch.float16)
        entry = LatentEntry(id, caption, label, split, "", 0, 0, duration_seconds, tuple(other_captions))
        self._writer.add(id, [(entry, latent)])
        self.keys.append(clip_key(split, id))


@contextmanager
def latent_cache_writer(
    directory: Path, codec_hash: str, sample_rate_hz: int, hop_samples: int
) -> Iterator[LatentCacheWriter]:
    """A writer of the new cache `directory`, of latents that are at hand; complete after a clean exit.

    Raises LatentCacheError where `directory` holds anything else, and FolderInUseError.
    """
    folder = LatentFolder(str(directory))
    folder.claim({"format": FORMAT, "codec_hash": codec_hash})

    def layout(channels: int) -> LatentLayout:
        return LatentLayout(codec_hash, sample_rate_hz, hop_samples, channels, "mean_std", tuple(sorted(SPLIT_NAMES)))

    with folder.writer(0, layout) as writer:
        yield (added := LatentCacheWriter(writer))
    folder.merge(np.array(added.keys, np.int64))
