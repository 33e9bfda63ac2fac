"""What only shows at the published size."""

from pathlib import Path

import pytest
from gpu_parts import FULL, SMALL_DENOISER, Watch, read_cost, trained, trainer

_LARGEST_GIB = 80.0  # of a GPU that the recipe is for


@pytest.mark.gpu(proof=5)
def test_xl_trains_without_checkpointing(tmp_path: Path, record_property) -> None:
    """EzAudio-XL takes steps of 16 clips of 10 s without gradient checkpointing, within 80 GiB."""
    size = ["data.batch_size=16"] if FULL else [*SMALL_DENOISER, "data.batch_size=1", "data.duration_seconds=0.5"]
    steps = ["data=synthetic", "data.steps=4", "data.warmup_steps=2", "size.gradient_checkpointing=false"]
    precision = None if FULL else "32-true"
    trained(tmp_path, "experiment=ezaudio_xl", *steps, *size, *trainer("gpu", precision), synthetic=True)
    cost, losses = read_cost(tmp_path), Watch.last.losses
    assert losses
    assert cost["recomputed_flops"] == 0
    peak_gib = cost["peak_memory_bytes"] / 2**30
    record_property("peak", f"{peak_gib:.1f} GiB")
    record_property("step", f"{cost['step_seconds']:.3f} s")
    record_property("MFU", f"{cost['model_flops_utilisation']:.1%}")
    assert peak_gib < _LARGEST_GIB
