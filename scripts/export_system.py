"""Turn a diffusion training checkpoint and the codec it names into one directory that `TextToAudio.load` takes.

On demand with graphs of its networks for other runtimes, ONNX or AOTInductor, in a folder inside it; or instead as the
folder of a pipeline of diffusers, or the codec alone, out of its own training or of a system.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from foley.cli.command import command
from foley.core.components import save_component
from foley.core.devices import resolve_device
from foley.core.logs import get_logger
from foley.data.latents import LatentCacheIndex
from foley.generation.novelty import representative
from foley.system.adapters import adapted, adapter_choices
from foley.system.checkpoint import load_trained, trained_config
from foley.system.exported import check_format, export_graphs
from foley.system.system import System, load_system, save_system, share_parts

DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def with_captions(system: System, latents: str) -> System:
    """The system with the captions of the training clips in a latent cache, by which it knows strangers."""
    index = LatentCacheIndex.read(latents)
    clips, rows = index.clips, index.rows("train")
    return replace(system, captions=representative([*clips.caption.take(rows), *clips.other_captions.take(rows).texts]))


def export_codec(cfg: DictConfig) -> None:
    """The codec as a component's folder, which `codec_path=` takes; raises ValueError for options of a system."""
    for name in ("codec_path", "latents", "share_with", "adapters"):
        if cfg[name]:
            raise ValueError(f"{name}={cfg[name]} is of a whole system: leave it out with format=codec")
    directory = Path(cfg.output_dir)
    save_component(load_trained(cfg.ckpt, "codec"), trained_config(cfg.ckpt, "codec"), directory, DTYPES[cfg.dtype])
    get_logger(__name__).info("wrote %s: codec_path=%s", directory, directory)


@command("script/export_system")
def main(cfg: DictConfig) -> None:
    if cfg.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {cfg.dtype!r}")
    if cfg.format == "codec":
        export_codec(cfg)
        return
    if cfg.format not in ("system", "diffusers"):
        check_format(cfg.format)  # before anything is read
    directory, system = Path(cfg.output_dir), load_system(cfg.ckpt, codec_path=cfg.codec_path)
    if cfg.latents is not None:
        system = with_captions(system, cfg.latents)
    adapters: Any = OmegaConf.to_container(cfg.adapters, resolve=True)
    system = adapted(system, adapter_choices(adapters))
    if cfg.format == "diffusers":
        if cfg.dtype == "int8":
            raise ValueError("dtype=int8 is of our own files, widened as they are read: format=diffusers has none")
        from foley.system.diffusers_folder import save_pipeline  # which loads all of diffusers

        save_pipeline(system, directory, DTYPES[cfg.dtype])
        get_logger(__name__).info("wrote %s: DiffusionPipeline.from_pretrained(..., trust_remote_code=True)", directory)
        return
    save_system(system, directory, DTYPES[cfg.dtype])
    if cfg.share_with is not None:
        share_parts(directory, Path(cfg.share_with))
    if cfg.format != "system":  # of the weights as they are stored
        stored = load_system(directory)
        for module in stored.modules.values():
            module.eval().to(resolve_device(cfg.device))
        export_graphs(stored, directory / cfg.format, cfg.format, cfg.max_frames)
    megabytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6
    get_logger(__name__).info("wrote %s, %.1f MB", directory, megabytes)


if __name__ == "__main__":
    main()
