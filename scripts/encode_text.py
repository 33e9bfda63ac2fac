"""Encode every caption of a data set with a frozen text encoder, once, so that training does not load it."""

from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command, renamed

if TYPE_CHECKING:
    from foley.core.sharding import Shard


def encode(cfg: DictConfig, shard: "Shard") -> None:
    """A shard of the captions; the last one to end completes the store."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.columns import Texts
    from foley.core.devices import resolve_device
    from foley.data.latents import read_captions
    from foley.generation.clip_folder import launch_processes
    from foley.models.text.encoding import encode_texts
    from foley.training.run import plain

    texts = Texts.join([read_captions(cfg.captions, cfg.caption_column), Texts.of(cfg.prompts)])
    processes = None if cfg.trainer is None else launch_processes(cfg.trainer)
    share = shard if processes is None else shard.split(processes.global_rank, processes.world_size)
    encode_texts(
        instantiate(cfg.text).to(resolve_device(cfg.device) if processes is None else processes.device),
        plain(cfg.text),
        texts,
        cfg.output_dir,
        cfg.batch_size,
        share,
        shard_bytes=cfg.shard_megabytes << 20,
    )
    if processes is not None:
        processes.barrier()  # the command ends when all of them have ended


def require_index(cfg: DictConfig) -> None:
    """Raise where shards left the index to one another."""
    from foley.cli.launching import require_index_of_shards
    from foley.core.embeddings import is_finished

    require_index_of_shards(cfg, lambda: is_finished(str(cfg.output_dir)))


@command("script/encode_text", check=renamed(part="shard", parts="shards"))
def main(cfg: DictConfig) -> None:
    from foley.cli.launching import run_shards

    run_shards(cfg, encode, require_index)


if __name__ == "__main__":
    main()
