"""Captions put in the place of a manifest's own, with where they come from."""

from pathlib import Path

from foley.data.annotating import read_results
from foley.data.json_lines import json_lines
from foley.data.manifest import checked_rows


def write_captioned_manifest(manifest: Path, output_dir: Path) -> tuple[Path, int]:
    """Write `output_dir/manifest.jsonl`: the rows of `manifest` that have a caption in `output_dir`, with it.

    Paths, licences and all other fields stay; `captioning` holds model, prompt hash, date and source. Rows without
    a caption are left out.

    Returns:
        The path and the number of rows.
    """
    captions = {result.pop("id"): result for result in read_results(output_dir)}
    written = 0
    path = output_dir / "manifest.jsonl"
    with json_lines(path) as write:
        for _, row in checked_rows(manifest):
            if isinstance(row, str) or row["id"] not in captions:
                continue
            made = {**captions[row["id"]]}
            write({**row, "caption": made.pop("caption"), "captioning": made})
            written += 1
    return path, written
