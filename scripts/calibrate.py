"""Record the change curves that AudioCache and SmoothCache need, and draw them.

python scripts/calibrate.py ckpt=SYSTEM prompts=FILE solver=ddim steps=50 guidance_scale=3
python scripts/calibrate.py model=stable_audio_open prompts=FILE
"""

import sys
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.accel.caching.calibration import CalibrationRecorder, calibration_directory, calibration_stem
from foley.accel.caching.plots import plot_calibration
from foley.cli.command import command
from foley.core.files import info_path
from foley.core.logs import get_logger
from foley.data.sampler import evenly_spaced
from foley.generation.opening import open_generator
from foley.generation.prompts import name_model, read_prompts
from foley.generation.text_to_audio import resolve_device


@command("script/calibrate")
def main(cfg: DictConfig) -> None:
    prompts = read_prompts(Path(cfg.prompts))
    recorder = CalibrationRecorder(cfg.max_distance)
    published, device = instantiate(cfg.published), resolve_device(cfg.device)
    open_generator(cfg.ckpt, published, cfg.hub_dir, cfg.cache_dir, device).generate(
        [prompts[index] for index in evenly_spaced(len(prompts), cfg.num_prompts)],
        cfg.duration_seconds,
        guidance=instantiate(cfg.guidance, scale=cfg.guidance_scale),
        solver=cfg.solver.name,
        num_steps=cfg.steps,
        accelerator=recorder,
        batch_size=cfg.batch_size,
    )
    calibration = recorder.calibration()
    directory = Path(cfg.output_dir) if cfg.output_dir else calibration_directory(cfg.calibration_home)
    stem = calibration_stem(directory, calibration.signature.solver, cfg.steps)
    calibration.save(stem)
    plot_calibration(calibration, stem.with_name(stem.name + ".png"))
    get_logger(__name__).info("%d prompts: wrote %s, .safetensors and .png", calibration.num_prompts, info_path(stem))


if __name__ == "__main__":
    sys.argv = name_model(sys.argv)
    main()
