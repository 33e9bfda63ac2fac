"""Score generated clips: `python evaluate.py samples=FOLDER reference=FOLDER_OR_MANIFEST protocol=[panns,clap]`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command

if TYPE_CHECKING:
    from foley.core.sharding import Shard
    from foley.metrics.features import ClipFile


def read_sets(cfg: DictConfig) -> tuple[list["ClipFile"], list["ClipFile"], list[Any]]:
    """Samples, references, and the parts of the protocols."""
    from foley.data.manifest import ManifestOptions
    from foley.metrics.features import scan_directory
    from foley.metrics.references import crop_length, of_labels, read_clips

    reference = read_clips(cfg.reference, cfg.split, cfg.audio_dir, ManifestOptions.of(cfg), cfg.val_fraction)
    samples = scan_directory(Path(cfg.samples))
    reference = of_labels(reference, samples) if cfg.same_labels else reference
    crop = crop_length(cfg.crop_seconds, samples, reference)
    parts = [part for protocol in cfg.protocol.values() for part in instantiate(protocol)]
    return samples, reference, [replace(part, crop_seconds=crop) for part in parts]


def reading(cfg: DictConfig) -> tuple[Any, Path]:
    """What reads a file, and where features are kept."""
    from foley.data.audio import read_channels

    return partial(read_channels, downmix=cfg.downmix), Path(cfg.cache_dir) / (cfg.downmix or "")


def extract(cfg: DictConfig, shard: "Shard") -> None:
    """The features of a shard of both sets, into the cache; where nothing is shared out `evaluate` does it itself."""
    from foley.metrics.features import keep_features

    if shard.count > 1:
        samples, reference, protocols = read_sets(cfg)
        for protocol in protocols:
            keep_features([*shard.of(samples), *shard.of(reference)], protocol, *reading(cfg))


def evaluate(cfg: DictConfig) -> None:
    """Write `evaluation.json` and `evaluation.md`, show the scores, and log them where a logger is chosen."""
    from foley.core.remote import local_folder
    from foley.data.procedural import CLASS_NAMES, captions_for
    from foley.metrics.audit import AuditLimits, audit_files
    from foley.metrics.evaluation import evaluate_files
    from foley.reporting.scores import flat_scores, show, write_report

    samples, reference, protocols = read_sets(cfg)
    captions = [(caption, name) for name in CLASS_NAMES for caption in captions_for(name)]
    load, features_dir = reading(cfg)
    settings = (load, cfg.pairing, features_dir, captions, CLASS_NAMES, cfg.resamples)
    score = partial(evaluate_files, max_faulty_share=cfg.max_faulty_share)
    evaluations = [score(samples, reference, protocol, *settings) for protocol in protocols]
    if cfg.audit:
        heard = audit_files([clip.path for clip in samples], AuditLimits.shipped()).summary()
        evaluations = [replace(evaluation, audit=heard) for evaluation in evaluations]
    with local_folder(cfg.output_dir) as folder:
        write_report(evaluations, folder)
    for evaluation in evaluations:
        show(evaluation)
    for logger in instantiate(cfg.get("logger") or {}).values():
        logger.log_metrics(flat_scores(evaluations))
        logger.finalize("success")


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Extract the features of both sets, and score them."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.cli.launching import run_shards

    run_shards(cfg, extract, evaluate)


if __name__ == "__main__":
    main()
