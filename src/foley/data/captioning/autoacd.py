"""Auto-ACD's captions for clips of AudioSet and VGGSound that are here already."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foley.core.hashing import hash_file
from foley.core.logs import get_logger
from foley.data.annotating import Fault, ManifestRow
from foley.data.captioning.answers import captioned
from foley.data.importers.youtube import autoacd_caption, autoacd_key
from foley.data.tables import csv_rows

_log = get_logger(__name__)
_MAX_LISTED = 20
_MODEL = "Auto-ACD (Sun et al. 2024)"


class AutoAcdCaptioner:
    """Looks up the captions of rows that `scripts/prepare.py` made, by `youtube_id` and `start_seconds`.

    Keys with a start are VGGSound's and name one clip; those without are AudioSet's, of whose videos there is one
    clip each. All captions stay in memory, about half a gigabyte.

    Args:
        annotations: train.csv and test.csv.
    """

    key_fields = ("id",)

    def __init__(self, annotations: Sequence[str]) -> None:
        paths = [Path(path) for path in annotations]
        self._captions: dict[tuple[str, int | None], str] = {}
        for path in paths:
            if wrong := self._read(path):
                listed = "\n  ".join(wrong[:_MAX_LISTED])
                _log.warning("%s: %d rows cannot be read and are left out:\n  %s", path, len(wrong), listed)
        digest = ",".join(hash_file(path) for path in paths)
        self.identity = {"source": "autoacd", "model": _MODEL, "annotations_sha256": digest}

    def start(self, world_size: int, device: torch.device) -> None:
        """Nothing to start."""

    def annotate(self, rows: Sequence[ManifestRow]) -> list[dict[str, Any] | Fault]:
        """The caption of each row, if there is one."""
        return [self._caption(row) for row in rows]

    def _read(self, path: Path) -> list[str]:
        """Keep the captions of a file; returns what is wrong, with line numbers."""
        wrong = []
        for line, cells in csv_rows(path, ("youtube_id", "caption")):
            try:
                if isinstance(cells, str):
                    raise ValueError(cells)
                youtube_id, start = autoacd_key(cells["youtube_id"])
                self._captions[youtube_id, None if start is None else int(start)] = cells["caption"]
            except ValueError as error:
                wrong.append(f"line {line}: {error}")
        return wrong

    def _caption(self, row: ManifestRow) -> dict[str, Any] | Fault:
        youtube_id, start = row.get("youtube_id"), row.get("start_seconds")
        if not isinstance(youtube_id, str) or not isinstance(start, int | float) or not math.isfinite(start):
            return Fault("the row has no `youtube_id` and `start_seconds`")
        of_audioset = (
            None if str(row.get("source", "")).startswith("VGGSound") else self._captions.get((youtube_id, None))
        )
        caption = self._captions.get((youtube_id, int(start)), of_audioset)
        if not caption or not caption.strip():
            return Fault(f"Auto-ACD has no caption of {youtube_id} at {start:g} s")
        return captioned(autoacd_caption(caption), self.identity)
