"""Score how well each caption of a manifest fits its clip, and keep those that fit.

python scripts/filter_clap.py manifest=FILE audio_dir=FOLDER out=FOLDER threshold=0.40
"""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from foley.cli.command import command
from foley.cli.launching import run_shards
from foley.core.logs import get_logger
from foley.core.remote import local_folder
from foley.core.sharding import Shard
from foley.data.annotating import AnnotationError, annotate
from foley.data.clap_filter import keep_by_threshold
from foley.data.manifest import ManifestOptions
from foley.reporting.plots import draw_histogram

_log = get_logger(__name__)


def score(cfg: DictConfig, shard: Shard) -> None:
    """A shard of the rows."""
    scorer = instantiate(cfg.scorer, _convert_="all")
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_model_summary=False)
    with local_folder(cfg.out) as out:
        annotate(scorer, Path(cfg.manifest), out, trainer, cfg.batch_size, ManifestOptions.of(cfg), shard)
    trainer.strategy.barrier("published")


@rank_zero_only
def finish(cfg: DictConfig) -> None:
    """Write what is kept, draw the histogram and print the counts."""
    limits, options = list(cfg.reported_thresholds), ManifestOptions.of(cfg)
    with local_folder(cfg.out) as out:
        filtered = keep_by_threshold(Path(cfg.manifest), out, cfg.threshold, limits, options)
        if not filtered.scores:
            raise AnnotationError(f"no clip could be scored: {cfg.out}/faults-rank*.jsonl says why")
        labels = {limit: f"{limit:.2f}: {count} kept" for limit, count in filtered.kept.items()}
        draw_histogram(out / "histogram.png", filtered.scores, "CLAP score", labels)
    _log.info("%d clips scored, %d could not be", len(filtered.scores), filtered.unscored)
    for limit, count in filtered.kept.items():
        _log.info("threshold %.2f keeps %d (%.1f %%)", limit, count, 100 * count / len(filtered.scores))


@command("script/filter_clap")
def main(cfg: DictConfig) -> None:
    """Compose, score, keep."""
    run_shards(cfg, score, finish, "out")


if __name__ == "__main__":
    main()
