"""Generate audio from text: `python sample.py prompt="a dog barks"`; `--help` lists the options."""

import sys
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

import foley.config  # noqa: F401  (registers the resolvers that the configs use)
from foley.logs import get_logger
from foley.pipeline import TextToAudio, resolve_device
from foley.prompts import quote_overrides, request_clips


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Generate every clip asked for and write the folder."""
    clips = request_clips(cfg.prompt, cfg.prompts, cfg.seed, cfg.num)
    result = TextToAudio.load(cfg.ckpt, resolve_device(cfg.device), cfg.max_duration_seconds).generate(
        [clip.prompt for clip in clips],
        cfg.duration_seconds,
        [clip.seed for clip in clips],
        guidance=hydra.utils.instantiate(cfg.guidance, scale=cfg.guidance_scale, rescale=cfg.guidance_rescale),
        solver=cfg.solver.name,
        num_steps=cfg.steps,
        accelerator=hydra.utils.instantiate(cfg.accel),
        negative_prompt=cfg.negative_prompt,
        batch_size=cfg.batch_size,
        progress=partial(track, description="denoising"),
    )
    settings = {"accelerator": OmegaConf.to_container(cfg.accel), "ckpt": str(cfg.ckpt)}
    page, _ = result.write(Path(cfg.output_dir), notes=[clip.notes for clip in clips], more_settings=settings)
    get_logger(__name__).info("%d clips: open %s", len(clips), page)


if __name__ == "__main__":
    sys.argv = quote_overrides(sys.argv, ("prompt", "negative_prompt"))
    main()
