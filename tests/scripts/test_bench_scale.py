"""The benchmark of growth, small: every row is measured at two sizes, and what fails or takes too long is said."""

import json
import mmap
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import run_command

from foley.core.config import PROJECT_ROOT


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT_ROOT / "scripts" / "bench"))
    import scale

    yield scale
    sys.modules.pop("scale")


@pytest.mark.slow
@pytest.mark.parametrize("only", [["manifest: parse", "buckets"], []], ids=["some", "all"])
def test_rows_are_measured_and_the_page_written(scale, only: list[str], tmp_path: Path) -> None:
    shutil.copytree(PROJECT_ROOT / "docs" / "results" / "templates", tmp_path / "templates")
    chosen = {name: row for name, row in scale.ROWS.items() if not only or name.startswith(tuple(only))}
    words = "[" + ",".join(f"'{name}'" for name in only) + "]" if only else "null"
    run_command("bench/scale", "sizes=[300,900]", f"only={words}", f"page={tmp_path / 'scale.md'}")
    result = json.loads((tmp_path / "scale" / "scale.json").read_text())
    sizes = {row["row"]: [cost["size"] for cost in row["costs"]] for row in result["rows"]}
    asked = {name: [300 // row.fewer, 900 // row.fewer] for name, row in chosen.items()}
    assert sizes == {name: [size for size in asked[name] if size >= row.smallest] for name, row in chosen.items()}
    assert not [row["row"] for row in result["rows"] if any("failed" in cost for cost in row["costs"])]
    assert result["plan"]["clips"] == 1_800_000
    page = (tmp_path / "scale.md").read_text()
    assert "| manifest: parse | 300 |" in page
    assert "874,760,256\nparameters" in page

    run_command("bench/scale", "sizes=[400]", "only=[buckets]", f"page={tmp_path / 'scale.md'}")
    again = json.loads((tmp_path / "scale" / "scale.json").read_text())
    assert {row["row"]: [cost["size"] for cost in row["costs"]] for row in again["rows"]} == {
        **sizes,
        "buckets of similar length": [400],
    }


def test_what_fails_or_takes_too_long_gives_nothing(scale) -> None:
    def breaks() -> None:
        raise SystemExit(3)

    assert scale.apart(10.0, lambda: 7) == 7
    assert scale.apart(10.0, breaks) is None
    assert scale.apart(0.2, time.sleep, 30) is None


@pytest.mark.slow
def test_memory_is_what_is_kept_and_what_was_needed(scale, tmp_path) -> None:
    def filled(size: int) -> mmap.mmap:
        # Of the kernel itself: libraries in this process may have told the allocator to keep what is freed.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(memory, dtype=np.uint8)[:] = 1
        return memory

    def work(size: int, folder: Path) -> mmap.mmap:
        filled(4 * size).close()
        return filled(size)

    cost = scale.apart(60.0, scale.measure, work, 64 << 20, tmp_path)
    assert 62 < cost["private_mib"] < 72
    assert cost["peak_mib"] > 240


@pytest.mark.slow
def test_the_plan_of_a_data_set_follows_from_what_was_measured(tmp_path: Path) -> None:
    results = PROJECT_ROOT / "docs" / "results"
    shutil.copytree(results / "templates", tmp_path / "templates")
    shutil.copytree(results / "scale", tmp_path / "scale")
    run_command("bench/data_plan", "clips=1000000", "readings=1", f"page={tmp_path / 'scale.md'}")
    stages = {row["command"]: row for row in json.loads((tmp_path / "scale/data_plan.json").read_text())["stages"]}
    assert stages["encode"]["gigabytes"] == 256.0  # 2 * 128 channels * 500 frames, two bytes each
    assert stages["caption"]["flops"] == 2 * 8.2e9 * 290
    assert stages["encode-text"]["flops"] == 2 * 24 * (4 * 2048**2 + 3 * 2048 * 5120) * 25
    assert stages["encode"]["gpu_hours"] == pytest.approx(stages["encode"]["flops"] * 1e6 / (0.15 * 312e12) / 3600)
    assert "latents, mean and deviation" in (tmp_path / "scale.md").read_text()
