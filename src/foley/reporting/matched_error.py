"""Whose cache is faster where both are as far from the uncached latent: a setting of theirs against the lines of ours.

Caches have different parameters, so that no two settings have the same speed-up or error. Each cache is a line of
settings, and lines can be read in between. Rows name `of` (whose it is), `cache`, `reuse`, `wall_speedup`,
`latent_error`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from foley.reporting.fewer_steps import FEWER_STEPS
from foley.reporting.tables import Row


def speedup_at(error: float, rows: Sequence[Row]) -> float | None:
    """The speed-up of a cache at a latent error, on the straight lines between its settings and "none" (1x, no error).

    Where the lines turn back, the largest; None beyond the cache's largest error.
    """
    points = sorted((row["latent_error"], row["wall_speedup"]) for row in rows)
    if error > points[-1][0]:
        return None
    best = np.maximum.accumulate([1.0, *(speedup for _, speedup in points)])
    return float(np.interp(error, [0.0, *(error for error, _ in points)], best))


def match(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each setting of theirs, which of our caches is the fastest at its error, how fast, and fewer steps there."""
    matched: list[dict[str, Any]] = []
    steps = [row for row in rows if row["of"] == FEWER_STEPS]
    for theirs in (row for row in rows if row["of"] in ("diffusers", "cache-dit")):
        ours: list[dict[str, Any]] = [
            {"cache": cache, "reuse": reuse, "wall_speedup": speedup}
            for (cache, reuse), line in lines(rows, "foley").items()
            if (speedup := speedup_at(theirs["latent_error"], line)) is not None
        ]
        best = max(ours, key=lambda row: row["wall_speedup"], default=None)
        ratio = None if best is None else best["wall_speedup"] / theirs["wall_speedup"]
        fewer = speedup_at(theirs["latent_error"], steps) if steps else None
        matched.append({"theirs": theirs, "ours": best, "ours_over_theirs": ratio, "fewer_steps": fewer})
    return matched


def lines(rows: Sequence[Row], of: str) -> dict[tuple[str, str], list[Row]]:
    """The rows of each cache and kind of reuse."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["of"] == of:
            found.setdefault((row["cache"], row["reuse"]), []).append(row)
    return found
