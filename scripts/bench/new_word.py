"""A new word for a sound that a system does not know: taught by adapters, and looked for in what it then generates.

The sound is synthesised, and outside of the classes that the system was trained on: pings that bounce, faster and
faster. Clips generated of its word are compared with held-out clips of it by the features of the extractor that ships,
before and after; so are other clips of the sound, and those through the system's codec, which is the best that can be
hoped for. The classes that the system knows are judged, as ever.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from foley.cli.command import command
from foley.core.config import PROJECT_ROOT, relative_to_checkout
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.seeding import numpy_generator
from foley.data.audio import write_wav
from foley.data.procedural import CLASS_NAMES, captions_for
from foley.data.procedural.synthesis import Signal, Timeline, cycles, decay, place, sine
from foley.generation.prompts import as_clips
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.distances import frechet_distance, kernel_audio_distance
from foley.metrics.features import ClipFeatures
from foley.metrics.judge import Judge
from foley.metrics.scores import share
from foley.reporting.tables import provenance
from foley.training.lora import ADAPTER_FOLDER

Row = dict[str, Any]


def bounce(timeline: Timeline) -> Signal:
    """Pings whose distances shrink by a fifth each time, as a ball's that is dropped, and then again from the top."""
    rng = timeline.rng
    pitch_hz, gap, shrink = rng.uniform(500, 900), rng.uniform(0.26, 0.34), rng.uniform(0.78, 0.84)
    gaps = gap * shrink ** np.arange(int(np.log(0.03 / gap) / np.log(shrink)))
    onsets = np.cumsum(np.tile(gaps, 4)) - gap + rng.uniform(0, 0.1)
    ping = timeline.part(0.25)
    tone = sine(cycles(ping, pitch_hz)) * decay(ping, 0.08)
    return place(timeline, onsets[onsets < timeline.duration_seconds], [tone])


def clips_of_it(count: int, seed: int, seconds: float, sample_rate_hz: int) -> list[Tensor]:
    """`count` clips `[T]`, other ones for each seed."""
    made = []
    for index in range(count):
        timeline = Timeline(round(seconds * sample_rate_hz), sample_rate_hz, numpy_generator("bounce", seed, index))
        signal = bounce(timeline)
        made.append(torch.from_numpy((0.7 * signal / np.abs(signal).max()).astype(np.float32)))
    return made


def teach(cfg: DictConfig, clips: list[Tensor], sample_rate_hz: int) -> Row:
    """Train the adapters as anybody would, by the recipe; how long that took, and how large they are."""
    folder, run = Path(cfg.work_dir) / "clips", Path(cfg.work_dir) / "run"
    for index, clip in enumerate(clips):
        write_wav(folder / f"{index:02d}.wav", clip, sample_rate_hz)
    words = [f"data.splits.folder={folder}", f"ckpt={cfg.system}", f"caption={cfg.caption}", f"hydra.run.dir={run}"]
    command = [sys.executable, str(PROJECT_ROOT / "train.py"), "experiment=lora", *words, *shlex.split(cfg.recipe)]
    start = time.perf_counter()
    subprocess.run(command, cwd=PROJECT_ROOT, check=True)
    seconds = time.perf_counter() - start
    info = json.loads((run / ADAPTER_FOLDER / "adapter.json").read_text())
    size = sum(file.stat().st_size for file in (run / ADAPTER_FOLDER).rglob("*.safetensors"))
    return {"clips": len(clips), "steps": info["steps"], "seconds": seconds, "megabytes": size / 1e6}


def generated(system: TextToAudio, prompts: list[str], cfg: DictConfig) -> Tensor:
    """`[N, 1, T]`, with a seed for each place in the list."""
    settings = GenerationSettings(cfg.duration_seconds, num_steps=cfg.steps, batch_size=cfg.batch_size)
    return system.generate_clips(as_clips(prompts), settings).audio


def nearness(clips: ClipFeatures, held_out: ClipFeatures, known: ClipFeatures) -> Row:
    """How near clips are to those held out of the sound, and how many of them nearer than to any of known classes."""
    distances = torch.cdist(clips.features, torch.cat([held_out.features, known.features]))
    count = len(held_out.features)
    found = share(int((distances.argmin(dim=1) < count).sum()), len(clips.features))
    return {
        "n": len(clips.features),
        "frechet_distance": frechet_distance(held_out.features, clips.features),
        "kad": float(kernel_audio_distance(held_out.features, clips.features)),
        "nearest_distance": float(distances[:, :count].min(dim=1).values.mean()),
        **{"recognised": found.value, "recognised_low": found.low, "recognised_high": found.high},
    }


@torch.no_grad()
def best_possible(
    system: TextToAudio, judge: Judge, cfg: DictConfig, held_out: ClipFeatures, known: ClipFeatures
) -> Row:
    """`nearness` of other clips of the sound, and of those through the system's codec."""
    sounds = torch.stack(clips_of_it(cfg.clips, 2, cfg.duration_seconds, system.sample_rate_hz))[:, None]
    coded = torch.cat([system.codec.decode(system.codec.encode(part)) for part in sounds.split(cfg.batch_size)])
    found = {}
    for name, audio in {"sound": sounds, "codec": coded[..., : sounds.shape[-1]]}.items():
        features = judge.clips(audio, system.sample_rate_hz, [None] * cfg.clips)
        assert features is not None
        found[name] = nearness(features, held_out, known)
    return found


def assess(
    system: TextToAudio, judge: Judge, cfg: DictConfig, held_out: ClipFeatures, known: ClipFeatures | None
) -> tuple[Row, ClipFeatures]:
    """One row, and the clips of known classes; those of the first row are what the new sound is told apart from."""
    rate, labels = system.sample_rate_hz, [name for name in CLASS_NAMES for _ in range(cfg.clips_of_class)]
    of_known = judge.clips(generated(system, [captions_for(name)[0] for name in labels], cfg), rate, list(labels))
    of_word = judge.clips(generated(system, [cfg.caption] * cfg.clips, cfg), rate, [None] * cfg.clips)
    assert of_known is not None
    assert of_word is not None
    known = of_known if known is None else known
    return {
        **nearness(of_word, held_out, known),
        "known_n": len(labels),
        **{f"known_{name}": value for name, value in judge.assess(of_known).items() if name.startswith("label")},
    }, of_known


@command("bench/new_word")
def main(cfg: DictConfig) -> None:
    system, judge = TextToAudio.load(cfg.system, resolve_device(cfg.device)), Judge.load(Path(cfg.extractor_dir))
    length = cfg.duration_seconds, system.sample_rate_hz
    training = teach(cfg, clips_of_it(cfg.own_clips, 0, *length), system.sample_rate_hz)
    sounds = torch.stack(clips_of_it(cfg.clips, 1, *length))[:, None]
    held_out = judge.clips(sounds, system.sample_rate_hz, [None] * cfg.clips)
    assert held_out is not None
    rows: list[Row] = []
    known: ClipFeatures | None = None
    for scale in (0.0, *cfg.scales):
        folder = str(Path(cfg.work_dir) / "run" / ADAPTER_FOLDER)
        system.use_adapters([{"path": folder, "scale": scale}] if scale else [])
        row, clips = assess(system, judge, cfg, held_out, known)
        known = known or clips
        rows.append({"scale": scale, **row})
        sys.stdout.write(f"{json.dumps(rows[-1])}\n")
    settings = {"system": relative_to_checkout(str(cfg.system)), "caption": cfg.caption, "steps": cfg.steps}
    assert known is not None
    best = best_possible(system, judge, cfg, held_out, known)
    found = {"settings": settings, "training": training, "best": best, "rows": rows, "provenance": provenance()}
    write_json(Path(cfg.output_dir) / "new_word.json", found)


if __name__ == "__main__":
    main()
