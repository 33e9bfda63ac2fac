"""A student against its teacher: label accuracy, Frechet distances, TMACs and wall seconds at every number of steps.

With `curves`, also students of different k over their training (AudioLCM's Fig. 2(a)); with `guidance_sweep`, the
student at other scales (Fig. 2(b)). Both report Frechet distances of audio: of the extractor that ships, and with
`vggish_dir` the paper's FAD.
TMACs and seconds are those of the whole list of prompts; seconds by stage.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig

from foley.accel.combined import NoAcceleration
from foley.accel.cost import tmacs
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.prompts import LabelledPrompts
from foley.generation.result import Generation
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import FrechetAudioDistance, Judge
from foley.metrics.latency import RealTimeFactor
from foley.reporting.plots import plot_rows
from foley.reporting.tables import provenance
from foley.system.checkpoint import noted_source

Row = dict[str, Any]
_SCORES = {"label_accuracy": "label accuracy", "frechet_distance": "Frechet distance", "fad": "FAD (VGGish)"}


@dataclass(frozen=True)
class Workload:
    """What every row generates, and how it is judged."""

    prompts: LabelledPrompts
    judge: Judge
    duration_seconds: float
    batch_size: int
    repeats: int
    any_guidance_scale: bool
    fad: FrechetAudioDistance | None = None

    @classmethod
    def build(cls, cfg: DictConfig) -> "Workload":
        """Raises ValueError where Frechet distances are asked for without a set to measure them to."""
        if cfg.reference is None and (cfg.curves or cfg.guidance_sweep or cfg.vggish_dir is not None):
            raise ValueError(
                "curves, guidance_sweep and vggish_dir report Frechet distances: give reference=FOLDER of audio"
            )
        return cls(
            LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts),
            Judge.load(Path(cfg.extractor_dir), cfg.reference),
            cfg.duration_seconds,
            cfg.batch_size,
            cfg.repeats,
            cfg.any_guidance_scale,
            None if cfg.vggish_dir is None else FrechetAudioDistance.load(Path(cfg.vggish_dir), cfg.reference),
        )

    def measure(self, system: TextToAudio, num_steps: int, scale: float) -> Row:
        """One row: TMACs, seconds by stage, medians over the repeats, their RTF, and scores."""
        macs = self.generate(system, num_steps, scale, clips=1, accelerator=NoAcceleration()).settings["macs"]
        runs = [self.generate(system, num_steps, scale) for _ in range(self.repeats)]
        stages = {stage: median(asdict(run.timings)[stage] for run in runs) for stage in asdict(runs[0].timings)}
        total = median(run.timings.total_seconds for run in runs)
        rtf = RealTimeFactor.median([run.rtf for run in runs]).to_json()
        cost = {"tmacs": tmacs(len(self.prompts.captions) * macs), **stages, "total_seconds": total, **rtf}
        row = {"num_steps": num_steps, "guidance_scale": scale, **cost}
        audio, rate_hz = runs[-1].audio, runs[-1].sample_rate_hz
        fad = {} if self.fad is None else {"fad": self.fad.score(audio, rate_hz)}
        return {**row, **self.judge.score(audio, rate_hz, self.prompts.labels), **fad}

    def generate(
        self, system: TextToAudio, num_steps: int, scale: float, clips: int | None = None, **options: Any
    ) -> Generation:
        """The clips, or the first few of them, once."""
        system.forget_prompts()  # so that the text counts in every row
        return system.generate(
            self.prompts.captions[:clips],
            self.duration_seconds,
            guidance=ClassifierFreeGuidance(scale),
            num_steps=num_steps,
            batch_size=self.batch_size,
            any_guidance_scale=self.any_guidance_scale,
            **options,
        )


def compare(workload: Workload, systems: Iterable[tuple[str, TextToAudio, Sequence[int]]], scale: float) -> list[Row]:
    """A row for each system and number of steps; speed-ups are over the first row."""
    rows = []
    for name, system, step_counts in systems:
        workload.generate(system, 1, scale)  # warms up
        rows += [{"system": name, **workload.measure(system, steps, scale)} for steps in step_counts]
    for row in rows:
        for stage in ("denoise", "total"):
            row[f"{stage}_speedup"] = rows[0][f"{stage}_seconds"] / row[f"{stage}_seconds"]
    return rows


def measure_curves(workload: Workload, cfg: DictConfig, device: Any) -> list[Row]:
    """A row for each checkpoint of each run in `cfg.curves`."""
    rows = []
    for jump_steps, folder in cfg.curves.items():
        paths = sorted(Path(folder).glob("checkpoints/step_*.ckpt"))
        if not paths:
            raise FileNotFoundError(f"curves.{jump_steps}={folder} holds no checkpoints/step_*.ckpt")
        for path in paths:
            row = workload.measure(TextToAudio.load(path, device), cfg.curve_steps, cfg.guidance_scale)
            rows.append({"k": int(jump_steps), "training_step": int(path.stem.removeprefix("step_")), **row})
    return rows


@command("bench/distillation")
def main(cfg: DictConfig) -> None:
    workload, device = Workload.build(cfg), resolve_device(cfg.device)
    teacher = TextToAudio.load(cfg.teacher, device)
    systems = [("teacher", teacher, cfg.teacher_steps)]
    sweep: list[Row] = []
    if cfg.student is not None:
        student = TextToAudio.load(cfg.student, device)
        systems.append(("student", student, cfg.student_steps))
        sweep = [workload.measure(student, n, scale) for n in cfg.student_steps for scale in cfg.guidance_sweep]
    rows, curves = compare(workload, systems, cfg.guidance_scale), measure_curves(workload, cfg, device)
    output_dir = Path(cfg.output_dir)
    results = {"rows": rows, "guidance_sweep": sweep, "curves": curves}
    # As seen from the checkout: results lie beside the code, and no other machine has these paths.
    paths = {name: cfg[name] and noted_source(cfg[name]) for name in ("teacher", "student", "reference")}
    settings = {
        **paths,
        **{name: cfg[name] for name in ("guidance_scale", "duration_seconds", "batch_size", "repeats")},
        "prompts": len(workload.prompts.captions),
        "model_hashes": {name: system.model_hash for name, system, _ in systems},
        "device": str(device),
    }
    write_json(output_dir / "distillation.json", {"settings": settings, "provenance": provenance(), **results})
    plot_rows(rows, "denoise_seconds", _SCORES, "{system}", output_dir / "distillation.png", log_x=True)
    plot_rows(sweep, "guidance_scale", _SCORES, "{num_steps} steps", output_dir / "guidance.png")
    plot_rows(curves, "training_step", _SCORES, "k {k}", output_dir / "curves.png")
    sys.stdout.write("\n".join(json.dumps(row) for row in [*rows, *sweep, *curves]) + "\n")


if __name__ == "__main__":
    main()
