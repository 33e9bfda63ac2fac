"""The clips on which the embedded extractor is trained and tested: procedural sounds and real recordings."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchaudio.functional import lowpass_biquad

from foley.core.seeding import derive_seed, torch_generator
from foley.data.dataset import AudioItem, AudioSource, PeakLevel
from foley.data.manifest import ManifestEntry
from foley.data.procedural import CLASS_NAMES, ProceduralDataset
from foley.data.splits import ClipSource
from foley.metrics.evaluation import restricted_accuracy
from foley.metrics.features import LabelledAudio, extract_audio
from foley.metrics.protocols import EvaluationProtocol

PROCEDURAL = "procedural"


@dataclass(frozen=True)
class LabelSet:
    """Class names, one logit each, and the named groups that are reported apart."""

    labels: list[str]
    groups: dict[str, list[str]]


def build_labels(training: Sequence[ManifestEntry], minimum_clips: int) -> LabelSet:
    """The procedural classes and every real label with at least `minimum_clips` training clips.

    A group is the first folder of a clip's id. A real label that is also a procedural class is one class.
    """
    counts = Counter(entry.label for entry in training if entry.label)
    kept = {label for label, count in counts.items() if count >= minimum_clips}
    groups: dict[str, list[str]] = {PROCEDURAL: list(CLASS_NAMES)}
    for folder in sorted({group_of(entry) for entry in training}):
        own = {entry.label for entry in training if group_of(entry) == folder}
        if names := sorted(own & (kept | set(CLASS_NAMES))):
            groups[folder] = names
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    return LabelSet(labels, groups)


def group_of(entry: ManifestEntry) -> str:
    """The first folder of a clip's id: the collection that it belongs to."""
    return entry.id.split("/")[0]


def render_all(source: AudioSource) -> list[AudioItem]:
    """Every clip of `source`, in memory."""
    return [source.render(index, 0) for index in range(len(source))]


def procedural_clips(per_class: int, seed: int, duration_seconds: float, sample_rate_hz: int) -> list[AudioItem]:
    """`per_class` clips of every procedural class."""
    return render_all(ProceduralDataset(per_class * len(CLASS_NAMES), seed, duration_seconds, sample_rate_hz))


def real_clips(
    entries: Sequence[ManifestEntry], labels: Sequence[str], sample_rate_hz: int, max_seconds: float
) -> dict[str, list[AudioItem]]:
    """Clips with a known label, by group."""
    known = set(labels)
    groups: dict[str, list[ManifestEntry]] = {}
    for entry in entries:
        if entry.label in known:
            groups.setdefault(group_of(entry), []).append(entry)
    return {name: render_all(ClipSource(group, sample_rate_hz, max_seconds)) for name, group in groups.items()}


def load_splits(
    entries: Sequence[ManifestEntry],
    labels: LabelSet,
    sample_rate_hz: int,
    max_seconds: float,
    seed: int,
    duration_seconds: float,
    per_class: Mapping[str, int],
) -> dict[str, dict[str, list[AudioItem]]]:
    """Clips by split and group; `per_class` is the number of procedural clips of each class in each split."""
    splits = {}
    for split, count in per_class.items():
        own_seed = derive_seed("extractor_clips", split, seed)
        groups = {PROCEDURAL: procedural_clips(count, own_seed, duration_seconds, sample_rate_hz)}
        real = [entry for entry in entries if entry.split == split]
        splits[split] = groups | real_clips(real, labels.labels, sample_rate_hz, max_seconds)
    return splits


@torch.no_grad()
def through_codec(codec: Any, items: Sequence[AudioItem]) -> list[AudioItem]:
    """The clips as the codec gives them back, levelled as its training clips were."""
    level = PeakLevel()
    restored = [codec.reconstruct(level(item.audio)[None, None])[0, 0].cpu() for item in items]
    return [replace(item, audio=audio, id=f"{item.id} (codec)") for item, audio in zip(items, restored, strict=True)]


def _noisy(audio: Tensor, snr_db: float) -> Tensor:
    noise = torch.randn(audio.shape, generator=torch_generator("extractor_test_noise", audio.numel()))
    return audio + noise * audio.square().mean().sqrt() * 10 ** (-snr_db / 20)


def robustness_conditions(sample_rate_hz: int) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Damage under which the accuracy is measured again."""
    return {
        "clean": lambda audio: audio,
        "gain_minus_20_db": lambda audio: audio * 0.1,
        "white_noise_snr_20_db": lambda audio: _noisy(audio, 20.0),
        "low_pass_6_khz": lambda audio: lowpass_biquad(audio, sample_rate_hz, 6000.0),
        "half_a_second_of_silence_in_front": lambda audio: nn.functional.pad(audio, (sample_rate_hz // 2, 0)),
    }


def accuracies(
    groups: Mapping[str, Sequence[AudioItem]], protocol: EvaluationProtocol, damage: Callable[[Tensor], Tensor]
) -> dict[str, dict[str, float]]:
    """Per group of clips, `accuracy` among all labels and `n`."""
    labels = list(protocol.extractor.labels)
    scores = {}
    for name, items in groups.items():
        clips = [LabelledAudio(damage(item.audio), item.label, item.id) for item in items]
        measured = restricted_accuracy(extract_audio(clips, protocol).logits, [c.label for c in clips], labels, labels)
        if measured is not None:
            scores[name] = {"accuracy": round(measured.accuracy, 4), "n": measured.n}
    return scores


def measure(splits: Mapping[str, Mapping[str, Sequence[AudioItem]]], protocol: EvaluationProtocol) -> dict[str, Any]:
    """Accuracies per split, condition and group, beside the protocol that they were measured under."""
    conditions = robustness_conditions(protocol.sample_rate_hz)
    scores = {
        split: {name: accuracies(groups, protocol, damage) for name, damage in conditions.items()}
        for split, groups in splits.items()
    }
    return {"protocol": protocol.describe(), "accuracy": scores}
