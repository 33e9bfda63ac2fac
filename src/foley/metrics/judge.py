"""How good clips in memory are, under the protocol of the extractor that ships."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from foley.data.audio import read_channels
from foley.metrics.distances import frechet_distance
from foley.metrics.evaluation import restricted_accuracy
from foley.metrics.features import ClipFeatures, LabelledAudio, extract_audio, extract_files, scan_directory
from foley.metrics.protocols import EvaluationProtocol, load_protocol


@dataclass(frozen=True)
class FrechetAudioDistance:
    """FAD of clips in memory to a folder, as AudioLCM's Fig. 2 has it: Kilgour et al. 2019, of VGGish."""

    protocol: EvaluationProtocol
    reference: ClipFeatures

    @classmethod
    def load(cls, weights_dir: Path, reference: str | Path) -> "FrechetAudioDistance":
        """With VGGish's weights in `weights_dir`; raises CheckpointError where they are absent."""
        return cls.under(load_protocol("vggish", weights_dir), reference)

    @classmethod
    def under(cls, protocol: EvaluationProtocol, reference: str | Path) -> "FrechetAudioDistance":
        """Under any protocol; raises FileNotFoundError where `reference` holds no audio."""
        return cls(protocol, extract_files(scan_directory(Path(reference)), protocol, read_channels, None))

    def score(self, audio: Tensor, sample_rate_hz: int) -> float:
        """Of `audio [N, channels, T]` at any rate."""
        found = extract_audio([LabelledAudio(clip) for clip in audio], self.protocol, sample_rate_hz)
        return frechet_distance(self.reference.features, found.features)


@dataclass(frozen=True)
class Judge:
    """Label accuracy among all labels that the extractor knows, and Frechet distance to a reference where there is one.

    The distance of a few hundred clips is biased upwards; compare it between sets of equal size alone.

    Example:
        >>> import torch
        >>> from foley.core.config import PROJECT_ROOT
        >>> judge = Judge.load(PROJECT_ROOT / "data" / "extractor")
        >>> hiss = 0.1 * torch.randn(2, 1, 48000)
        >>> judge.score(hiss, 24000, ["white noise", "white noise"])
        {'label_accuracy': 1.0, 'frechet_distance': None}
    """

    protocol: EvaluationProtocol
    reference: ClipFeatures | None = None

    @classmethod
    def load(cls, extractor_dir: Path, reference: str | Path | None = None) -> "Judge":
        """With the audio files in `reference`; raises ProtocolError, or FileNotFoundError where it holds none."""
        protocol = load_protocol("embedded", extractor_dir)
        if reference is None:
            return cls(protocol)
        return cls(protocol, FrechetAudioDistance.under(protocol, reference).reference)

    def score(self, audio: Tensor, sample_rate_hz: int, labels: Sequence[str | None]) -> dict[str, float | None]:
        """Scores of `audio [N, 1, T]`; None for what cannot be had: another rate, no known label, no reference."""
        if sample_rate_hz != self.protocol.sample_rate_hz:
            return {"label_accuracy": None, "frechet_distance": None}
        clips = [LabelledAudio(clip[0], label) for clip, label in zip(audio, labels, strict=True)]
        features, known = extract_audio(clips, self.protocol), self.protocol.extractor.labels
        accuracy = restricted_accuracy(features.logits, labels, known, known)
        distance = None if self.reference is None else frechet_distance(self.reference.features, features.features)
        return {"label_accuracy": None if accuracy is None else accuracy.accuracy, "frechet_distance": distance}
