"""Score generated clips: `python evaluate.py samples=FOLDER reference=FOLDER_OR_MANIFEST protocol=[panns,clap]`."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Write `evaluation.json` and `evaluation.md`, show the scores, and log them where a logger is chosen."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.data.audio import read_channels
    from foley.data.manifest import ManifestOptions
    from foley.data.procedural import CLASS_NAMES, captions_for
    from foley.metrics.evaluation import evaluate_files
    from foley.metrics.features import scan_directory
    from foley.metrics.references import crop_length, read_clips
    from foley.reporting.scores import flat_scores, show, write_report

    reference = read_clips(cfg.reference, cfg.split, cfg.audio_dir, ManifestOptions.of(cfg), cfg.val_fraction)
    samples = scan_directory(Path(cfg.samples))
    crop = crop_length(cfg.crop_seconds, samples, reference)
    parts = [part for protocol in cfg.protocol.values() for part in instantiate(protocol)]
    protocols = [replace(part, crop_seconds=crop) for part in parts]
    captions = [(caption, name) for name in CLASS_NAMES for caption in captions_for(name)]
    load, cache_dir = partial(read_channels, downmix=cfg.downmix), Path(cfg.cache_dir) / (cfg.downmix or "")
    settings = (load, cfg.pairing, cache_dir, captions, CLASS_NAMES, cfg.resamples)
    score = partial(evaluate_files, max_faulty_share=cfg.max_faulty_share)
    evaluations = [score(samples, reference, protocol, *settings) for protocol in protocols]
    write_report(evaluations, Path(cfg.output_dir))
    for evaluation in evaluations:
        show(evaluation)
    for logger in instantiate(cfg.get("logger") or {}).values():
        logger.log_metrics(flat_scores(evaluations))
        logger.finalize("success")


if __name__ == "__main__":
    main()
