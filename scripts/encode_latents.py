"""Encode every clip of a data set with a trained codec, once, so that diffusion training reads latents."""

from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command, renamed

if TYPE_CHECKING:
    from foley.core.sharding import Shard


def encode(cfg: DictConfig, shard: "Shard") -> None:
    """A shard of the clips; the last one to end completes the cache."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.devices import resolve_device
    from foley.data.encoding import EncodingOptions, encode_latents
    from foley.generation.clip_folder import launch_processes
    from foley.system.checkpoint import load_trained

    given = {name: cfg[name] for name in EncodingOptions.__dataclass_fields__ if name != "share"}
    processes = None if cfg.trainer is None else launch_processes(cfg.trainer)
    encode_latents(
        load_trained(cfg.codec_path, "codec"),
        instantiate(cfg.data, _convert_="all").whole_clips(cfg.max_duration_seconds),
        cfg.output_dir if processes is None else processes.broadcast(cfg.output_dir),
        EncodingOptions(share=shard, **given),
        resolve_device(cfg.device) if processes is None else processes.device,
        processes,
    )


def require_index(cfg: DictConfig) -> None:
    """Raise where shards left the index to one another."""
    from foley.cli.launching import require_index_of_shards
    from foley.data.latent_folder import LatentFolder

    require_index_of_shards(cfg, lambda: LatentFolder(str(cfg.output_dir)).is_merged)


@command("script/encode_latents", check=renamed(codec_ckpt="codec_path", part="shard", parts="shards"))
def main(cfg: DictConfig) -> None:
    from foley.cli.launching import run_shards

    run_shards(cfg, encode, require_index)


if __name__ == "__main__":
    main()
