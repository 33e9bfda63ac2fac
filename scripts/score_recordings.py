"""How well the extractor recognises real recordings, label by label, and prompts for those labels.

The accuracies bound what can be asked of generated clips; the prompts ask for the same labels.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.files import write_json, write_text
from foley.core.logs import get_logger
from foley.data.audio import read_channels
from foley.data.manifest import ManifestEntry, read_manifest
from foley.metrics.evaluation import restricted_accuracy
from foley.metrics.features import ClipFile, extract_files
from foley.metrics.protocols import load_protocol
from foley.reporting.tables import provenance


def write_prompts(entries: Sequence[ManifestEntry], labels: Sequence[str], path: Path) -> None:
    """For each label the caption that most of its training clips have, as JSONL."""
    rows = []
    for label in labels:
        captions = Counter(entry.caption for entry in entries if (entry.label, entry.split) == (label, "train"))
        rows.append(json.dumps({"caption": captions.most_common(1)[0][0], "label": label}))
    write_text(path, "\n".join(rows) + "\n")


@command("script/score_recordings")
def main(cfg: DictConfig) -> None:
    """Write `recordings.json` and `prompts.jsonl`."""
    protocol, entries = load_protocol("embedded", Path(cfg.extractor_dir)), read_manifest(Path(cfg.manifest))
    extractor, output_dir = protocol.extractor, Path(cfg.output_dir)
    counts = Counter(entry.label for entry in entries)
    labels = [name for name in extractor.label_groups[cfg.group] if counts[name] >= cfg.minimum_clips]
    write_prompts(entries, labels, output_dir / "prompts.jsonl")
    heard = [entry for entry in entries if entry.split in cfg.splits]
    clips = [ClipFile(entry.path, entry.id, entry.label, entry.caption) for entry in heard]
    features = extract_files(clips, protocol, read_channels, None)
    groups = {"all": extractor.labels, **extractor.label_groups}
    found = {
        name: restricted_accuracy(features.logits, features.labels, extractor.labels, choices)
        for name, choices in groups.items()
    }
    result = {
        "protocol": protocol.describe(),
        "splits": list(cfg.splits),
        "labels": {name: counts[name] for name in labels},
        "accuracy": {name: asdict(accuracy) for name, accuracy in found.items() if accuracy is not None},
        "provenance": provenance(),
    }
    write_json(output_dir / "recordings.json", result)
    get_logger(__name__).info("%d recordings, prompts for %d labels: %s", len(clips), len(labels), output_dir)


if __name__ == "__main__":
    main()
