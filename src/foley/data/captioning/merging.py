"""Captions put in the place of a manifest's own, with where they come from."""

import json
from pathlib import Path

from foley.checkpoint import atomic_write
from foley.data.annotating import read_results
from foley.data.manifest import json_rows


def write_captioned_manifest(manifest: Path, output_dir: Path) -> tuple[Path, int]:
    """Write `output_dir/manifest.jsonl`: the rows of `manifest` that have a caption in `output_dir`, with it.

    Paths, licences and all other fields stay; `captioning` holds model, prompt hash, date and source. Rows without
    a caption are left out.

    Returns:
        The path and the number of rows.
    """
    captions = {result.pop("id"): result for result in read_results(output_dir)}
    written = 0

    def write(temporary: Path) -> None:
        nonlocal written
        with temporary.open("w", encoding="utf-8") as stream:
            for _, row in json_rows(manifest):
                if isinstance(row, str) or (key := str(row.get("id") or row.get("path")).strip()) not in captions:
                    continue
                made = {**captions[key]}
                stream.write(json.dumps({**row, "caption": made.pop("caption"), "captioning": made}) + "\n")
                written += 1

    path = output_dir / "manifest.jsonl"
    atomic_write(path, write)
    return path, written
