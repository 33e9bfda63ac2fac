"""Score generated clips: `python evaluate.py samples=FOLDER reference=FOLDER_OR_MANIFEST protocol=embedded`."""

from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

import foley.config  # noqa: F401  (registers resolvers)
from foley.data.audio_io import read_audio
from foley.data.manifest import read_manifest
from foley.data.procedural import CLASS_NAMES, captions_for
from foley.metrics.clips import ClipFile, scan_directory
from foley.metrics.evaluation import evaluate_files
from foley.metrics.protocols import load_protocol
from foley.metrics.report import show, write_report


def read_reference(path: Path, split: str | None) -> list[ClipFile]:
    """The clips of a folder, or of a manifest (one split of it, or all)."""
    if path.is_dir():
        return scan_directory(path)
    entries = (entry for entry in read_manifest(path) if split in (None, entry.split))
    return [ClipFile(entry.path, entry.id, entry.label or None, entry.caption) for entry in entries]


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Write `evaluation.json` and `evaluation.md`, and show the scores."""
    protocol = load_protocol(cfg.protocol, Path(cfg.extractor_dir), cfg.extractor_sha256)
    samples, reference = scan_directory(Path(cfg.samples)), read_reference(Path(cfg.reference), cfg.split)
    captions = [(caption, name) for name in CLASS_NAMES for caption in captions_for(name)]
    load, cache = partial(read_audio, sample_rate_hz=protocol.sample_rate_hz), Path(cfg.cache_dir)
    evaluation = evaluate_files(samples, reference, protocol, load, cfg.pairing, cache, captions, CLASS_NAMES)
    write_report(evaluation, Path(cfg.output_dir))
    show(evaluation)


if __name__ == "__main__":
    main()
