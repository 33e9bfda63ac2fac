"""Generate audio from text: `python sample.py prompt="a dog barks"`; `--help` lists the options."""

from functools import partial
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from foley.cli.command import command, renamed
from foley.cli.sampling_checks import check_numbers, check_source
from foley.core.logs import get_logger

if TYPE_CHECKING:
    from foley.core.sharding import Shard

_OLD_NAMES = dict.fromkeys(("ckpt", "model", "published"), "system")


def generate(cfg: DictConfig, shard: "Shard") -> None:
    """Generate the clips of a shard; of everything at once, its page too."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.accel.combined import NoAcceleration
    from foley.cli import sampling
    from foley.core.remote import local_folder
    from foley.generation.clip_folder import ClipFolder, launch_processes, tells_of_clips
    from foley.generation.comparison import compare_with_uncached

    cfg.system = sampling.chosen_system(cfg)
    clips, settings = sampling.requested_clips(cfg), sampling.requested_settings(cfg)
    processes = launch_processes(cfg.trainer)
    generator = sampling.open_requested(cfg, settings, None if cfg.trainer is None else processes.device)
    wanted = tells_of_clips if shard.count > 1 else lambda name: True
    with local_folder(processes.broadcast(cfg.output_dir), wanted) as directory:
        folder = ClipFolder(directory, clips, sampling.describe_request(cfg, clips, generator.model_hash))
        settings = sampling.of_request(settings, folder.request_hash)
        with folder.claimed(processes, cfg.overwrite, shard):
            if cfg.prompts is not None:
                folder.fill(partial(generator.generate_clips, settings=settings), processes, cfg.batch_size, shard)
                if shard.count == 1:
                    folder.write_pages(processes)
            elif sampling.asks_for_nothing(cfg) and not isinstance(settings.accelerator, NoAcceleration):
                compare_with_uncached(generator, clips, settings, directory)
            else:
                folder.write(generator.generate_clips(clips, settings))
    if shard.count == 1:
        get_logger(__name__).info("%d clips: open %s/index.html", len(clips), cfg.output_dir)


def show(cfg: DictConfig) -> None:
    """Write the pages of what shards have made."""
    from foley.cli import sampling
    from foley.core.remote import local_folder
    from foley.generation.clip_folder import ClipFolder, launch_processes

    if cfg.shards > 1:
        clips = sampling.requested_clips(cfg)
        with local_folder(cfg.output_dir) as directory:
            ClipFolder(directory, clips, {}).write_pages(launch_processes(None))
        get_logger(__name__).info("%d clips: open %s/index.html", len(clips), cfg.output_dir)


@command("sample", check=renamed(**_OLD_NAMES))
def main(cfg: DictConfig) -> None:
    """Generate every clip asked for and write the folder."""
    check_numbers(cfg)
    check_source(cfg)
    from foley.cli.launching import run_shards

    run_shards(cfg, generate, show)


if __name__ == "__main__":
    main()
