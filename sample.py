"""Generate audio from text: `python sample.py prompt="a dog barks"`; `--help` lists the options."""

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command, renamed
from foley.cli.sampling_checks import check_numbers, check_source
from foley.core.logs import get_logger

_OLD_NAMES = dict.fromkeys(("ckpt", "model", "published"), "system")


@command("sample", check=renamed(**_OLD_NAMES))
def main(cfg: DictConfig) -> None:
    """Generate every clip asked for and write the folder."""
    check_numbers(cfg)
    check_source(cfg)
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.accel.combined import NoAcceleration
    from foley.cli import sampling
    from foley.generation.clip_folder import ClipFolder, launch_processes
    from foley.generation.comparison import compare_with_uncached

    cfg.system = sampling.chosen_system(cfg)
    clips, settings = sampling.requested_clips(cfg), sampling.requested_settings(cfg)
    processes = launch_processes(cfg.trainer)
    generator = sampling.open_requested(cfg, settings, None if cfg.trainer is None else processes.device)
    directory = Path(processes.broadcast(cfg.output_dir))
    folder = ClipFolder(directory, clips, sampling.describe_request(cfg, clips, generator.model_hash))
    settings = sampling.of_request(settings, folder.request_hash)
    with folder.claimed(processes, cfg.overwrite):
        if cfg.prompts is not None:
            page = folder.fill(partial(generator.generate_clips, settings=settings), processes, cfg.batch_size)
        elif sampling.asks_for_nothing(cfg) and not isinstance(settings.accelerator, NoAcceleration):
            page = compare_with_uncached(generator, clips, settings, directory)
        else:
            page = folder.write(generator.generate_clips(clips, settings))
    get_logger(__name__).info("%d clips: open %s", len(clips), page)


if __name__ == "__main__":
    main()
