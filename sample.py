"""Generate audio from text: `python sample.py prompt="a dog barks"`; `--help` lists the options."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

import foley.config  # noqa: F401  (registers the resolvers that the configs use)
from foley.logs import get_logger
from foley.prompts import name_model, quote_overrides, request_clips
from foley.requests import choose_method, choose_options, describe_source, open_requested


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Generate every clip asked for and write the folder."""
    clips = request_clips(cfg.prompt, cfg.prompts, cfg.seed, cfg.num)
    (method, arguments), options = choose_method(cfg), choose_options(cfg)
    generator = open_requested(cfg, method, options)
    prompts, seeds = [clip.prompt for clip in clips], [clip.seed for clip in clips]
    result = getattr(generator, method)(prompts, seeds=seeds, **arguments, **options)
    notes = [clip.notes for clip in clips]
    page, _ = result.write(Path(cfg.output_dir), notes=notes, more_settings=describe_source(cfg))
    get_logger(__name__).info("%d clips: open %s", len(clips), page)


if __name__ == "__main__":
    sys.argv = quote_overrides(name_model(sys.argv), ("prompt", "negative_prompt", "edit", "init"))
    main()
