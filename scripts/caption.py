"""Caption the clips of a manifest: Qwen2-Audio, a chat endpoint, or Auto-ACD; or structure the captions they have.

python scripts/caption.py captioner=qwen2_audio manifest=FILE audio_dir=FOLDER out=FOLDER trainer=gpu
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from foley.cli.command import command
from foley.cli.launching import run_shards
from foley.core.logs import get_logger
from foley.core.remote import local_folder
from foley.core.sharding import Shard
from foley.data.annotating import AnnotationError, ManifestRow, annotate, pending_rows
from foley.data.captioning.answers import write_captioned_manifest
from foley.data.captioning.chat import ChatCaptioner
from foley.data.manifest import ManifestOptions

_log = get_logger(__name__)


def check_cost(captioner: ChatCaptioner, cfg: DictConfig) -> None:
    """Say what the run will cost; raises AnnotationError where it is more than `max_cost_usd`."""

    def rows(out: Path) -> Iterator[ManifestRow]:
        options = ManifestOptions.of(cfg)
        pending = pending_rows(Path(cfg.manifest), out, captioner.key_fields, options=options)
        return (row for _, row in pending if not isinstance(row, str))

    with local_folder(cfg.out) as out:
        estimate = captioner.estimate(rows(out))
    tokens = (estimate.prompt_tokens, estimate.completion_tokens)
    _log.info("%d requests: about %d tokens to read, %d to write, $%.2f", estimate.requests, *tokens, estimate.usd)
    if cfg.max_cost_usd is not None and estimate.usd > cfg.max_cost_usd:
        raise AnnotationError(f"estimated at ${estimate.usd:.2f}, more than max_cost_usd={cfg.max_cost_usd}")


def caption(cfg: DictConfig, shard: Shard) -> None:
    """A shard of the rows."""
    captioner: Any = instantiate(cfg.captioner, _convert_="all")
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_model_summary=False)
    with local_folder(cfg.out) as out:
        annotate(captioner, Path(cfg.manifest), out, trainer, cfg.batch_size, ManifestOptions.of(cfg), shard)
    trainer.strategy.barrier("published")


@rank_zero_only
def finish(cfg: DictConfig) -> None:
    """Write the manifest and say how many clips are in it."""
    with local_folder(cfg.out) as out:
        _, written = write_captioned_manifest(Path(cfg.manifest), out, ManifestOptions.of(cfg))
    place = f"{cfg.out}/manifest.jsonl"
    _log.info("%s: %d captioned clips; what failed is in %s/faults-rank*.jsonl", place, written, cfg.out)


@command("script/caption")
def main(cfg: DictConfig) -> None:
    """Compose, estimate, caption, merge."""
    kind = get_object(cfg.captioner._target_)
    if cfg.shard is None and isinstance(kind, type) and issubclass(kind, ChatCaptioner):
        check_cost(instantiate(cfg.captioner, _convert_="all"), cfg)
    if not cfg.dry_run:
        run_shards(cfg, caption, finish, "out")


if __name__ == "__main__":
    main()
