"""Packed training data: within its limit, the least lossy files that fit, and trained on as the original is."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import run_command
from latent_parts import many_clips, write_cache

from foley.core.hashing import hash_file
from foley.core.reading import read_json
from foley.data.audio import AudioError, read_audio
from foley.data.latent_format import LatentLayout
from foley.data.latents import LatentCacheIndex
from foley.data.manifest import ManifestEntry, checked_rows, read_manifest
from foley.data.packing import MANIFEST_FILE, PackTooLargeError, choose, pack_clips, pack_latents
from foley.data.splits import clip_splits

RATE = 24000
FILES = {  # name: rate, channels, seconds
    "digits/low.flac": (8000, 1, 0.5),
    "digits/low.wav": (8000, 1, 0.5),
    "effects/high.wav": (48000, 1, 1.0),
    "effects/wide.flac": (44100, 2, 1.0),
    "effects/long.ogg": (24000, 1, 3.0),
}


def hum(rate: int, channels: int, seconds: float) -> np.ndarray:
    """A tone in noise `[T, channels]`, so that every format has something to gain."""
    noise = np.random.default_rng(channels).normal(size=(round(rate * seconds), channels))
    tone = np.sin(2 * np.pi * 300 * np.arange(len(noise)) / rate)
    return (0.3 * tone[:, None] + 0.02 * noise).astype(np.float32)


@pytest.fixture
def manifest(tmp_path: Path, write_jsonl) -> Path:
    rows = []
    for number, (name, described) in enumerate(FILES.items()):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, hum(*described), described[0])
        row = {"path": name, "caption": [f"sound {number}", f"noise {number}"], "split": ("train", "val")[number % 2]}
        rows.append({**row, "label": "x", "source": "made", "license": "CC0", "duration_seconds": described[2]})
    return write_jsonl(*rows)


def packed(manifest: Path, max_bytes: int, folder: str = "packed") -> Path:
    pack_clips(read_manifest(manifest), manifest.parent / folder, max_bytes, RATE)
    return manifest.parent / folder


def suffixes(folder: Path) -> dict[str, str]:
    return {row["id"]: Path(row["path"]).suffix for _, row in checked_rows(folder / MANIFEST_FILE)}


def test_what_is_packed_trains_as_the_original(manifest: Path) -> None:
    folder = packed(manifest, 10**7)
    for split, original in clip_splits(str(manifest), RATE).items():
        source = clip_splits(str(folder / MANIFEST_FILE), RATE)[split]
        assert [source.clip_name(i) for i in range(len(source))] == [original.clip_name(i) for i in range(len(source))]
        for index in range(len(original)):
            before, now = original.render(index, 0), source.render(index, 0)
            assert (now.id, now.caption, now.other_captions) == (before.id, before.caption, before.other_captions)
            torch.testing.assert_close(now.audio, before.audio, atol=2**-15, rtol=0)
    entries = read_manifest(folder / MANIFEST_FILE)
    assert {(entry.license, entry.source, entry.label) for entry in entries} == {("CC0", "made", "x")}


def test_files_that_are_small_stay_as_they_are(manifest: Path) -> None:
    folder = packed(manifest, 10**7)
    ours = ["digits/low.wav", "effects/high.wav", "effects/wide.flac"]
    assert suffixes(folder) == {name: ".flac" if name in ours else Path(name).suffix for name in FILES}
    for _, row in checked_rows(folder / MANIFEST_FILE):
        if row["id"] not in ours:
            assert (folder / row["path"]).read_bytes() == (manifest.parent / row["id"]).read_bytes()


def test_what_does_not_fit_becomes_opus_the_most_saving_first(manifest: Path) -> None:
    whole = packed(manifest, 10**7)
    total = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
    folder = packed(manifest, total - 1000, "smaller")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= total - 1000
    (lossy,) = [name for name, suffix in suffixes(folder).items() if suffix == ".opus"]
    assert lossy.startswith("effects/")
    row = next(row for _, row in checked_rows(folder / MANIFEST_FILE) if row["id"] == lossy)
    samples = read_audio(folder / row["path"], RATE)
    assert len(samples) == RATE * FILES[lossy][2]
    original = read_audio(manifest.parent / lossy, RATE)
    assert np.corrcoef(samples, original)[0, 1] > 0.99


def test_more_than_the_limit_is_refused_with_what_to_leave_out(manifest: Path) -> None:
    with pytest.raises(
        PackTooLargeError, match=r"MB even as Opus, and max_megabytes=0.005: .*without=.*effects 0\.\d MB"
    ):
        packed(manifest, 5000)
    assert not list((manifest.parent / "packed").iterdir())


def test_the_manifest_names_every_file_by_its_hash(manifest: Path) -> None:
    folder = packed(manifest, 10**7)
    rows = [row for _, row in checked_rows(folder / MANIFEST_FILE)]
    assert [row["sha256"] for row in rows] == [hash_file(folder / row["path"]) for row in rows]
    assert (
        packed(manifest, 10**7, "again").joinpath(MANIFEST_FILE).read_bytes() == (folder / MANIFEST_FILE).read_bytes()
    )
    with pytest.raises(FileExistsError, match="holds packed clips already"):
        packed(manifest, 10**7)


def test_some_clips_of_each_split_are_chosen_in_order() -> None:
    entries = [ManifestEntry(Path(f"{n}"), "", f"{n % 3}/{n}", split="test" if n > 7 else "train") for n in range(10)]
    assert [entry.id for entry in choose(entries, ["1/"], 2)] == ["0/0", "0/6", "2/8", "0/9"]
    assert choose(entries) == entries


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    layout = LatentLayout("a codec", RATE, 480, 4, "mean_std", ("train", "val"))
    write_cache(tmp_path / "latents", torch.zeros(200, 2, 4), many_clips(100), layout)
    return tmp_path / "latents"


def test_latents_travel_whole_or_not_at_all(cache: Path, tmp_path: Path) -> None:
    index = LatentCacheIndex.read(cache)
    for limits, words in [((5000, 10**6), "store=mean"), ((10**6, 5000), "shard_megabytes")]:
        with pytest.raises(PackTooLargeError, match=words):
            pack_latents(str(cache), tmp_path / "packed", *limits)
    assert not (tmp_path / "packed").exists()
    run_command("script/pack_training_data", f"latents={cache}", f"output_dir={tmp_path}/packed")
    copied = LatentCacheIndex.read(tmp_path / "packed")
    copied.check_shards(np.arange(1, dtype=np.int32))
    assert copied.content_hash == index.content_hash
    assert read_json(tmp_path / "packed/index.json", "an index") == read_json(cache / "index.json", "an index")
    with pytest.raises(FileExistsError, match="holds packed latents already"):
        pack_latents(str(cache), tmp_path / "packed", 10**6, 10**6)


def test_the_command_packs_what_is_asked_for(manifest: Path, tmp_path: Path) -> None:
    options = [f"manifest={manifest}", f"output_dir={tmp_path}/packed", "without=[effects/]", "max_clips=1"]
    run_command("script/pack_training_data", *options)
    assert list(suffixes(tmp_path / "packed")) == ["digits/low.flac", "digits/low.wav"]


def test_numbers_that_pack_nothing_are_refused_by_name(manifest: Path, tmp_path: Path) -> None:
    for option in ("max_clips=0", "max_megabytes=nan", "max_file_megabytes=-1", "sample_rate_hz=99"):
        with pytest.raises(ValueError, match=f"{option}: give a"):
            run_command("script/pack_training_data", f"manifest={manifest}", f"output_dir={tmp_path}/packed", option)
    assert not (tmp_path / "packed").exists()


def test_channels_that_are_not_to_be_mixed_are_refused_with_their_file(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"wide\.flac: holds 2 channels, and downmix=refuse mixes none"):
        pack_clips(read_manifest(manifest), tmp_path / "packed", 10**7, RATE, "refuse")
