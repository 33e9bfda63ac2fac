"""Train, validation and test sources by name, as the configs compose them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from foley.data.importers import read_audiocaps, read_entries
from foley.data.manifest import ManifestEntry
from foley.data.mixture import MixtureSource
from foley.data.preflight import preflight
from foley.data.procedural import ProceduralDataset
from foley.data.shards import ShardSource
from foley.data.shards_index import ShardIndex
from foley.data.sources import CachedSource, ClipSource
from foley.data.types import AudioSource
from foley.logs import get_logger, process_rank
from foley.seeding import derive_seed

_log = get_logger(__name__)
SPLIT_NAMES = ("train", "val", "test")

Splits = Mapping[str, AudioSource]


def clip_splits(
    manifest: str,
    sample_rate_hz: int,
    audio_dir: str | None = None,
    max_duration_seconds: float | None = 30.0,
    cache_megabytes: int = 0,
    check_files: bool = True,
    optional: bool = False,
) -> Splits:
    """Sources of a JSONL, CSV or TSV manifest, by its `split` field; rows without one are for training.

    Args:
        check_files: list files that cannot be used before training starts.
        optional: an absent manifest gives no sources, and says so, instead of an error.
    """
    path = Path(manifest)
    if optional and not path.is_file():
        _log.warning("%s does not exist: going on without it", path)
        return {}
    return _sources(read_entries(path, audio_dir), sample_rate_hz, max_duration_seconds, cache_megabytes, check_files)


def shard_splits(
    url: str,
    sample_rate_hz: int,
    max_duration_seconds: float | None = None,
    cache_megabytes: int = 0,
    check_files: bool = True,
    check_hashes: bool = False,
) -> Splits:
    """Sources of the shards that `scripts/make_shards.py` wrote to the folder `url`, a path or any fsspec URL.

    Args:
        check_files: compare the size of every shard with the index before training starts.
        check_hashes: read every shard, too, and compare its SHA-256.
    """
    index = ShardIndex.read(url)
    if check_files or check_hashes:
        index.check(check_hashes)
    return {
        split: _cached(ShardSource(index, split, sample_rate_hz, max_duration_seconds), cache_megabytes)
        for split in index.splits
    }


def audiocaps_splits(
    captions_dir: str,
    audio_dir: str,
    sample_rate_hz: int,
    file_pattern: str = "{youtube_id}_{start_time}.wav",
    max_duration_seconds: float | None = 10.0,
    cache_megabytes: int = 0,
    check_files: bool = True,
) -> Splits:
    """Sources of AudioCaps' train.csv, val.csv and test.csv in `captions_dir`, with audio in `audio_dir`."""
    entries = [
        entry
        for split in SPLIT_NAMES
        for entry in read_audiocaps(Path(captions_dir) / f"{split}.csv", audio_dir, file_pattern, split)
    ]
    return _sources(entries, sample_rate_hz, max_duration_seconds, cache_megabytes, check_files)


def procedural_splits(
    sizes: Mapping[str, int],
    seed: int,
    duration_seconds: float,
    sample_rate_hz: int,
    classes: Sequence[str] | None = None,
    combination_probability: float = 0.0,
    fresh_each_epoch: bool = False,
    cache_megabytes: int = 0,
) -> Splits:
    """Synthesised clips, `sizes` of them by split; the splits share classes and no clip.

    Args:
        fresh_each_epoch: new training clips in every epoch, which no cache can keep.
    """

    def source(split: str, size: int) -> AudioSource:
        own_seed = derive_seed("procedural", seed, split)
        fresh = fresh_each_epoch and split == "train"
        clips = ProceduralDataset(
            size, own_seed, duration_seconds, sample_rate_hz, classes, combination_probability, fresh
        )
        return clips if fresh else _cached(clips, cache_megabytes)

    return {split: source(split, size) for split, size in sizes.items()}


def joined_splits(
    parts: Mapping[str, Splits],
    train_weights: Mapping[str, float] | None = None,
    train_size: int | None = None,
    seed: int = 0,
) -> Splits:
    """Several sets of splits as one; a part without sources (an absent optional manifest) is left out.

    Args:
        train_weights: shares of the parts in training, by name (see `MixtureSource`); None takes them whole.
        train_size: training samples in an epoch with weights.

    Raises:
        ValueError: a part has no weight.
    """
    if train_weights is not None and set(train_weights) != set(parts):
        raise ValueError(f"train_weights are for {sorted(train_weights)}, but the parts are {sorted(parts)}")
    joined: dict[str, AudioSource] = {}
    for split in SPLIT_NAMES:
        sources = {name: part[split] for name, part in parts.items() if split in part}
        weights = [train_weights[name] for name in sources] if train_weights and split == "train" else None
        if sources:
            joined[split] = MixtureSource(list(sources.values()), weights, train_size if weights else None, seed)
    return joined


def _cached(source: AudioSource, megabytes: int) -> AudioSource:
    return CachedSource(source, megabytes) if megabytes else source


def _sources(
    entries: Sequence[ManifestEntry],
    sample_rate_hz: int,
    max_duration_seconds: float | None,
    cache_megabytes: int,
    check_files: bool,
) -> Splits:
    if check_files and process_rank() == 0:  # the others would wait for the same disk
        preflight(entries)
    by_split: dict[str, list[ManifestEntry]] = {}
    for entry in entries:
        by_split.setdefault(entry.split or "train", []).append(entry)
    return {
        split: _cached(ClipSource(clips, sample_rate_hz, max_duration_seconds), cache_megabytes)
        for split, clips in by_split.items()
    }
