"""The same clips made in several ways: how long each takes, how far it is from the first, and a page of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from foley.accel.combined import NoAcceleration
from foley.core.files import slug, write_json, write_text
from foley.core.logs import get_logger
from foley.diffusion.context import Accelerator
from foley.generation.clip_folder import remove_clips
from foley.generation.pipeline_to_audio import PipelineToAudio
from foley.generation.prompts import Clip
from foley.generation.result import Generation
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.losses.spectral import magnitude
from foley.reporting.fewer_steps import FEWER_STEPS
from foley.reporting.samples import PAGE_FILE, render_comparison
from foley.reporting.tables import COST_COLUMNS, format_cell, format_rows
from foley.reporting.words import MARKS, describe_settings

_FFT_SAMPLES = 1024
_FACTS = (
    "{} sounds, each from the same seed in every column, timed once ({}). TMACs (10^12 multiply-accumulates "
    "of the denoising), seconds, speed-up and RTF (seconds of computing for a second of audio) are of all of them "
    "together. Spectral convergence is the distance "
    "of magnitude spectrograms from those of the first column, relative to these: 0 is the same sound, 1 another one."
)
_COLUMNS = {
    "": "{way}",
    **COST_COLUMNS,
    "speed-up": "{speedup:.2f}x",
    "spectral convergence": "{spectral_convergence:.3f}",
}
_log = get_logger(__name__)


def spectral_convergence(audio: Tensor, reference: Tensor) -> float:
    """`||S(audio) - S(reference)|| / ||S(reference)||` of magnitude spectrograms (Arik et al. 2018, section 4.1).

    Both are `[N, channels, T]`. 0 of equal audio; two independent sounds of one level lie near 1.

    >>> tone = torch.sin(torch.arange(4000) / 5)[None, None]
    >>> spectral_convergence(tone, tone), round(spectral_convergence(0.5 * tone, tone), 4)
    (0.0, 0.5)
    """
    ours, theirs = (_spectrogram(each) for each in (audio, reference))
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs).clamp_min(1e-12))


def _spectrogram(audio: Tensor) -> Tensor:
    """`[N * channels, frequencies, frames]`."""
    window = torch.hann_window(_FFT_SAMPLES)
    short = max(0, _FFT_SAMPLES - audio.shape[-1])
    return magnitude(torch.nn.functional.pad(audio.flatten(0, 1), (0, short)), window)


def compare(results: Mapping[str, Generation]) -> dict[str, dict[str, Any]]:
    """Of each way: TMACs, seconds and RTF of all its clips, `speedup` over the first way, and distance from it."""
    reference = next(iter(results.values()))
    return {
        name: {
            "tmacs": result.tmacs,
            "seconds": result.timings.total_seconds,
            "speedup": reference.timings.total_seconds / result.timings.total_seconds,
            **result.rtf.to_json(),
            "spectral_convergence": spectral_convergence(result.audio, reference.audio),
        }
        for name, result in results.items()
    }


def heading(name: str, row: Mapping[str, Any], *facts: str) -> str:
    """Of a way's column: its name, and in a line below it what `compare` says, and what else is to be said."""
    counted = [cell] if (cell := format_cell("{tmacs:.3g} TMACs", row)) else []
    said = [*counted, f"{row['seconds']:.1f} s", f"{row['speedup']:.1f}x", f"RTF {row['real_time_factor']:.3g}"]
    if row["spectral_convergence"]:
        said.append(f"spectral convergence {row['spectral_convergence']:.2f}")
    return f"{name}\n{', '.join([*said, *facts])}"


def compare_with_uncached(
    generator: TextToAudio | PipelineToAudio, clips: Sequence[Clip], settings: GenerationSettings, directory: Path
) -> Path:
    """The clips without acceleration, with that of `settings`, and by fewer steps; returns the page.

    All are from the same seeds. Fewer steps are as many as cost what the accelerated run does, where that is counted.
    Calibration and first calls are not timed. Each way is timed once: its speed-up is what one sees, no benchmark.
    """
    name = _name(settings.accelerator)
    generator.generate_clips(clips[:1], replace(settings, progress=iter))
    results = {}
    for way, accelerator in {"no acceleration": NoAcceleration(), name: settings.accelerator}.items():
        bar = partial(track, description=way)
        results[way] = generator.generate_clips(clips, replace(settings, accelerator=accelerator, progress=bar))
    if steps := _steps_at_its_cost(results[name].settings):
        plain = replace(
            settings, accelerator=NoAcceleration(), num_steps=steps, progress=partial(track, description="fewer steps")
        )
        results[f"{FEWER_STEPS}, {steps}"] = generator.generate_clips(clips, plain)
    rows = compare(results)
    write_json(directory / "comparison.json", rows)
    _log.info("%s", format_rows([{"way": way, **row} for way, row in rows.items()], _COLUMNS))
    where = next(iter(results.values())).rtf.where
    headings = {way: heading(way, row) for way, row in rows.items()}
    return write_comparison(directory, f"With and without {name}", _FACTS.format(len(clips), where), results, headings)


def _steps_at_its_cost(settings: Mapping[str, Any]) -> int | None:
    """How many uncached steps take as many multiply-accumulates as the run did; None where they are not fewer.

    >>> _steps_at_its_cost({"num_steps": 50, "mac_speedup": 2.9}), _steps_at_its_cost({"num_steps": 50})
    (17, None)
    """
    steps = round(settings["num_steps"] / settings.get("mac_speedup", 1.0))
    return steps if 1 <= steps < settings["num_steps"] else None


def _name(accelerator: Accelerator | None) -> str:
    parts = getattr(accelerator, "accelerators", (accelerator,))
    return " and ".join(type(part).__name__ for part in parts)


def write_comparison(
    directory: Path, title: str, facts: str, results: Mapping[str, Generation], headings: Mapping[str, str]
) -> Path:
    """A folder of clips for each way, emptied of earlier ones, and the page that shows them in columns; returns that.

    Args:
        results, headings: by the name of the way, in order; its folder is the slug of it.
    """
    columns = {}
    for name, result in results.items():
        remove_clips(directory / slug(name))  # what an earlier comparison made of other prompts
        _, cards = result.write(directory / slug(name), name)
        columns[headings[name]] = [card.inside(slug(name)) for card in cards]
    page, settings = directory / PAGE_FILE, next(iter(results.values())).settings
    marks = describe_settings({key: settings[key] for key in MARKS if key in settings})
    facts = " ".join([facts, *(f"{fact.name}: {fact.text}.".capitalize() for fact in marks)])
    write_text(page, render_comparison(title, facts, columns))
    return page
