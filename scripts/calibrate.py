"""Record the change curves that AudioCache and SmoothCache need, and draw them.

python scripts/calibrate.py system=SYSTEM prompts=FILE solver=ddim steps=50 guidance_scale=3
python scripts/calibrate.py system=stable_audio_open prompts=FILE
python scripts/calibrate.py system=SYSTEM prompts=FILE num_prompts=5000 trainer=ddp
python scripts/calibrate.py system=SYSTEM prompts=FILE sensitivity=true

Stopped, the same command goes on with the batches that are missing.
"""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/calibrate")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.accel.caching.calibration import Calibration, calibration_directory, calibration_stem
    from foley.accel.caching.plots import plot_calibration
    from foley.cli.sampling import chosen_sampling
    from foley.core.devices import resolve_device
    from foley.core.files import info_path
    from foley.data.ordering import evenly_spaced
    from foley.generation.calibrating import CalibrationRun
    from foley.generation.clip_folder import launch_processes
    from foley.generation.pipeline_to_audio import open_generator
    from foley.generation.prompts import as_clips, read_prompts
    from foley.generation.settings import GenerationSettings

    prompts = read_prompts(Path(cfg.prompts))
    chosen = [prompts[index] for index in evenly_spaced(len(prompts), cfg.num_prompts)]
    settings = GenerationSettings(
        duration_seconds=cfg.duration_seconds, batch_size=cfg.batch_size, **chosen_sampling(cfg)
    )
    settings.warn_without_effect()
    processes = launch_processes(cfg.trainer)
    places = {"hub_dir": cfg.hub_dir, "cache_dir": cfg.cache_dir, "overrides": cfg.system_overrides}
    device = resolve_device(cfg.device) if cfg.trainer is None else processes.device
    generator = open_generator(cfg.system, device, **places)
    directory = Path(cfg.output_dir or calibration_directory(cfg.system, cfg.cache_dir))
    named = ("duration_seconds", "steps", "eta", "guidance_scale", "guidance_rescale", "batch_size", "max_distance")
    request = {name: cfg[name] for name in (*named, "whole_batch", "sensitivity")}
    request |= {"model_hash": generator.model_hash, "solver": cfg.solver.name, "prompts": chosen}
    run = CalibrationRun(directory, as_clips(chosen), request)

    def keep(calibration: Calibration) -> None:
        stem = calibration_stem(directory, calibration.signature.solver, calibration.signature.num_steps)
        calibration.save(stem)
        plot_calibration(calibration, stem.with_name(stem.name + ".png"))
        count, path = calibration.num_prompts, info_path(stem)
        get_logger(__name__).info("%d prompts: wrote %s, .safetensors and .png", count, path)

    recorded = cfg.max_distance, keep, cfg.whole_batch, cfg.sensitivity
    run.record(generator.denoise_clips, settings, processes, *recorded)


if __name__ == "__main__":
    main()
