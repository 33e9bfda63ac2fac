"""Callbacks that score samples and draw caching curves while a denoiser trains.

`SampleScores` logs as curves what evaluate.py measures once; `CachingCurves` shows how much each kind of layer changes
between evaluations as training goes on: what caching could save.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from foley.accel.caching.calibration import Calibration, CalibrationRecorder
from foley.accel.caching.plots import plot_calibration
from foley.core.logs import get_logger
from foley.data.audio import read_channels
from foley.data.manifest import ManifestOptions
from foley.data.ordering import evenly_spaced
from foley.metrics.evaluation import SilentAudioError, evaluate_features
from foley.metrics.features import ClipFeatures, LabelledAudio, extract_audio, extract_files
from foley.metrics.protocols import EvaluationProtocol
from foley.metrics.references import read_clips
from foley.reporting.scores import flat_scores
from foley.training.callbacks.listening import AudioSamples, takes_captions

_log = get_logger(__name__)


class SampleScores(AudioSamples):
    """Generates clips for captions of a reference manifest and logs `val/<protocol>/<score>`, without intervals.

    Clip i has the seed `seed + i` at every validation, so that curves do not carry the noise of new draws. Scores at a
    small n are biased: compare them within a run. Samples that are silent or not finite have no scores. The features of
    the reference are extracted as the run begins, by all processes together, into a folder that all can see.

    Args:
        reference: manifest of the reference clips.
        split: of the manifest; None takes all of it.
        max_clips: how many captions are generated, evenly spaced over the reference.
        protocol: name to the protocol's parts.
        cache_dir: keeps the reference's features between runs.
        audio_dir: where the manifest's clips lie; by default its own folder.
        columns: what the manifest calls its columns, as `ManifestOptions` takes them.
        val_fraction: of a manifest without splits, as `foley.data.splits.hold_out` takes it.
        generation: as of `AudioSamples`.
    """

    def __init__(
        self,
        reference: str,
        split: str | None,
        max_clips: int,
        protocol: Mapping[str, Sequence[EvaluationProtocol]],
        cache_dir: str,
        audio_dir: str | None = None,
        columns: Mapping[str, Any] | None = None,
        val_fraction: float = 0.0,
        **generation: Any,
    ) -> None:
        self.clips = read_clips(reference, split, audio_dir, ManifestOptions.of(columns or {}), val_fraction)
        self.chosen = [self.clips[index] for index in evenly_spaced(len(self.clips), max_clips)]
        self.parts = [part for parts in protocol.values() for part in parts]
        self.cache_dir = Path(cache_dir)
        self._known: dict[str, ClipFeatures] = {}
        super().__init__(output_dir=cache_dir, prompts=[clip.caption or "" for clip in self.chosen], **generation)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises FaultyClipsError where too many clips of the reference cannot be used."""
        super().on_fit_start(trainer, pl_module)
        if self.codec_path is None or not takes_captions(pl_module):
            return
        if trainer.world_size > 1:
            share = self.clips[trainer.global_rank :: trainer.world_size]
            for part in self.parts if share else ():
                extract_files(share, part, read_channels, self.cache_dir, max_faulty_share=1.0)
            trainer.strategy.barrier("features of the reference")
        if trainer.is_global_zero:
            for part in self.parts:
                self._reference(part)

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, audio: Tensor) -> None:
        clips = [
            LabelledAudio(samples, clip.label, clip.id, clip.caption)
            for samples, clip in zip(audio, self.chosen, strict=True)
        ]
        try:
            evaluations = [
                evaluate_features(extract_audio(clips, part, self._codec.sample_rate_hz), self._reference(part), part)
                for part in self.parts
            ]
        except SilentAudioError as error:
            _log.warning("step %d: no scores of samples: %s", trainer.global_step, error)
            return
        scores = {f"val/{name}": value for name, value in flat_scores(evaluations).items()}
        pl_module.log_dict(scores, rank_zero_only=True)

    def _reference(self, part: EvaluationProtocol) -> ClipFeatures:
        if part.name not in self._known:
            self._known[part.name] = extract_files(self.clips, part, read_channels, self.cache_dir)
        return self._known[part.name]


class CachingCurves(AudioSamples):
    """`AudioSamples` that also records the change curves of its own generation, as scripts/calibrate.py does.

    Of several processes, the curves are those of the first one's share of the prompts.

    Logs `caching/change_<kind>`, the relative-L1 change averaged over layers and evaluations, and draws
    `caching_curves.png` beside the samples, for W&B too as `caching/curves`.
    """

    def generate(self, module: Any, codec_path: Path, chosen: Sequence[int] | None = None) -> Tensor:
        self.accelerator = self._recorder = CalibrationRecorder(max_distance=1)
        return super().generate(module, codec_path, chosen)

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
