"""Keep the clips whose caption fits: CLAP's cosine of sound and text, as EzAudio filters synthetic captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from foley.core.captions import plain_caption
from foley.core.channels import check_downmix
from foley.core.files import json_lines, write_json
from foley.core.hashing import hash_file
from foley.data.annotating import Fault, ManifestRow, read_results
from foley.data.audio import AudioError, FloatArray, read_audio
from foley.data.manifest import OUR_COLUMNS, ManifestOptions, checked_rows

SCORES_FILE, MANIFEST_FILE, SUMMARY_FILE = "scores.jsonl", "manifest.jsonl", "summary.json"


class Embedder(Protocol):
    """Unit embeddings `[B, D]` of mono clips `[T]` at `sample_rate_hz`, and of captions."""

    sample_rate_hz: int

    def audio(self, clips: Sequence[FloatArray]) -> Tensor: ...

    def text(self, captions: Sequence[str]) -> Tensor: ...


class ClapScorer:
    """An annotator whose results are scores in [-1, 1]; a changed caption is scored anew.

    Args:
        load: makes the embedder, given the name of a `device`.
        audio_dir: what paths of the manifest are relative to.
        name: of the model; scores of two models never mix in one folder.
        max_duration_seconds: of a longer clip only the beginning is heard.
        downmix: as `foley.data.audio.read_audio` takes it; ValueError for one that it does not know.
        backend, checkpoint: what else the model is loaded by, a part of its name; of the file, its content counts.
    """

    key_fields = ("id", "caption")

    def __init__(
        self,
        load: Callable[..., Embedder],
        audio_dir: str,
        name: str,
        max_duration_seconds: float = 30.0,
        downmix: str = "mean",
        backend: str = "transformers",
        checkpoint: str | None = None,
    ) -> None:
        self.identity = {"source": "clap", "model": name, "max_duration_seconds": str(max_duration_seconds)}
        # Earlier folders do not say what was the only way then.
        if check_downmix(downmix) != "mean":
            self.identity["downmix"] = downmix
        if backend != "transformers":
            self.identity["backend"] = backend
        if checkpoint is not None:
            self.identity["checkpoint"] = hash_file(Path(checkpoint))
        self._downmix = downmix
        self._load = load
        self._audio_dir = Path(audio_dir)
        self._max_duration_seconds = max_duration_seconds

    def start(self, world_size: int, device: torch.device) -> None:
        """Load the model onto this rank's device."""
        self._embedder = self._load(device=str(device))

    def annotate(self, rows: Sequence[ManifestRow]) -> list[dict[str, Any] | Fault]:
        """`clap_score` of each row; rows whose audio cannot be used are faults."""
        clips = [self._read(row) for row in rows]
        heard = [(row, clip) for row, clip in zip(rows, clips, strict=True) if not isinstance(clip, Fault)]
        scores = iter(self._scores(*zip(*heard, strict=True)) if heard else [])
        return [clip if isinstance(clip, Fault) else {"clap_score": next(scores)} for clip in clips]

    def _scores(self, rows: Sequence[ManifestRow], clips: Sequence[FloatArray]) -> list[float]:
        sounds = self._embedder.audio(clips)
        captions = self._embedder.text([plain_caption(row["caption"]) for row in rows])
        cosines: list[float] = (sounds * captions).sum(dim=-1).tolist()
        return cosines

    def _read(self, row: ManifestRow) -> FloatArray | Fault:
        if "captions" in row:
            return Fault(f"has {len(row['captions'])} captions: give each a row with an id of its own to score them")
        rate = self._embedder.sample_rate_hz
        try:
            path = self._audio_dir / row["path"]
            return read_audio(path, rate, self._max_duration_seconds, downmix=self._downmix)
        except AudioError as error:
            return Fault(str(error))


@dataclass(frozen=True)
class Filtered:
    """`scores` of all scored rows in the manifest's order; `kept` by threshold; rows without a score."""

    scores: list[float]
    kept: dict[float, int]
    unscored: int


def keep_by_threshold(
    manifest: Path,
    output_dir: Path,
    threshold: float,
    reported_thresholds: Sequence[float],
    options: ManifestOptions = OUR_COLUMNS,
) -> Filtered:
    """Write scores.jsonl (all), manifest.jsonl (rows that score `threshold` or more) and summary.json.

    Rows keep their fields, and get `clap_score`.
    """
    results = read_results(output_dir, ("id", "caption", "clap_score"))
    known = {(result["id"], result["caption"]): result["clap_score"] for result in results}
    scores: list[float] = []
    unscored = 0
    with json_lines(output_dir / SCORES_FILE) as write_score, json_lines(output_dir / MANIFEST_FILE) as keep:
        for _, row in checked_rows(manifest, options):
            if isinstance(row, str) or (score := known.get((row["id"], row["caption"]))) is None:
                unscored += 1
                continue
            scores.append(score)
            write_score({"id": row["id"], "clap_score": score, "caption": row["caption"]})
            if score >= threshold:
                keep({**row, "clap_score": score})
    thresholds = sorted({*reported_thresholds, threshold})
    kept = {limit: sum(score >= limit for score in scores) for limit in thresholds}
    counts = {"scored": len(scores), "unscored": unscored, "threshold": threshold}
    write_json(output_dir / SUMMARY_FILE, {**counts, "kept": {f"{limit:.2f}": n for limit, n in kept.items()}})
    return Filtered(scores, kept, unscored)
