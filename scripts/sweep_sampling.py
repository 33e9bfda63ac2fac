"""What sampling costs and gives: a distance to real clips and the seconds, of one setting or, with -m, of many.

python scripts/sweep_sampling.py -m hparams_search=optuna_sampling prompts=FILE reference=FOLDER_OR_MANIFEST
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from foley.cli.command import command
from foley.cli.sampling import chosen_system, open_requested, requested_clips, requested_settings
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.data.audio import read_channels
from foley.data.manifest import ManifestOptions
from foley.data.ordering import evenly_spaced
from foley.generation.result import Generation
from foley.metrics.evaluation import SilentAudioError, evaluate_features
from foley.metrics.features import LabelledAudio, extract_audio, extract_files
from foley.metrics.references import read_clips
from foley.reporting.sweeps import TRIAL_FILE
from foley.reporting.tables import provenance

# Worse than any distance; infinity would be no JSON, and no volume that a search could compare.
_SILENT = 1e6


def generate(cfg: DictConfig) -> Generation:
    """Clips of evenly spread prompts, each with the seed that it has in sample.py; after one clip to warm up."""
    if cfg.trainer is not None:
        raise ValueError("a sweep shares out its trials, not a trial's prompts: leave trainer= out, or take launcher=")
    cfg.system = chosen_system(cfg)
    clips, settings = requested_clips(cfg), requested_settings(cfg)
    chosen = [clips[index] for index in evenly_spaced(len(clips), min(cfg.num_prompts, len(clips)))]
    generator = open_requested(cfg, settings)
    generator.generate_clips(chosen[:1], settings)
    return generator.generate_clips(chosen, settings)


def score(cfg: DictConfig, made: Generation) -> float:
    """The score of `made` against the reference; `_SILENT` where nothing can be heard."""
    protocol = instantiate(next(iter(cfg.protocol.values())))[0]
    real = read_clips(cfg.reference, audio_dir=cfg.audio_dir, options=ManifestOptions.of(cfg.columns))
    reference = extract_files(real, protocol, read_channels, Path(cfg.features_dir))
    clips = [LabelledAudio(*clip) for clip in zip(made.audio, [None] * len(made.clips), strict=True)]
    try:
        evaluation = evaluate_features(extract_audio(clips, protocol, made.sample_rate_hz), reference, protocol, "none")
    except SilentAudioError:
        return _SILENT
    return evaluation.value(cfg.score)


@command("script/sweep_sampling")
def main(cfg: DictConfig) -> tuple[float, float]:
    """Write `trial.json`, and hand a search its two objectives."""
    made = generate(cfg)
    seconds, distance = made.timings.total_seconds / len(made.clips), score(cfg, made)
    job = HydraConfig.get().job
    trial = {
        "number": 0 if OmegaConf.is_missing(job, "num") else job.num,
        "overrides": dict(override.split("=", 1) for override in HydraConfig.get().overrides.task),
        "score": cfg.score,
        cfg.score: distance,
        "seconds_per_clip": seconds,
        "clips": len(made.clips),
        **made.rtf.to_json(),
        "settings": made.settings,
        "provenance": provenance(),
    }
    write_json(Path(cfg.output_dir) / TRIAL_FILE, trial)
    get_logger(__name__).info("%s %.4f, %.4f seconds per clip", cfg.score, distance, seconds)
    return distance, seconds


if __name__ == "__main__":
    main()
