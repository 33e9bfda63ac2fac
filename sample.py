"""Generate audio from text: `python sample.py prompt="a dog barks"`; `--help` lists the options."""

import sys
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.cli.requests import (
    choose_checkpoint,
    choose_method,
    choose_options,
    describe_request,
    describe_source,
    open_requested,
    requested_clips,
)
from foley.core.logs import get_logger
from foley.generation.collection import TestSet, launch_processes
from foley.generation.prompts import name_model


@command("sample", text=("prompt", "negative_prompt", "edit", "init", "features"))
def main(cfg: DictConfig) -> None:
    """Generate every clip asked for and write the folder."""
    cfg.ckpt = choose_checkpoint(cfg)
    clips = requested_clips(cfg)
    (method, arguments), options = choose_method(cfg), choose_options(cfg)
    processes = launch_processes(cfg.trainer)
    generator = open_requested(cfg, method, options, None if cfg.trainer is None else processes.device)
    generate = partial(getattr(generator, method), **arguments, **options)
    directory = Path(processes.broadcast(cfg.output_dir))
    if cfg.prompts is not None:
        request = describe_request(cfg, clips, generator.model_hash)
        page = TestSet(directory, clips, request, describe_source(cfg)).generate(generate, processes, cfg.batch_size)
    else:
        result = generate([clip.prompt for clip in clips], seeds=[clip.seed for clip in clips])
        page, _ = result.write(directory, more_settings=describe_source(cfg))
    get_logger(__name__).info("%d clips: open %s", len(clips), page)


if __name__ == "__main__":
    sys.argv = name_model(sys.argv)
    main()
