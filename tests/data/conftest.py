"""Small generated files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile


@pytest.fixture
def write_clip(tmp_path: Path) -> Callable[..., Path]:
    """Writes noise of a given length and rate into the test's folder."""

    def write(name: str, frames: int = 2400, rate: int = 24000, channels: int = 1, **options: str) -> Path:
        generator = np.random.default_rng(len(name))
        samples = generator.uniform(-0.5, 0.5, (frames, channels)).astype(np.float32)
        soundfile.write(tmp_path / name, samples, rate, **options)
        return tmp_path / name

    return write


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as a manifest into the test's folder."""

    def write(*rows: dict[str, object], name: str = "clips.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
