"""Training data packed for a journey to a machine that has none: one folder of bounded size, which trains the same.

Of each clip the file that loses least is taken as long as all of them fit: the file as it is, or FLAC (16 bits) at the
rate of training where that is smaller. Where they do not fit, clips become Opus, those that save most bytes first.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from foley.core.files import json_lines
from foley.core.hashing import hash_file
from foley.core.rates import resample
from foley.data.audio import encode_audio, read_channels
from foley.data.entries import ManifestEntry
from foley.data.latent_format import CLIPS_FILE, INDEX_FILE
from foley.data.latents import LatentCacheIndex

MANIFEST_FILE = "manifest.jsonl"
"""Names every file with its SHA-256, so that its own hash is one of all that is packed."""


class PackTooLargeError(ValueError):
    """What is to be packed exceeds the limit; the message says what to leave out."""


@dataclass(frozen=True)
class _Candidate:
    """A clip, the smallest file that loses nothing of it, and the Opus file that may take its place."""

    entry: ManifestEntry
    lossless: Path
    opus: Path

    @property
    def saves(self) -> int:
        """Bytes, as Opus."""
        return self.lossless.stat().st_size - self.opus.stat().st_size


def choose(
    entries: Sequence[ManifestEntry], without: Sequence[str] = (), max_clips: int | None = None
) -> list[ManifestEntry]:
    """Entries whose ids begin with nothing of `without`; of each split at most `max_clips`, spread over all of it.

    >>> [entry.id for entry in choose([ManifestEntry(Path(n), "", n) for n in ("a/1", "a/2", "a/3", "b/1")], ["b/"], 2)]
    ['a/1', 'a/3']
    """
    splits: dict[str, list[int]] = defaultdict(list)
    for row, entry in enumerate(entries):
        if not entry.id.startswith(tuple(without)):
            splits[entry.split].append(row)
    kept = []
    for rows in splits.values():
        count = len(rows) if max_clips is None else min(max_clips, len(rows))
        kept += [rows[place] for place in np.linspace(0, len(rows) - 1, count).round().astype(int)]
    return [entries[row] for row in sorted(kept)]


def pack_clips(
    entries: Sequence[ManifestEntry], folder: Path, max_bytes: int, sample_rate_hz: int, downmix: str | None = "mean"
) -> dict[str, Any]:
    """Write files and manifest of the entries, in their order, to a new `folder`; returns what it holds.

    Args:
        sample_rate_hz: of training; what has a higher one is resampled, unless the file stays as it is.
        downmix: of clips with several channels, as `read_channels` takes it; None keeps the channels.

    Raises AudioError for a clip that cannot be used, FileExistsError where the folder holds a manifest, and
    PackTooLargeError where Opus alone exceeds `max_bytes`.
    """
    if (folder / MANIFEST_FILE).exists():
        raise FileExistsError(f"{folder} holds packed clips already: remove it, or give another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:
        candidates = [
            _candidate(entry, Path(temporary) / f"{number:05d}", sample_rate_hz, downmix)
            for number, entry in enumerate(entries)
        ]
        lossy = _lossy(candidates, max_bytes)
        files = [one.opus if number in lossy else one.lossless for number, one in enumerate(candidates)]
        with json_lines(folder / MANIFEST_FILE) as write:
            for number, (entry, file) in enumerate(zip(entries, files, strict=True)):
                packed = folder / "clips" / f"{number:05d}{file.suffix}"
                packed.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, packed)
                write(_row(entry, packed))
        return _summary(folder, files, lossy)


def remove_packed(folder: Path) -> None:
    """Remove what `pack_clips` or `pack_latents` wrote to `folder`, and nothing else."""
    shutil.rmtree(folder / "clips", ignore_errors=True)
    for file in (folder / MANIFEST_FILE, folder / INDEX_FILE, *folder.glob("*.safetensors")):
        file.unlink(missing_ok=True)


def _candidate(entry: ManifestEntry, stem: Path, sample_rate_hz: int, downmix: str | None) -> _Candidate:
    samples, rate = read_channels(entry.path, expected_seconds=entry.duration_seconds, downmix=downmix)
    target = min(rate, sample_rate_hz)
    audio = torch.from_numpy(resample(samples.T, rate, target))
    encoded = {}
    for name in ("flac", "opus"):
        encoded[name] = stem.with_suffix(f".{name}")
        encoded[name].write_bytes(encode_audio(audio, target, name, peak_ceiling=1.0))
    smallest = min(entry.path, encoded["flac"], key=lambda file: file.stat().st_size)
    return _Candidate(entry, smallest, encoded["opus"])


def _lossy(candidates: Sequence[_Candidate], max_bytes: int) -> set[int]:
    """Numbers of the clips that become Opus, as few of them as it takes; raises PackTooLargeError."""
    of_manifest = sum(len(json.dumps(_row(one.entry, one.opus), ensure_ascii=False).encode()) for one in candidates)
    excess = sum(one.lossless.stat().st_size for one in candidates) + of_manifest + len(candidates) - max_bytes
    saving = {number: one.saves for number, one in enumerate(candidates)}
    chosen: set[int] = set()
    for number in sorted(saving, key=lambda number: -saving[number]):
        if excess <= 0:
            return chosen
        if saving[number] > 0:
            excess -= saving[number]
            chosen.add(number)
    if excess > 0:
        raise _too_large(candidates, max_bytes + excess, max_bytes)
    return chosen


def _too_large(candidates: Sequence[_Candidate], num_bytes: int, max_bytes: int) -> PackTooLargeError:
    sizes: Counter[str] = Counter()
    for one in candidates:
        sizes[one.entry.id.rpartition("/")[0] or one.entry.source or "all"] += one.opus.stat().st_size
    sources = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.most_common(8))
    return PackTooLargeError(
        f"{num_bytes / 1e6:.1f} MB even as Opus, and max_megabytes={max_bytes / 1e6:g}: leave clips out by the "
        f"beginnings of their ids (without=[NAME/]) or by number (max_clips=N of each split); there are {sources}"
    )


def _row(entry: ManifestEntry, packed: Path) -> dict[str, Any]:
    """Of the manifest: all that the entry says, under the name of its packed file."""
    row = {
        "path": f"{packed.parent.name}/{packed.name}",
        "id": entry.id,
        "caption": entry.caption,
        "captions": [entry.caption, *entry.other_captions] if entry.other_captions else None,
        "duration_seconds": entry.duration_seconds,
        **{name: getattr(entry, name) for name in ("split", "label", "speaker", "source", "license")},
        "sha256": hash_file(packed),
    }
    return {name: value for name, value in row.items() if value not in (None, "")}


def _summary(folder: Path, files: Sequence[Path], lossy: set[int]) -> dict[str, Any]:
    kinds = Counter(
        "opus" if number in lossy else "as it is" if file.parent.parent != folder else "flac"
        for number, file in enumerate(files)
    )
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.parent.name == "clips")
    return {
        "clips": dict(kinds),
        "bytes": num_bytes + (folder / MANIFEST_FILE).stat().st_size,
        "sha256": hash_file(folder / MANIFEST_FILE),
    }


def pack_latents(cache: str, folder: Path, max_bytes: int, max_file_bytes: int) -> dict[str, Any]:
    """Copy a latent cache, whose shards are float16 already, to a new `folder`; returns what it holds.

    Raises FileExistsError where the folder holds one, LatentCacheError for one that is not whole, and PackTooLargeError
    where it exceeds `max_bytes`, or a file of it `max_file_bytes`.
    """
    if (folder / INDEX_FILE).exists():
        raise FileExistsError(f"{folder} holds packed latents already: remove it, or give another output_dir")
    index = LatentCacheIndex.read(cache)
    index.check_shards(np.arange(len(index.shards), dtype=np.int32))
    # The index last: without it there is no cache.
    names = [*(shard.name for shard in index.shards), CLIPS_FILE, INDEX_FILE]
    sizes = {name: (Path(index.url) / name).stat().st_size for name in names}
    largest = max(sizes, key=lambda name: sizes[name])
    if (total := sum(sizes.values())) > max_bytes:
        raise PackTooLargeError(
            f"{cache} holds {total / 1e6:.1f} MB, and max_megabytes={max_bytes / 1e6:g}: encode fewer clips, or with "
            "store=mean, which takes half the bytes of store=mean_std"
        )
    if sizes[largest] > max_file_bytes:
        raise PackTooLargeError(
            f"{cache}/{largest} holds {sizes[largest] / 1e6:.1f} MB, and max_file_megabytes={max_file_bytes / 1e6:g}: "
            f"encode with shard_megabytes={max_file_bytes >> 20} or less"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(Path(index.url) / name, folder / name)
    return {"clips": len(index.clips), "bytes": total, "sha256": index.content_hash}
