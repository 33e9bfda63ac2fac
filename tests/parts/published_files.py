"""Small weights in the layout that EzAudio's authors publish, out of the golden files."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

DENOISER, CODEC = "ezaudio_dit_tiny", "vae_tiny"


def read_published(shared: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under their published names, and the published config."""
    with safe_open(shared / "golden" / f"{name}.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith("weight.")]  # noqa: SIM118
        weights = {key.removeprefix("weight."): file.get_tensor(key) for key in keys}
        config: dict[str, Any] = json.loads(file.metadata()["config"])
    return weights, config
