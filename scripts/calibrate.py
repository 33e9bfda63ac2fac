"""Record the change curves that AudioCache and SmoothCache need, and draw them.

python scripts/calibrate.py system=SYSTEM prompts=FILE solver=ddim steps=50 guidance_scale=3
python scripts/calibrate.py system=stable_audio_open prompts=FILE
"""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/calibrate")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.accel.caching.calibration import CalibrationRecorder, calibration_directory, calibration_stem
    from foley.accel.caching.plots import plot_calibration
    from foley.cli.sampling import chosen_sampling
    from foley.core.devices import resolve_device
    from foley.core.files import info_path
    from foley.data.ordering import evenly_spaced
    from foley.generation.pipeline_to_audio import open_generator
    from foley.generation.prompts import read_prompts

    prompts = read_prompts(Path(cfg.prompts))
    recorder = CalibrationRecorder(cfg.max_distance)
    places = {"hub_dir": cfg.hub_dir, "cache_dir": cfg.cache_dir, "overrides": cfg.system_overrides}
    open_generator(cfg.system, resolve_device(cfg.device), **places).generate(
        [prompts[index] for index in evenly_spaced(len(prompts), cfg.num_prompts)],
        cfg.duration_seconds,
        **chosen_sampling(cfg),
        accelerator=recorder,
        batch_size=cfg.batch_size,
    )
    calibration = recorder.calibration()
    directory = Path(cfg.output_dir or calibration_directory(cfg.system, cfg.cache_dir))
    stem = calibration_stem(directory, calibration.signature.solver, calibration.signature.num_steps)
    calibration.save(stem)
    plot_calibration(calibration, stem.with_name(stem.name + ".png"))
    get_logger(__name__).info("%d prompts: wrote %s, .safetensors and .png", calibration.num_prompts, info_path(stem))


if __name__ == "__main__":
    main()
