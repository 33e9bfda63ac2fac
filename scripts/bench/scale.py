"""Time and memory of each part of the data path against its number of rows, and how they grow; writes the page.

Every row at every size runs in a process of its own, with a time limit; what it needs on the disk is made before, in
another. To add a row: a function that prepares files, one that does the work and gives what a run would keep, and an
entry of ROWS.
"""

import dataclasses
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from safetensors.numpy import save

from foley.accel.caching.calibration import Calibration
from foley.accel.caching.schedule import RunSignature
from foley.accel.cost import EvaluationMacs
from foley.cli.command import command
from foley.core.columns import Columns, TextLists, Texts, write_columns
from foley.core.config import compose_aside
from foley.core.embeddings import EmbeddingStore, text_keys, write_shard
from foley.core.files import info_path, json_lines, write_json
from foley.core.hashing import hash_file
from foley.core.logs import get_logger
from foley.core.rates import clip_size
from foley.core.reading import read_json
from foley.core.seeding import torch_generator
from foley.data import latent_format
from foley.data.dataset import AudioDataset
from foley.data.encoding import clip_keys
from foley.data.entries import Entries, columns_of
from foley.data.latent_folder import LatentFolder, latent_sums
from foley.data.latent_format import CLIPS_FILE, LatentClips, LatentLayout, content_hash, write_index
from foley.data.latents import LatentCacheIndex, LatentDataset
from foley.data.manifest import OUR_COLUMNS, build_entries, read_manifest
from foley.data.ordering import LengthBuckets, ResumableSampler
from foley.data.preflight import preflight
from foley.data.shards import COLUMNS, INDEX_FILE, SAMPLES_FILE, Shard, ShardIndex, ShardSource
from foley.data.splits import ClipSource, MixtureSource, clip_splits, hold_out
from foley.generation.clip_folder import FOLDER_CLIPS, ClipFolder, launch_processes
from foley.generation.prompts import Clip
from foley.metrics.distances import MOST_TOGETHER
from foley.metrics.features import ClipFeatures
from foley.metrics.scores import Comparison, Scores, frechet, inception, kad, kl
from foley.reporting.pages import write_results
from foley.reporting.scale import TrainingPlan, grows_too_fast, growth_exponent
from foley.reporting.tables import provenance

_log = get_logger(__name__)

MANIFEST, CAPTIONED, CLIP = "clips.jsonl", "captioned.jsonl", "clip.wav"
CAPTIONS = "captions.safetensors"
RATE_HZ = 8000
CLIPS_PER_SHARD = 5000
TEXTS_PER_SHARD = 50_000
LAYOUT = LatentLayout("codec", RATE_HZ, 10, 1, "mean", ("train", "val"))
T5 = "a T5"
_KIB = 1024


def manifest(size: int, folder: Path) -> None:
    """A manifest as that of AudioSet may be, remembered in columns, too."""
    _write(folder / MANIFEST, (_row(number, number) for number in range(size)))
    read_manifest(folder / MANIFEST)


def captioned_manifest(size: int, folder: Path) -> None:
    """Five rows to a clip, as AudioCaps has them in validation."""
    _write(folder / CAPTIONED, (_row(number // 5, number) for number in range(size)))


def _row(clip: int, caption: int) -> dict[str, Any]:
    split = "val" if clip % 50 == 0 else "train"
    fixed = {"duration_seconds": 10.0, "split": split, "label": "dog", "source": "AudioSet", "license": "CC BY 4.0"}
    words = f"A dog barks while rain falls on a tin roof, {caption}"
    return {"path": f"{clip % 1000:03d}/{clip:07d}.wav", "caption": words, "id": f"clip {clip:07d}", **fixed}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with json_lines(path) as write:
        for row in rows:
            write(row)
    os.utime(path, (time.time() - 60,) * 2)  # what changed just now is not remembered


def files(size: int, folder: Path) -> None:
    """One file, which stands for all: in the system's cache, as files are that were looked at before."""
    soundfile.write(folder / CLIP, np.zeros(RATE_HZ, np.float32), RATE_HZ)


def looked_at(size: int, folder: Path) -> None:
    files(size, folder)
    preflight(_one_file_many_times(size, folder))


def _one_file_many_times(size: int, folder: Path) -> Entries:
    rows = ((CLIP, "", str(number), None, "train", "", "", "", "", number, ()) for number in range(size))
    return Entries(columns_of(rows), folder)


def shards(size: int, folder: Path) -> None:
    """The index of shards, without the shards."""
    count = -(-size // CLIPS_PER_SHARD)
    clips = np.arange(size)
    values = {"shard": clips // CLIPS_PER_SHARD, "seconds": np.full(size, 10.0)}
    samples = {name: np.asarray(values.get(name, clips), dtype) for name, dtype in COLUMNS.items()}
    (folder / SAMPLES_FILE).write_bytes(save(samples))
    table = [Shard(f"train-{n:06d}.tar", "train", CLIPS_PER_SHARD, 1, 1.0, "0" * 64) for n in range(count)]
    index = ShardIndex(str(folder), table, samples, 0)
    write_json(folder / INDEX_FILE, index.to_json(hash_file(folder / SAMPLES_FILE)))


def latent_shards(size: int, folder: Path) -> None:
    """What ranks have encoded, not merged: clips of one frame of one value."""
    table, latent = _latent_table(np.arange(size)), torch.ones(CLIPS_PER_SHARD, 1, 1, dtype=torch.float16)
    for number, first in enumerate(range(0, size, CLIPS_PER_SHARD)):
        rows = np.arange(first, min(first + CLIPS_PER_SHARD, size))
        clips = dataclasses.replace(table.take(rows), first_frame=rows - first)
        more = {"clip": torch.from_numpy(rows), "sums": latent_sums(latent[: int((clips.split == 0).sum())])}
        path = folder / "latents" / f"latents-00000-{number:05d}.safetensors"
        latent_format.write_shard(path, latent[: len(rows)], clips, LAYOUT, more)


def latent_cache(size: int, folder: Path) -> None:
    """A cache whose clips were encoded in any order."""
    clips = _latent_table(np.random.default_rng(0).permutation(size))
    latent = torch.zeros(size, 1, 1, dtype=torch.float16)
    shard = latent_format.write_shard(folder / "latents-00000-00000.safetensors", latent, clips, LAYOUT)
    write_index(folder, LAYOUT, clips, [shard], (torch.zeros(1), torch.ones(1)))
    write_columns(folder / CAPTIONS, clips.columns())


def _latent_table(numbers: NDArray[np.int64]) -> LatentClips:
    count = len(numbers)
    return LatentClips(
        id=Texts.of(f"clip {number:07d}" for number in numbers.tolist()),
        caption=Texts.of(f"A dog barks while rain falls on a tin roof, {number}" for number in numbers.tolist()),
        label=Texts(np.empty(0, np.uint8), np.zeros(count, np.int64)),
        other_captions=TextLists(Texts.of([]), np.zeros(count, np.int64)),
        split=(numbers % 50 == 0).astype(np.uint8),
        shard=np.zeros(count, np.int32),
        first_frame=np.arange(count),
        num_frames=np.ones(count, np.int32),
        duration_seconds=np.full(count, 10.0),
    )


def text_shards(size: int, folder: Path) -> None:
    """Embeddings of one token of one value, and the captions that they are of."""
    texts = Texts.of(f"A dog barks while rain falls on a tin roof, {number}" for number in range(size))
    for first in range(0, size, TEXTS_PER_SHARD):
        keys = text_keys(texts.take(np.arange(first, min(first + TEXTS_PER_SHARD, size))))
        write_shard(str(folder), keys, [torch.zeros(1, 1)] * len(keys), T5)
    write_columns(folder / CAPTIONS, {"caption": texts})


def text_store(size: int, folder: Path) -> None:
    text_shards(size, folder)
    EmbeddingStore.scan(folder, T5).write_index()


def clips_made(size: int, folder: Path) -> None:
    """All clips of a test set, without their page: links to one WAV, one spectrogram and one JSON."""
    made = {".wav": folder / CLIP, ".png": folder / "clip.png", ".json": folder / "clip.json"}
    soundfile.write(made[".wav"], np.zeros(RATE_HZ // 10, np.float32), RATE_HZ)
    os.utime(made[".wav"], (0, 0))
    made[".png"].touch()  # younger than its clip, so that it is not drawn
    write_json(made[".json"], {"settings": {"solver": "ddim"}})
    test_set = _test_set(size, folder)
    for index in range(size):
        at = test_set.directory / (f"{index // FOLDER_CLIPS:04d}" if size > FOLDER_CLIPS else "")
        at.mkdir(parents=True, exist_ok=True)
        for suffix, file in made.items():
            (at / f"{test_set.stem(index)}{suffix}").hardlink_to(file)


def _test_set(size: int, folder: Path) -> ClipFolder:
    return ClipFolder(folder / "clips", [Clip("A dog barks", seed=number) for number in range(size)], {})


def calibrations(size: int, folder: Path) -> None:
    """What a batch of eight prompts leaves of a transformer of 28 blocks over 50 steps, as often as there are such."""
    mean, std = torch.rand(2, 84, 3, 50, dtype=torch.float64, generator=torch_generator("curves"))
    names = tuple(str(number) for number in range(84))
    signature = RunSignature("hash", "ddim", 50, 50, 3.0)
    macs, times = EvaluationMacs(84, dict.fromkeys(names, 1)), tuple(float(step) for step in range(50))
    Calibration(mean, std, names, names, signature, 8, times, macs).save(stem := folder / "batch")
    for part in _parts(size, folder):
        for file in (stem.with_suffix(".safetensors"), info_path(stem)):
            part.with_suffix(file.suffix).hardlink_to(file)


def _parts(size: int, folder: Path) -> list[Path]:
    return [folder / f"{first:07d}" for first in range(0, size, 8)]


def nothing(size: int, folder: Path) -> None:
    """What is measured needs no file."""


def parse(size: int, folder: Path, name: str = MANIFEST) -> Any:
    path = folder / name
    return build_entries(OUR_COLUMNS.rows(path), path, folder)


def split_by_hash(size: int, folder: Path) -> Any:
    entries = read_manifest(folder / MANIFEST)
    return hold_out(entries.with_splits(np.zeros(len(entries), np.uint8)), 0.05, folder, MANIFEST)


def first_and_middle(size: int, folder: Path) -> Any:
    """The first sample of an epoch, and of a resumption in its middle."""
    sampler = ResumableSampler(size)
    next(iter(sampler))
    sampler.load_state_dict({"epoch": 3, "consumed": size // 2, "size": size})
    return next(iter(sampler))


def bucket(size: int, folder: Path) -> Any:
    seconds = np.random.default_rng(0).uniform(1.0, 10.0, size)
    return LengthBuckets(lambda epoch: seconds, 100)(np.random.default_rng(1).permutation(size), 0, 128)


def mix(size: int, folder: Path) -> Any:
    parts = [ClipSource(entries, RATE_HZ) for entries in _halves(read_manifest(folder / MANIFEST))]
    mixture = MixtureSource(parts, [1.0, 3.0])
    return mixture, mixture.durations_seconds(1)


def _halves(entries: Entries) -> Iterator[Entries]:
    yield from (entries[: len(entries) // 2], entries[len(entries) // 2 :])


def dataset(size: int, folder: Path) -> Any:
    splits = clip_splits(str(folder / MANIFEST), RATE_HZ, check_files=False)
    clips = {name: AudioDataset(source, 10 * RATE_HZ) for name, source in splits.items()}
    return clips, [part.lengths(0) for part in clips.values()]


def keys_asked_for(size: int, folder: Path) -> Any:
    splits = clip_splits(str(folder / MANIFEST), RATE_HZ, check_files=False)
    return clip_keys({name: AudioDataset(source, RATE_HZ) for name, source in splits.items()})


def merge(size: int, folder: Path) -> Any:
    """Of what was encoded to the index of the cache, which may be there already."""
    encoded = LatentFolder(str(folder / "latents"))
    return encoded.merge(encoded.encoded())


def write_latent_index(size: int, folder: Path) -> Any:
    """The table sorted, written and hashed, from the clips in the order of their encoding."""
    clips = LatentClips.of_columns(Columns(folder / CAPTIONS))
    (folder / "again").mkdir(exist_ok=True)
    shards = LatentCacheIndex.read(folder).shards
    write_index(folder / "again", LAYOUT, clips, shards, (torch.zeros(1), torch.ones(1)))


def latent_dataset(size: int, folder: Path) -> Any:
    found = LatentDataset(LatentCacheIndex.read(folder), "train", 500, repeats={"clip 000": 3, "clip 01": 2})
    return found, found.lengths(0)


def hash_content(size: int, folder: Path) -> Any:
    return content_hash(LAYOUT, LatentClips.read(folder / CLIPS_FILE))


def finish_texts(size: int, folder: Path) -> Any:
    """Look through the shards, as a run that goes on does, and write the table."""
    store = EmbeddingStore.scan(folder, T5)
    store.write_index()
    return store


def require_captions(size: int, folder: Path) -> Any:
    store = EmbeddingStore.open(folder)
    store.require(Columns(folder / CAPTIONS).texts("caption"))
    return store


def write_pages(size: int, folder: Path) -> Any:
    def never(clips: Any) -> Any:
        raise RuntimeError(f"{len(clips)} clips are not there")

    clips, processes = _test_set(size, folder), launch_processes(None)
    clips.fill(never, processes, 8)
    return clips.write_pages(processes)


def merge_calibrations(size: int, folder: Path) -> Any:
    return Calibration.merged(Calibration.load(part) for part in _parts(size, folder))


def scores(*measures: Callable[[Comparison], Scores]) -> Callable[[int, Path], Any]:
    """With intervals, of two sets of paired clips whose features have 128 columns and their posteriors 527 classes."""

    def measured(size: int, folder: Path) -> Any:
        reference, generated = _random_clips(size, "reference"), _random_clips(size, "generated")
        no_extractor: Any = None  # the features are there
        sets = Comparison(generated, reference, list(range(size)), no_extractor, 10, resamples=200)
        return [measure(sets) for measure in measures]

    return measured


def _random_clips(size: int, name: str) -> ClipFeatures:
    generator, names = torch_generator("scale", name), [str(number) for number in range(size)]
    return ClipFeatures(
        ids=names,
        labels=[None] * size,
        captions=[None] * size,
        features=torch.randn(size, 128, generator=generator),
        windows=torch.ones(size, dtype=torch.long),
        logits=torch.randn(size, 527, generator=generator),
        peaks=torch.ones(size),
        recordings=names,
        seconds=torch.ones(size),
    )


@dataclass(frozen=True)
class Row:
    """What is measured: `work`, whose result is what a run would keep, after `prepare` has made its files.

    Sizes are divided by `fewer`, for what is done to a part of the clips; they lie between `smallest` and `largest`.
    """

    prepare: Callable[[int, Path], None]
    work: Callable[[int, Path], Any]
    fewer: int = 1
    smallest: int = 0
    largest: int | None = None


ROWS = {
    "manifest: parse": Row(manifest, parse),
    "manifest: open its columns": Row(manifest, lambda n, at: read_manifest(at / MANIFEST)),
    "preflight, hot files": Row(files, lambda n, at: preflight(_one_file_many_times(n, at)), largest=100_000),
    "preflight, remembered": Row(looked_at, lambda n, at: preflight(_one_file_many_times(n, at)), largest=100_000),
    "splits by a hash of the path": Row(manifest, split_by_hash),
    "data set of a manifest, with lengths": Row(manifest, dataset),
    "sampler: start, and resume in the middle of an epoch": Row(nothing, first_and_middle),
    "buckets of similar length": Row(nothing, bucket),
    "mixture of two sources": Row(manifest, mix),
    "shards: open the index": Row(shards, lambda n, at: ShardSource(ShardIndex.read(str(at)), "train", RATE_HZ)),
    "manifest: parse, five captions a clip": Row(captioned_manifest, lambda n, at: parse(n, at, CAPTIONED)),
    "encoding: keys of the clips asked for": Row(manifest, keys_asked_for),
    "encoding: look through finished shards": Row(latent_shards, lambda n, at: LatentFolder(f"{at}/latents").encoded()),
    "encoding: merge": Row(latent_shards, merge),
    "latents: write the index": Row(latent_cache, write_latent_index),
    "latents: open the index": Row(latent_cache, lambda n, at: LatentCacheIndex.read(at)),
    "latents: data set with repeats, and lengths": Row(latent_cache, latent_dataset),
    "latents: hash of the content": Row(latent_cache, hash_content),
    "texts: look through shards, write the table": Row(text_shards, finish_texts),
    "texts: open the store": Row(text_store, lambda n, at: EmbeddingStore.open(at)),
    "texts: open, and look up every caption": Row(text_store, require_captions),
    "test set: list all clips, write its pages": Row(clips_made, write_pages, fewer=100),
    "calibration: merge of batches of 8 prompts": Row(calibrations, merge_calibrations, fewer=40),
    "scores with intervals: Frechet, KL, inception": Row(nothing, scores(frechet, kl, inception), fewer=40),
    "scores with intervals: KAD": Row(nothing, scores(kad), fewer=20, smallest=MOST_TOGETHER),  # of whole parts
}


def measure(work: Callable[[int, Path], Any], size: int, folder: Path) -> dict[str, float]:
    """Seconds, and MiB beyond those of a process that has done nothing: private ones that are kept, and the peak."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts here
    private, resident = _kib("smaps_rollup", "Private_Dirty"), _kib("status", "VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    kept = work(size, folder)
    seconds, own = time.perf_counter() - start, time.process_time() - processor
    gc.collect()
    result = {
        "seconds": seconds,
        "processor_seconds": own,
        "private_mib": (_kib("smaps_rollup", "Private_Dirty") - private) / _KIB,
        "peak_mib": (_kib("status", "VmHWM") - resident) / _KIB,
    }
    del kept
    return result


def _kib(file: str, name: str) -> int:
    lines = Path("/proc/self", file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def apart(limit_seconds: float, task: Callable[..., Any], *arguments: Any) -> Any:
    """What `task` gives in a process of its own; None where it fails or takes longer."""
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=lambda: sender.send([task(*arguments)]))
    process.start()
    sender.close()
    try:
        return receiver.recv()[0] if receiver.poll(limit_seconds) else None
    except EOFError:  # it ended without a word; what it said is on the terminal
        return None
    finally:
        process.kill()
        process.join()


def measure_row(name: str, row: Row, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The costs of one row at every size, and the exponent of its growth."""
    costs: list[dict[str, Any]] = []
    for size in (whole // row.fewer for whole in cfg.sizes):
        if size < row.smallest or (row.largest is not None and size > row.largest):
            continue
        at = folder / f"{row.prepare.__name__}-{size}"
        if not at.exists():
            at.mkdir()
            apart(cfg.limit_seconds, row.prepare, size, at)
        rounds = [apart(cfg.limit_seconds, measure, row.work, size, at) for _ in range(cfg.rounds)]
        cost = None if None in rounds else min(rounds, key=lambda known: known["seconds"])
        _log.info("%s, %d: %s", name, size, cost)
        costs.append({"size": size, **(cost or {"failed": True})})
    return {"row": name, "costs": costs, **_growth(costs)}


def _growth(costs: list[dict[str, Any]]) -> dict[str, Any]:
    done = [cost for cost in costs if "seconds" in cost]
    if len(done) < 2:
        return {"exponent": None, "too_fast": len(done) < len(costs)}
    exponent = growth_exponent([cost["size"] for cost in done], [cost["processor_seconds"] + 1e-4 for cost in done])
    return {"exponent": exponent, "too_fast": len(done) < len(costs) or grows_too_fast(exponent, done[-1]["seconds"])}


def plan(cfg: DictConfig) -> TrainingPlan:
    """The training of the recipe, with the numbers of its config."""
    recipe = compose_aside("train", [f"experiment={cfg.experiment}", f"stage={cfg.stage}"])
    with torch.device("meta"):
        denoiser = instantiate(recipe.model)
        codec = instantiate(recipe.codec)
    _, frames = clip_size(recipe.data.duration_seconds, codec.sample_rate_hz, codec.hop_samples)
    return TrainingPlan(
        clips=cfg.clips,
        clip_frames=frames,
        channels=recipe.codec.latent_channels,
        text_tokens=cfg.text_tokens,
        text_width=recipe.text.dim,
        parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
        depth=recipe.size.depth,
        width=recipe.size.width,
        steps=recipe.trainer.max_steps,
        batch_size=recipe.data.batch_size,
        gpus=cfg.gpus,
        peak_flops_per_second=cfg.peak_tflops * 1e12,
    )


def on_paper(cfg: DictConfig) -> dict[str, Any]:
    """The plan in numbers: bytes, and at each share of the peak hours and rates."""
    known = plan(cfg)
    latents = [
        {
            "stored": stored,
            "gigabytes": known.clips * known.clip_bytes(values) / 1e9,
            "clip_bytes": known.clip_bytes(values),
        }
        for stored, values in (("mean and std", 2), ("one latent", 1))
    ]
    shares = [
        {
            "utilisation": share,
            "step_seconds": known.step_seconds(share),
            "hours": known.hours(share),
            "clips_per_second": known.clips_per_second(share),
            "read_megabytes_per_second": known.read_bytes_per_second(share, 2) / 1e6,
            "lean_megabytes_per_second": known.read_bytes_per_second(share, 1) / 1e6,
        }
        for share in cfg.utilisations
    ]
    return {
        **vars(known),
        "experiment": cfg.experiment,
        "stage": cfg.stage,
        "epochs": known.epochs,
        "latents": latents,
        "text_gigabytes": known.clips * known.caption_bytes / 1e9,
        "caption_bytes": known.caption_bytes,
        "checkpoint_gigabytes": known.checkpoint_bytes / 1e9,
        "shares": shares,
    }


@command("bench/scale")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(1)
    chosen = {name: row for name, row in ROWS.items() if cfg.only is None or any(part in name for part in cfg.only)}
    with TemporaryDirectory(dir=cfg.work_dir) as name:
        os.environ["FOLEY_CACHE"] = f"{name}/cache"
        # The origin before the page is written, which is a change of the commit.
        about = {"plan": on_paper(cfg.plan), "provenance": provenance()}
        for row_name, row in chosen.items():
            keep({**measure_row(row_name, row, cfg, Path(name)), "rounds": cfg.rounds}, about, Path(cfg.page))


def keep(row: dict[str, Any], about: dict[str, Any], page: Path) -> None:
    """Write the results and the page anew with this row; what others measured, or a run that broke off, stays."""
    file = page.with_suffix("") / "scale.json"
    known = {found["row"]: found for found in read_json(file, "the results")["rows"]} if file.is_file() else {}
    known[row["row"]] = {**row, "commit": about["provenance"]["commit"]}
    write_results(page, scale={"rows": [known[name] for name in ROWS if name in known], **about})


if __name__ == "__main__":
    main()
