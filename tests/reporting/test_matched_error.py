"""Caches of ours and of others at the same error."""

from typing import Any

import pytest

from foley.reporting.matched_error import match, speedup_at


def test_speedups_are_compared_at_the_same_error() -> None:
    def rows(of: str, cache: str, *points: tuple[float, float]) -> list[dict[str, Any]]:
        common = {"of": of, "cache": cache, "reuse": "hold"}
        return [{**common, "latent_error": error, "wall_speedup": speedup} for error, speedup in points]

    slow, fast = rows("foley", "slow", (0.1, 2.0), (0.3, 4.0)), rows("foley", "fast", (0.1, 3.0), (0.15, 2.0))
    speedups = [speedup_at(error, slow) for error in (0.0, 0.05, 0.2, 0.3, 0.4)]
    assert speedups == [1.0, 1.5, pytest.approx(3.0), 4.0, None]
    theirs = rows("diffusers", "theirs", (0.15, 1.5), (0.25, 7.0), (0.5, 8.0))
    near, far, beyond = match([*slow, *fast, *theirs])
    assert (near["ours"]["cache"], near["ours"]["wall_speedup"], near["ours_over_theirs"]) == ("fast", 3.0, 2.0)
    assert (far["ours"]["cache"], far["ours_over_theirs"]) == ("slow", pytest.approx(0.5))
    assert (beyond["ours"], beyond["ours_over_theirs"]) == (None, None)
