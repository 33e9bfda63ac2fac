"""Encode every clip of a data set with a trained codec, once, so that diffusion training reads latents."""

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command, renamed


@command("script/encode_latents", check=renamed(codec_ckpt="codec_path"))
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.devices import resolve_device
    from foley.data.encoding import EncodingOptions, encode_latents
    from foley.generation.clip_folder import launch_processes
    from foley.system.checkpoint import load_trained

    options = EncodingOptions(**{name: cfg[name] for name in EncodingOptions.__dataclass_fields__})
    processes = None if cfg.trainer is None else launch_processes(cfg.trainer)
    encode_latents(
        load_trained(cfg.codec_path, "codec"),
        instantiate(cfg.data, _convert_="all").whole_clips(cfg.max_duration_seconds),
        cfg.output_dir if processes is None else processes.broadcast(cfg.output_dir),
        options,
        resolve_device(cfg.device) if processes is None else processes.device,
        processes,
    )


if __name__ == "__main__":
    main()
