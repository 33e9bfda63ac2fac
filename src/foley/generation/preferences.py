"""Preferences that nobody gave: a system's own sounds of each prompt, ranked by a reward, the best and worst a pair.

In two steps, each of which goes on where it was stopped. `generate_candidates` writes latents as a latent cache, which
other training takes too; `rank_candidates` decodes and scores each of them, and writes the pairs beside them
(`foley.data.preferences`). Another reward ranks the same sounds again, without a generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from foley.accel.combined import NoAcceleration
from foley.core.hashing import hash_json, hash_module
from foley.core.logs import get_logger
from foley.core.numbers import COUNT, NOT_NEGATIVE, SEED, SHARE, NumberRange
from foley.core.sharding import ALL, Shard
from foley.data.annotating import Journal, read_journals
from foley.data.latent_folder import LatentFolder, LeftOut, clip_key
from foley.data.latent_format import FORMAT, LatentEntry, LatentLayout
from foley.data.latents import LatentCacheIndex, LatentReader
from foley.data.ordering import evenly_spaced
from foley.data.preferences import Preference, PreferenceError, Preferences, hash_of_latents
from foley.diffusion.crpo import best_and_worst
from foley.generation.decoding import LatentDecoder
from foley.generation.prompts import Clip, LabelledPrompts
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.rewards import Reward

_SPLITS = ("train", "val")
_NOT_HELD = "has a latent that float16 cannot hold"
_FIELDS = ("id", "reward")
_log = get_logger(__name__)


@dataclass(frozen=True)
class Candidates:
    """What is to be generated: `num` sounds of each prompt.

    Args:
        num: N, at least 2.
        seed: of the first sound; the others count up from it. Rounds of one training take others.
        val_fraction: share of the prompts, spread evenly, whose pairs are for validation.

    Raises ValueError for numbers that cannot be.

    >>> prompts = LabelledPrompts(["rain", "a bell", "wind"], [None, "bell", None])
    >>> [(clip.prompt, clip.seed, clip.notes["id"]) for clip in Candidates(prompts, num=2, seed=7).clips][:3]
    [('rain', 7, '000000/0'), ('rain', 8, '000000/1'), ('a bell', 9, '000001/0')]
    """

    prompts: LabelledPrompts
    num: int = 5
    seed: int = 0
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        NumberRange(least=2, whole=True).check("num", self.num)
        SEED.check("seed", self.seed)
        SHARE.check("val_fraction", self.val_fraction)

    @property
    def clips(self) -> list[Clip]:
        """Prompt after prompt; their notes hold id, label and split."""
        captions, labels = self.prompts
        held_out = set(evenly_spaced(len(captions), round(self.val_fraction * len(captions))))
        return [
            Clip(caption, self.seed + row * self.num + n, _notes(row, n, label, row in held_out))
            for row, (caption, label) in enumerate(zip(captions, labels, strict=True))
            for n in range(self.num)
        ]

    def describe(self) -> dict[str, Any]:
        """Of a latent folder's request."""
        prompts = hash_json([self.prompts.captions, self.prompts.labels])
        return {"prompts": prompts, "num": self.num, "seed": self.seed, "val_fraction": self.val_fraction}


def _notes(row: int, n: int, label: str | None, held_out: bool) -> dict[str, str]:
    return {"id": f"{row:06d}/{n}", "label": label or "", "split": _SPLITS[held_out]}


class _Kept(NoAcceleration):
    """Looks on, and keeps the generated latents."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []

    def on_latent(self, latent: Tensor) -> None:
        self.latents.append(latent)


def generate_candidates(
    generator: TextToAudio,
    candidates: Candidates,
    settings: GenerationSettings,
    output_dir: str | Path,
    overwrite: bool = False,
    share: Shard = ALL,
    shard_minutes: float = 5.0,
) -> None:
    """Write a latent folder of the candidates, or go on with one; `merge_candidates` completes it.

    Args:
        settings: how to generate; a clip depends on prompt, seed and these alone.
        share: which of the clips this job makes.
        shard_minutes: what a fault loses at most.

    Raises LatentCacheError where the folder holds anything else, or the sounds of another request, and
    FolderInUseError; ValueError for a request that cannot be met.
    """
    folder = LatentFolder(str(output_dir))
    folder.claim(_request(generator, candidates, settings), overwrite)
    done = set(folder.encoded().tolist())
    todo = [clip for clip in share.of(candidates.clips) if _key(clip) not in done]
    seconds = settings.duration_seconds or generator.default_duration_seconds

    def layout(channels: int) -> LatentLayout:
        rate, hop = generator.sample_rate_hz, generator.codec.hop_samples
        return LatentLayout(hash_module(generator.codec), rate, hop, channels, "sample", _SPLITS)

    with folder.writer(share.number, layout, shard_minutes=shard_minutes) as writer:
        size = settings.batch_size
        batches = [todo[first : first + size] for first in range(0, len(todo), size)]
        for batch in track(batches, description="generating", disable=not batches):
            for clip, latent in zip(batch, _latents(generator, batch, settings), strict=True):
                name, split, label = clip.notes["id"], clip.notes["split"], clip.notes["label"]
                if bool(latent.isfinite().all()):
                    writer.add(name, [(LatentEntry(name, clip.prompt, label, split, "", 0, 0, seconds), latent)])
                else:
                    writer.leave_out(LeftOut(split, name, _NOT_HELD))


def _request(generator: TextToAudio, candidates: Candidates, settings: GenerationSettings) -> dict[str, Any]:
    """All that the latents depend on; the system by its weights, wherever it lies."""
    guidance = settings.choose_guidance(generator.student)
    solver = settings.choose_solver(generator.process, generator.student)
    return {
        "format": FORMAT,
        "codec_hash": hash_module(generator.codec),
        "model_hash": generator.model_hash,
        "duration_seconds": settings.duration_seconds or generator.default_duration_seconds,
        **settings.describe(guidance, solver.name, solver.num_steps),
        **candidates.describe(),
    }


def _key(clip: Clip) -> int:
    return clip_key(clip.notes["split"], clip.notes["id"])


def _latents(generator: TextToAudio, clips: Sequence[Clip], settings: GenerationSettings) -> Tensor:
    """As a cache keeps them, `[B, L, 1, C]` in float16, not normalised."""
    kept = _Kept()
    generator.denoise_clips(clips, replace(settings, accelerator=kept))
    latents = generator.normaliser.denormalise(torch.cat(kept.latents))
    return latents.permute(0, 2, 1)[:, :, None].to("cpu", torch.float16)


def merge_candidates(output_dir: str | Path, candidates: Candidates) -> None:
    """Complete the folder once all is generated."""
    folder, keys = LatentFolder(str(output_dir)), np.array([_key(clip) for clip in candidates.clips], np.int64)
    if not (folder.is_merged and np.isin(folder.encoded(), keys).all()):
        folder.merge(keys)


def rank_candidates(
    generator: TextToAudio, reward: Reward, output_dir: str | Path, batch_size: int = 8, least_gap: float = 0.0
) -> Preferences:
    """Score every clip of a complete folder that has no score yet, and write the pairs of best and worst.

    Args:
        generator: decodes the latents; any system with their codec.
        least_gap: prompts of which all sounds score within that of each other give no pair.

    Raises StaleCacheError for another codec, ValueError where a reward is not finite, PreferenceError without a pair.
    """
    NOT_NEGATIVE.check("least_gap", least_gap)
    COUNT.check("batch_size", batch_size)
    index = LatentCacheIndex.read(output_dir)
    index.require_codec(hash_module(generator.codec))
    rewards = _score(generator, reward, index, batch_size)
    prompts: dict[str, list[str]] = {}
    for name in index.clips.id:
        prompts.setdefault(name.rpartition("/")[0], []).append(name)
    pairs = [pair for names in prompts.values() if (pair := _pair(names, rewards, least_gap)) is not None]
    if not pairs:
        raise PreferenceError(
            f"{output_dir}: of {len(prompts)} prompts none has two sounds whose rewards differ by more than {least_gap}"
        )
    facts = {"reward": dict(reward.identity), "prompts": len(prompts), "sounds": len(rewards), "least_gap": least_gap}
    found = Preferences(hash_of_latents(index), pairs, {**facts, **_means(rewards, pairs)})
    found.write(Path(output_dir))
    _log.info(
        "%d pairs of %d prompts; mean rewards: of all sounds %.3f, of winners %.3f, of losers %.3f",
        *(len(pairs), len(prompts), *(found.facts[f"mean_{name}"] for name in ("all", "winners", "losers"))),
    )
    return found


def _score(generator: TextToAudio, reward: Reward, index: LatentCacheIndex, batch_size: int) -> dict[str, float]:
    """The reward of each clip by its id; those that a journal of these latents and this reward holds are kept."""
    folder, name = Path(index.url), f"rewards-{hash_json([hash_of_latents(index), dict(reward.identity)])[:12]}"
    known = {row["id"]: row["reward"] for row in read_journals(folder, name, _FIELDS)}
    todo = [row for row, id in enumerate(index.clips.id) if id not in known]
    decode, reader, journal = LatentDecoder(generator.codec), LatentReader(index), Journal(folder, name, 0)
    batches = [todo[first : first + batch_size] for first in range(0, len(todo), batch_size)]
    try:
        for batch in track(batches, description="ranking", disable=not batches):
            found = _rewards(decode, reward, reader, batch, generator.device)
            journal.append([{"id": id, "reward": value} for id, value in found.items()])
            known |= found
    finally:
        journal.close()
    return known


def _rewards(
    decode: LatentDecoder, reward: Reward, reader: LatentReader, rows: Sequence[int], device: torch.device
) -> dict[str, float]:
    clips, rate = reader.index.clips, reader.index.sample_rate_hz
    latents = [reader.read(row, 0, int(clips.num_frames[row]))[:, 0].float().T for row in rows]  # each [C, L]
    samples = round(float(clips.duration_seconds[rows[0]]) * rate)
    audio = decode(torch.stack(latents).to(device))[..., :samples].cpu()
    ids, captions, labels = ([texts[row] for row in rows] for texts in (clips.id, clips.caption, clips.label))
    values = reward(audio, rate, captions, [label or None for label in labels])
    for id, value in zip(ids, values, strict=True):
        if not np.isfinite(value):
            raise ValueError(f"reward: {value} of clip {id} ({reader.index.url}); a reward is a finite number")
    return dict(zip(ids, values, strict=True))


def _pair(names: Sequence[str], rewards: dict[str, float], least_gap: float) -> Preference | None:
    values = [rewards[name] for name in names]
    if (places := best_and_worst(values, least_gap)) is None:
        return None
    winner, loser = places
    return Preference(names[winner], names[loser], values[winner], values[loser])


def _means(rewards: dict[str, float], pairs: Sequence[Preference]) -> dict[str, float]:
    chosen = {"winners": [rewards[pair.winner] for pair in pairs], "losers": [rewards[pair.loser] for pair in pairs]}
    return {
        f"mean_{name}": float(np.mean(values)) for name, values in {"all": list(rewards.values()), **chosen}.items()
    }
