"""Render procedural clips to WAV files with a manifest: a reference for scores, and prompts that match it."""

import json
from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.files import write_text
from foley.core.locks import only_writer
from foley.core.logs import get_logger
from foley.data.audio import write_wav
from foley.data.procedural import CLASS_NAMES, ProceduralDataset


def _render(clips: ProceduralDataset, index: int, directory: Path) -> dict[str, str]:
    """Write clip `index`; returns its row of the manifest."""
    item = clips.render(index)
    path = f"{item.id}.wav"
    write_wav(directory / path, item.audio, clips.sample_rate_hz)
    return {"id": item.id, "path": path, "caption": item.caption, "label": item.label, "split": "test"}


@command("script/render_procedural")
def main(cfg: DictConfig) -> None:
    """Write `per_class` clips of every class and `manifest.jsonl`."""
    directory = Path(cfg.output_dir)
    clips = ProceduralDataset(
        cfg.per_class * len(CLASS_NAMES), cfg.seed, cfg.duration_seconds, sample_rate_hz=cfg.sample_rate_hz
    )
    with only_writer(directory, "clips"):
        rows = [json.dumps(_render(clips, index, directory), ensure_ascii=False) for index in range(len(clips))]
        write_text(directory / "manifest.jsonl", "\n".join(rows) + "\n")
    get_logger(__name__).info("%d clips: %s", len(rows), directory / "manifest.jsonl")


if __name__ == "__main__":
    main()
