"""What any acceleration must beat: the same solver, uncached, with fewer steps.

A row of a benchmark says at which speed-up in MACs (`mac_speedup`) its latents lie how far from those of the uncached
run, from the same noise: over all clips together (`latent_error`), and for the median clip (`latent_error_median`),
which a few clips that end as another sound do not move. Rows of `FEWER_STEPS` are the yardstick of the others.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, log
from typing import Any

from foley.reporting.tables import Row

FEWER_STEPS = "fewer steps"
"""The policy of the rows that are the yardstick."""


ERROR_COLUMNS = {
    "latent error": "{latent_error:.4f}",
    "of the median clip?": "{latent_error_median:.4f}",
}
"""What a table of acceleration says of a row's error."""

AGAINST_COLUMNS = {
    "error over that of fewer steps?": "{error_ratio:.2f}",
    "that of the median clip?": "{error_ratio_median:.2f}",
    "beats fewer steps?": "{beats_fewer_steps}",
}
"""What a table of acceleration says beside a row's error."""

QUALITY_COLUMNS = {
    "label accuracy": "{label_accuracy:.1%}",
    "its 95 % interval?": "{label_accuracy_low:.1%} to {label_accuracy_high:.1%}",
    "Frechet distance?": "{frechet_distance:.1f}",
    "its interval?": "{frechet_distance_low:.1f} to {frechet_distance_high:.1f}",
    "KL?": "{kl:.3f}",
    "interval of KL?": "{kl_low:.3f} to {kl_high:.3f}",
}
"""What it says of quality against a reference."""


def error_of_fewer_steps(rows: Sequence[Row], speedup: float, error: str = "latent_error") -> float | None:
    """An error of fewer steps at a speed-up: its logarithm on straight lines between the step counts of `rows`.

    None outside of them: nothing is extrapolated.

    >>> rows = [{"policy": "fewer steps", "mac_speedup": s, "latent_error": e} for s, e in ((2.0, 0.04), (4.0, 0.16))]
    >>> round(error_of_fewer_steps(rows, 3.0), 6)  # the geometric mean
    0.08
    >>> error_of_fewer_steps(rows, 5.0) is None
    True
    """
    return _error_at([row for row in rows if row.get("policy") == FEWER_STEPS], speedup, error)


def _error_at(rows: Sequence[Row], speedup: float, error: str, measure: str = "mac_speedup") -> float | None:
    """A run that is the uncached one itself has an error of 0, which has no logarithm."""
    points = sorted((row[measure], row[error]) for row in rows if row.get(measure) is not None and row.get(error))
    for (low, low_error), (high, high_error) in pairwise(points):
        if low <= speedup <= high:
            share = (speedup - low) / (high - low) if high > low else 0.0
            return exp((1 - share) * log(low_error) + share * log(high_error))
    return None


def against_fewer_steps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, and in each but the yardstick's own what fewer steps do at its speed-up, as far as that is known.

    `fewer_steps_error`; `error_ratio` and `error_ratio_median`, the row's errors over theirs; `beats_fewer_steps`,
    "yes" or "no", by the first. They are None outside of the step counts that were measured, and where there are none.
    """
    return [dict(row) | (_compared(row, rows) if _is_compared(row) else {}) for row in rows]


def count_beating(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each policy and kind of reuse, how many settings beat fewer steps, of those that can be compared.

    >>> row = {"policy": "fora", "reuse": "hold"}
    >>> count_beating([row | {"beats_fewer_steps": "yes"}, row | {"beats_fewer_steps": "no"}])
    [{'policy': 'fora', 'reuse': 'hold', 'beat': 1, 'of': 2}]
    """
    groups: dict[tuple[str, str | None], list[str]] = {}
    for row in rows:
        if row.get("beats_fewer_steps") is not None:
            groups.setdefault((row["policy"], row.get("reuse")), []).append(row["beats_fewer_steps"])
    return [
        {"policy": policy, "reuse": reuse, "beat": found.count("yes"), "of": len(found)}
        for (policy, reuse), found in groups.items()
    ]


def undisturbed(results: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The results, with seconds, RTF and `wall_speedup` of the uncached run and all rows as on an idle machine.

    One thread of an idle processor takes the processor time of the uncached run, over the speed-up in processor time.
    Results that do not say the first had their uncached run alone on the machine. Those of another device are left.

    >>> settings = {"seconds_uncached": 12.0, "processor_seconds_uncached": 8.0, "real_time_factor_uncached": 3.0}
    >>> rows = [{"seconds": 9.0, "real_time_factor": 2.25, "processor_speedup": 2.0}]
    >>> undisturbed({"settings": settings, "rows": rows})["rows"]
    [{'seconds': 4.0, 'real_time_factor': 1.0, 'processor_speedup': 2.0, 'wall_speedup': 2.0}]
    """
    if not results or any(row.get("processor_speedup") is None for row in results["rows"]):
        return results
    settings = results["settings"]
    on_the_clock = settings["seconds_uncached"]
    seconds = settings.get("processor_seconds_uncached") or on_the_clock
    rtf = settings["real_time_factor_uncached"] * seconds / on_the_clock
    rows = [
        dict(row) | {"seconds": seconds / own, "real_time_factor": rtf / own, "wall_speedup": own}
        for row in results["rows"]
        for own in [row["processor_speedup"]]
    ]
    uncached = {"seconds_uncached": seconds, "real_time_factor_uncached": rtf}
    return {**results, "settings": {**settings, **uncached}, "rows": rows}


def prediction_aims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of prediction reuse, with `over_fora` and `over_fora_median`: their errors over those of FORA.

    `over_fora_timed` is the first at the speed-up in processor time instead of MACs: what layer caches keep and
    extrapolate costs time, but no MACs. Of FORA's extrapolations, the one whose error is the smaller; None where none
    was measured at such a speed-up.

    >>> fora = [{"policy": "fora", "reuse": "taylor", "mac_speedup": s, "latent_error": 0.04} for s in (2.0, 4.0)]
    >>> reuse = {"policy": "prediction", "mac_speedup": 3.0, "latent_error": 0.01}
    >>> round(prediction_aims([*fora, reuse])[0]["over_fora"], 3)
    0.25
    """
    kinds = {row.get("reuse") for row in rows if row["policy"] == "fora"} - {None, "hold"}
    fora = [[row for row in rows if (row["policy"], row.get("reuse")) == ("fora", kind)] for kind in kinds]
    return [
        dict(row)
        | {
            "over_fora": _over(row, fora, "latent_error"),
            "over_fora_median": _over(row, fora, "latent_error_median"),
            "over_fora_timed": _over(row, fora, "latent_error", "processor_speedup"),
        }
        for row in rows
        if row["policy"].startswith("prediction") and _is_known(row)
    ]


def _compared(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    fewer = error_of_fewer_steps(rows, row["mac_speedup"])
    median = error_of_fewer_steps(rows, row["mac_speedup"], "latent_error_median")
    ratio = _ratio(row["latent_error"], fewer)
    return {
        "fewer_steps_error": fewer,
        "error_ratio": ratio,
        "error_ratio_median": _ratio(row.get("latent_error_median"), median),
        "beats_fewer_steps": None if ratio is None else "yes" if ratio < 1 else "no",
    }


def _over(row: Row, lines: Sequence[Sequence[Row]], error: str, measure: str = "mac_speedup") -> float | None:
    """A row's error over the smallest that `lines` of settings have at its speed-up."""
    if row.get(measure) is None:
        return None
    errors = [found for line in lines if (found := _error_at(line, row[measure], error, measure)) is not None]
    return _ratio(row.get(error), min(errors, default=None))


def _ratio(error: float | None, other: float | None) -> float | None:
    return None if error is None or other is None else error / other


def _is_known(row: Row) -> bool:
    return row.get("mac_speedup") is not None and row.get("latent_error") is not None


def _is_compared(row: Row) -> bool:
    return row.get("policy") != FEWER_STEPS and _is_known(row)
