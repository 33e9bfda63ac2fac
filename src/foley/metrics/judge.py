"""How good clips in memory are, under the protocol of the extractor that ships."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from foley.data.audio import read_channels
from foley.metrics.distances import frechet_distance
from foley.metrics.evaluation import restricted_accuracy
from foley.metrics.features import ClipFeatures, LabelledAudio, extract_audio, extract_files, scan_directory
from foley.metrics.protocols import EvaluationProtocol, load_protocol
from foley.metrics.references import read_clips
from foley.metrics.scores import Comparison, Estimate, frechet, kl, share

RESAMPLES = 1000
"""Sets drawn for an interval."""

QUALITIES = tuple(name + end for name in ("label_accuracy", "frechet_distance", "kl") for end in ("", "_low", "_high"))
"""What `Judge.assess` measures, and the ends of the intervals."""


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

    @classmethod
    def of_recordings(
        cls, extractor_dir: Path, reference: str | Path, split: str | None, labels: Collection[str | None]
    ) -> "Judge":
        """With the clips of a folder or manifest whose label is among `labels`, or that have none.

        Raises as `read_clips` does, and ValueError where none of them has such a label.
        """
        protocol = load_protocol("embedded", extractor_dir)
        clips = [clip for clip in read_clips(reference, split) if clip.label is None or clip.label in labels]
        if not clips:
            known = ", ".join(sorted(label for label in labels if label))
            raise ValueError(f"reference={reference}: no clip of it has one of the labels of the prompts ({known})")
        return cls(protocol, extract_files(clips, protocol, read_channels, None))

    def score(self, audio: Tensor, sample_rate_hz: int, labels: Sequence[str | None]) -> dict[str, float | None]:
        """Scores of `audio [N, 1, T]`; None for what cannot be had: another rate, no known label, no reference."""
        clips = self.clips(audio, sample_rate_hz, labels)
        if clips is None:
            return {"label_accuracy": None, "frechet_distance": None}
        distance = None if self.reference is None else frechet_distance(self.reference.features, clips.features)
        return {"label_accuracy": self._accuracy(clips), "frechet_distance": distance}

    def clips(self, audio: Tensor, sample_rate_hz: int, labels: Sequence[str | None]) -> ClipFeatures | None:
        """What the extractor says of `audio [N, 1, T]`; None for another rate than its own."""
        if sample_rate_hz != self.protocol.sample_rate_hz:
            return None
        named = [LabelledAudio(clip[0], label) for clip, label in zip(audio, labels, strict=True)]
        return extract_audio(named, self.protocol)

    def assess(self, clips: ClipFeatures) -> dict[str, float | None]:
        """As `score`, and the KL divergence of the mean class posteriors; each with the ends of its 95 % interval.

        They are named `kl_low` and `kl_high`: Wilson's of the label accuracy, of the others by bootstrap over the clips
        of both sets.
        """
        labelled = sum(label in self.protocol.extractor.labels for label in clips.labels)
        accuracy = self._accuracy(clips)
        found = {} if accuracy is None else {"label_accuracy": share(round(accuracy * labelled), labelled)}
        if self.reference is not None:
            extractor = self.protocol.extractor
            sets = Comparison(clips, self.reference, None, extractor, self.protocol.inception_splits, RESAMPLES)
            found |= frechet(sets) | {"kl": kl(sets)["kl_marginal"]}
        ends = {f"{name}{end}": value for name, score in found.items() for end, value in _ends(score).items()}
        return {name: ends.get(name) for name in QUALITIES}

    def _accuracy(self, clips: ClipFeatures) -> float | None:
        known = self.protocol.extractor.labels
        accuracy = restricted_accuracy(clips.logits, clips.labels, known, known)
        return None if accuracy is None else accuracy.accuracy


def _ends(score: Estimate) -> dict[str, float | None]:
    return {"": score.value, "_low": score.low, "_high": score.high}
