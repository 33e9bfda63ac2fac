"""Guidance scales with and without rescale: label accuracy and Frechet distance at each, as in Fig. 3 of EzAudio.

And other rules of guidance beside them, with what they compute.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.accel.combined import NoAcceleration
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.solver import solver_label
from foley.generation.prompts import LabelledPrompts
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import Judge
from foley.reporting.tables import provenance


def measure(system: TextToAudio, judge: Judge, cfg: DictConfig, guidance: ClassifierFreeGuidance) -> dict[str, Any]:
    """One row: the same prompts and seeds in every one."""
    prompts = LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts)
    result = system.generate(
        prompts.captions,
        cfg.duration_seconds,
        guidance=guidance,
        solver=cfg.solver.name,
        eta=cfg.solver.eta,
        num_steps=cfg.steps,
        batch_size=cfg.batch_size,
        accelerator=NoAcceleration(),  # under which multiply-accumulates are counted
    )
    clips = judge.clips(result.audio, result.sample_rate_hz, prompts.labels)
    return {
        "guidance_scale": guidance.scale,
        "rescale": guidance.rescale,
        "prompts": len(prompts.captions),
        "gmacs": result.settings["macs"] / 1e9,
        **result.rtf.to_json(),
        **({} if clips is None else judge.assess(clips)),
    }


def measure_rules(system: TextToAudio, judge: Judge, cfg: DictConfig) -> list[dict[str, Any]]:
    """A row for each rule at each of its scales, classifier-free guidance first."""
    rows = []
    for name, scale in product(("cfg", *cfg.rules), cfg.rule_scales):
        guidance = ClassifierFreeGuidance(scale) if name == "cfg" else instantiate(cfg.rules[name], scale=scale)
        rows.append({"guidance": name, **guidance.describe(), **measure(system, judge, cfg, guidance)})
        sys.stdout.write(f"{json.dumps(rows[-1])}\n")
    return rows


@command("bench/guidance")
def main(cfg: DictConfig) -> None:
    system = TextToAudio.load(cfg.system, resolve_device(cfg.device))
    judge = Judge.load(Path(cfg.extractor_dir), cfg.reference)
    rows = []
    for rescale, scale in product(cfg.rescales, cfg.scales):
        rows.append(measure(system, judge, cfg, ClassifierFreeGuidance(scale, rescale)))
        sys.stdout.write(f"{json.dumps(rows[-1])}\n")
    rules = measure_rules(system, judge, cfg)
    settings = {"solver": solver_label(cfg.solver.name, cfg.solver.eta), "num_steps": cfg.steps}
    settings |= {"duration_seconds": cfg.duration_seconds}
    measured = {"settings": settings, "rows": rows, "rules": rules, "provenance": provenance()}
    write_json(Path(cfg.output_dir) / "guidance.json", measured)


if __name__ == "__main__":
    main()
