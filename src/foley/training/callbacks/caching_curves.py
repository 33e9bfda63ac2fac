"""How much each kind of layer changes between evaluations, as training goes on: what caching could save."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from foley.accel.calibration import Calibration
from foley.accel.plots import plot_calibration
from foley.accel.recorder import CalibrationRecorder
from foley.training.callbacks.audio_samples import AudioSamples


class CachingCurves(AudioSamples):
    """`AudioSamples` that also records the change curves of its own generation, as scripts/calibrate.py does.

    Logs `caching/change_<kind>`, the relative-L1 change averaged over layers and evaluations, and draws
    `caching_curves.png` beside the samples, for W&B too as `caching/curves`.
    """

    def generate(self, module: Any, codec_path: Path) -> Tensor:
        self.accelerator = self._recorder = CalibrationRecorder(max_distance=1)
        return super().generate(module, codec_path)

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, audio: Tensor) -> None:
        super()._publish(trainer, pl_module, audio)
        calibration = self._recorder.calibration()
        pl_module.log_dict(mean_changes(calibration), rank_zero_only=True)
        path = self.output_dir / f"step_{trainer.global_step:06d}" / "caching_curves.png"
        plot_calibration(calibration, path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("caching/curves", [str(path)], step=trainer.global_step)


def mean_changes(calibration: Calibration) -> dict[str, float]:
    """`caching/change_<kind>` of each kind of layer; the first evaluation follows none, and is left out."""
    kinds = calibration.layer_kinds
    rows = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    return {f"caching/change_{kind}": float(calibration.mean[own, 0, 1:].mean()) for kind, own in rows.items()}
