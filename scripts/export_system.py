"""Turn a diffusion training checkpoint and the codec it names into one directory that `TextToAudio.load` takes."""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

import foley.config  # noqa: F401  (registers the resolvers)
from foley.logs import get_logger
from foley.system import load_system, save_system

DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@hydra.main(version_base="1.3", config_path="../configs", config_name="export_system")
def main(cfg: DictConfig) -> None:
    if cfg.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {cfg.dtype!r}")
    directory = Path(cfg.output_dir)
    save_system(load_system(Path(cfg.ckpt)), directory, DTYPES[cfg.dtype])
    megabytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6
    get_logger(__name__).info("wrote %s, %.1f MB", directory, megabytes)


if __name__ == "__main__":
    main()
