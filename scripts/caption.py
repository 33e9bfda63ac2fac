"""Caption the clips of a manifest: Qwen2-Audio, a chat endpoint, or Auto-ACD; or structure the captions they have.

python scripts/caption.py captioner=qwen2_audio manifest=FILE audio_dir=FOLDER out=FOLDER trainer=gpu
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from foley.cli.command import command
from foley.core.logs import get_logger
from foley.data.annotating import AnnotationError, ManifestRow, annotate, pending_rows
from foley.data.captioning.answers import write_captioned_manifest
from foley.data.captioning.chat import ChatCaptioner
from foley.data.manifest import ManifestOptions

_log = get_logger(__name__)


def check_cost(captioner: ChatCaptioner, cfg: DictConfig) -> None:
    """Say what the run will cost; raises AnnotationError where it is more than `max_cost_usd`."""

    def rows() -> Iterator[ManifestRow]:
        options = ManifestOptions.of(cfg)
        pending = pending_rows(Path(cfg.manifest), Path(cfg.out), captioner.key_fields, options=options)
        return (row for _, row in pending if not isinstance(row, str))

    estimate = captioner.estimate(rows())
    tokens = (estimate.prompt_tokens, estimate.completion_tokens)
    _log.info("%d requests: about %d tokens to read, %d to write, $%.2f", estimate.requests, *tokens, estimate.usd)
    if cfg.max_cost_usd is not None and estimate.usd > cfg.max_cost_usd:
        raise AnnotationError(f"estimated at ${estimate.usd:.2f}, more than max_cost_usd={cfg.max_cost_usd}")


@rank_zero_only
def finish(cfg: DictConfig) -> None:
    """Write the manifest and say how many clips are in it."""
    path, written = write_captioned_manifest(Path(cfg.manifest), Path(cfg.out), ManifestOptions.of(cfg))
    _log.info("%s: %d captioned clips; what failed is in %s/faults-rank*.jsonl", path, written, cfg.out)


@command("script/caption")
def main(cfg: DictConfig) -> None:
    """Compose, estimate, caption, merge."""
    captioner: Any = instantiate(cfg.captioner, _convert_="all")
    if isinstance(captioner, ChatCaptioner):
        check_cost(captioner, cfg)
    if cfg.dry_run:
        return
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_model_summary=False)
    annotate(captioner, Path(cfg.manifest), Path(cfg.out), trainer, cfg.batch_size, ManifestOptions.of(cfg))
    finish(cfg)


if __name__ == "__main__":
    main()
