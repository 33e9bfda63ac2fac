"""TMACs and seconds to generate one clip on this machine, split into text, denoising and decoding."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.accel.combined import NoAcceleration
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.generation.result import Generation
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.latency import RealTimeFactor
from foley.reporting.tables import provenance
from foley.system.system import load_system, untrained_system

PROMPT = "a dog barks while rain falls on a tin roof"


def summarise(runs: list[Generation], pipeline: TextToAudio, trained: bool) -> dict[str, Any]:
    """Medians over the runs but the first, which warms up and is counted, and the RTF of the median run."""
    counted, *runs = runs
    stages = {key: median(asdict(run.timings)[key] for run in runs) for key in asdict(runs[0].timings)}
    total = median(run.timings.total_seconds for run in runs)
    return {
        **{key: round(seconds, 4) for key, seconds in stages.items()},
        "total_seconds": round(total, 4),
        "tmacs": counted.tmacs,
        **RealTimeFactor.median([run.rtf for run in runs]).to_json(),
        "repeats": len(runs),
        "trained_weights": trained,
        "denoiser_parameters": sum(p.numel() for p in pipeline.denoiser.parameters()),
        "codec_parameters": sum(p.numel() for p in pipeline.codec.parameters()),
        "settings": runs[0].settings,
        "provenance": provenance(),
    }


@command("bench/sampling")
def main(cfg: DictConfig) -> None:
    trained = Path(cfg.system).exists()
    system = load_system(Path(cfg.system)) if trained else untrained_system(cfg)
    pipeline = TextToAudio(system, resolve_device(cfg.device))
    solver = {"solver": cfg.solver.name, "eta": cfg.solver.eta, "num_steps": cfg.steps}
    settings = {"guidance": instantiate(cfg.guidance), **solver}
    runs = []
    for accelerator in (NoAcceleration(), *[None] * cfg.repeats):
        pipeline.forget_prompts()  # so that the text counts in every run
        runs.append(pipeline.generate([PROMPT], cfg.duration_seconds, accelerator=accelerator, **settings))
    result = summarise(runs, pipeline, trained)
    write_json(Path(cfg.results_file), result)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
