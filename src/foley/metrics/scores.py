"""The scores of a protocol: class posteriors, confidence intervals, and the table of what a protocol may ask for.

Intervals are by bootstrap over clips (Efron 1979): how far a score would move with other clips. Clips are drawn with
replacement, and what a clip gives (its windows, its pair) is drawn with it. A draw is a row of counts `[R, N]`, how
often each clip is in it, and the first row is all ones: the score of row 0 is the score itself.

Scores that are sums over clips or pairs are computed of every draw. Distances of fitted Gaussians are made linear in
the counts, by their derivative at the set itself (the infinitesimal jackknife, Efron 1982, ch. 6): to fit every draw
anew takes minutes, and gives intervals that are too wide where clips are few for the features, as a draw holds but 63 %
of them (docs/results/metrics.md).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from statistics import NormalDist

import torch
from torch import Tensor

from foley.core.captions import plain_caption
from foley.core.logs import get_logger
from foley.core.numbers import NumberRange
from foley.core.seeding import numpy_generator, torch_generator
from foley.metrics.distances import (
    FEWEST_CLIPS,
    MOST_PARTS,
    GaussianRoot,
    Slopes,
    dealt_parts,
    frechet_slopes,
    kernel_audio_distance,
    singular_set,
)
from foley.metrics.extractors import CaptionExtractor, Extractor
from foley.metrics.features import ClipFeatures
from foley.metrics.protocols import HIGHEST_SIMILARITY

KL_EPSILON = 1e-6  # AudioLDM-eval's, in the denominator
CONFIDENCE = 0.95

_log = get_logger(__name__)


# Class posteriors.


def divergence(reference: Tensor, generated: Tensor) -> Tensor:
    """`sum_c p log(p / (q + eps))` per row of posteriors, with `0 log 0 = 0`; in nats.

    Of independent (sigmoid) posteriors these are the positive terms only, as AudioLDM-eval sums them. Raises ValueError
    where the shapes differ.
    """
    if reference.shape != generated.shape:
        raise ValueError(
            f"paired KL needs one reference per generated clip, got posteriors of shape {tuple(reference.shape)} "
            f"and {tuple(generated.shape)}"
        )
    return (torch.xlogy(reference, reference) - reference * (generated + KL_EPSILON).log()).sum(dim=-1)


def kl_softmax(reference_logits: Tensor, generated_logits: Tensor) -> Tensor:
    """KL(reference || generated) `[N]` of paired class posteriors from logits `[N, K]` (AudioLDM-eval).

    >>> kl_softmax(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]]))
    tensor([1.4225], dtype=torch.float64)
    """
    return divergence(reference_logits.double().softmax(-1), generated_logits.double().softmax(-1))


def kl_sigmoid(reference_logits: Tensor, generated_logits: Tensor) -> Tensor:
    """As `kl_softmax` with independent sigmoid activations."""
    return divergence(reference_logits.double().sigmoid(), generated_logits.double().sigmoid())


def kl_marginal(reference_logits: Tensor, generated_logits: Tensor, counts: Sequence[Tensor]) -> Tensor:
    """KL(reference || generated) `[R]` of the mean class posteriors of two unpaired sets `[N, K]` and `[M, K]`.

    Args:
        counts: how often each row counts in each of R sets, `[R, N]` and `[R, M]`.
    """
    means = [
        (own @ logits.double().softmax(-1)) / own.sum(dim=1, keepdim=True)
        for own, logits in zip(counts, (reference_logits, generated_logits), strict=True)
    ]
    return divergence(means[0], means[1])


def inception_scores(logits: Tensor, splits: int = 1, counts: Tensor | None = None) -> Tensor:
    """`exp(E KL(p(y|x) || p(y)))` (Salimans et al. 2016) `[R, splits]`, over parts of a fixed shuffle of `[N, K]`.

    Args:
        counts: how often each row counts in each of R sets, `[R, N]`; None: once, R = 1.
    Raises ValueError where there are fewer rows than splits.
    """
    n = len(logits)
    if not 1 <= splits <= n:
        raise ValueError(f"inception score over {splits} splits needs at least that many clips, got {n}")
    weights = torch.ones(1, n).double() if counts is None else counts
    posteriors = logits.double().softmax(-1)
    order = torch.randperm(n, generator=torch_generator("inception_score", n))
    scores = []
    for rows in order.tensor_split(splits):
        total = weights[:, rows].sum(dim=1, keepdim=True).clamp_min(1)  # [R, 1]
        marginal = weights[:, rows] @ posteriors[rows] / total  # p(y), [R, K]
        negative_entropy = torch.xlogy(posteriors[rows], posteriors[rows]).sum(dim=1)
        # E KL(p(y|x) || p(y)) = H(y) - E H(y|x)
        mean = (weights[:, rows] @ negative_entropy) / total[:, 0]  # [R]
        scores.append((mean - torch.xlogy(marginal, marginal).sum(dim=1)).exp())
    return torch.stack(scores, dim=1)


def label_accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of rows of `logits [N, K]` whose largest entry is at `targets [N]`; raises ValueError on an empty set."""
    if targets.numel() == 0:
        raise ValueError("label accuracy of an empty set is undefined; give at least one labelled clip")
    return float((logits.argmax(dim=-1) == targets).double().mean())


# Confidence intervals.


@dataclass(frozen=True)
class Estimate:
    """A score, its interval (None where nothing was drawn), and the n it was measured on, as text.

    `remark` says why the value is not to be trusted; empty where nothing is known against it.
    """

    value: float
    low: float | None
    high: float | None
    n: str
    remark: str = ""


def draw_counts(n: int, resamples: int, name: str) -> Tensor:
    """How often each of `n` clips is in each of the `resamples` sets `[1 + resamples, n]`; row 0 is all ones.

    The same name and sizes give the same draws; sets of other names are drawn independently. ValueError below 0.
    """
    NumberRange(least=0, whole=True).check("resamples", resamples)
    generator = numpy_generator("bootstrap", name, n)
    drawn = generator.multinomial(n, [1 / n] * n, size=resamples)
    return torch.cat([torch.ones(1, n), torch.from_numpy(drawn)]).double()


def estimate(values: Tensor, n: str, floor: float | None = None) -> Estimate:
    """The score in `values[0]` with the interval of the others, `values [1 + R]`.

    A distance of resampled sets is biased upwards, for they hold repeats: the bias of the distance itself, once more.
    The quantiles are therefore moved by the difference between their mean and the score, so that the interval says how
    the score scatters at this n. It says nothing of the bias that is left in the score. Draws without a value, as of
    one clip again and again where a score is of pairs of clips, take no part.

    Args:
        floor: the least value that the score can have.
    """
    value = float(values[0])
    drawn = values[1:][values[1:].isfinite()]
    if not len(drawn):
        return Estimate(value, None, None, n)
    tail = (1 - CONFIDENCE) / 2
    quantiles = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype))
    low, high = (quantiles - drawn.mean() + value).tolist()
    return Estimate(value, low if floor is None else max(low, floor), high, n)


def share(hits: int, n: int) -> Estimate:
    """The share of `hits` among `n`, with Wilson's interval (1927), which holds for a share of 1 too.

    >>> found = share(256, 256)
    >>> found.value, round(found.low, 3), found.high
    (1.0, 0.985, 1.0)
    """
    value, z = hits / n, NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle, spread = value + z**2 / (2 * n), z * sqrt(value * (1 - value) / n + (z / (2 * n)) ** 2)
    low, high = ((middle + side) / (1 + z**2 / n) for side in (-spread, spread))
    return Estimate(value, max(low, 0.0), min(high, 1.0), str(n))


# What a protocol may ask for.

Scores = dict[str, Estimate]


class TooFewClipsError(ValueError):
    """A set has fewer clips than the estimate `score` needs; the message says how many it needs."""

    def __init__(self, score: str, reason: str) -> None:
        super().__init__(f"{score}: {reason}")
        self.score, self.reason = score, reason


class CaptionError(ValueError):
    """CLAP scores were asked for, and clips lack captions or captions are all alike."""


@dataclass(frozen=True)
class Comparison:
    """Two sets to compare; `pairs` holds each generated clip's index in the reference, or None.

    Args:
        resamples: sets drawn for each interval; 0 leaves intervals out.
    """

    generated: ClipFeatures
    reference: ClipFeatures
    pairs: list[int] | None
    extractor: Extractor
    inception_splits: int
    resamples: int

    @property
    def sizes(self) -> str:
        """n of both sets, as text."""
        return f"{len(self.reference)} / {len(self.generated)}"

    @cached_property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Draws of reference clips and, independently, of generated ones."""
        return (
            draw_counts(len(self.reference), self.resamples, "reference"),
            draw_counts(len(self.generated), self.resamples, "generated"),
        )

    @cached_property
    def known(self) -> GaussianRoot:
        """The Gaussian of the reference."""
        return GaussianRoot.fit(self.reference.features)

    @cached_property
    def frechet(self) -> tuple[float, Slopes, Slopes]:
        """The Frechet distance of the features, and its slopes."""
        return frechet_slopes(self.known, GaussianRoot.fit(self.generated.features))

    def linear(self, value: float, reference: Tensor, generated: Tensor) -> Tensor:
        """A distance of every draw `[1 + resamples]`, by its derivatives by the features' counts `[M]` of both sets."""
        moved = (self.counts[0] - 1) @ _of_clips(reference, self.reference)
        return value + moved + (self.counts[1] - 1) @ _of_clips(generated, self.generated)


def _of_windows(counts: Tensor, clips: ClipFeatures) -> Tensor:
    """Counts of clips `[R, N]` as counts of their features `[R, M]`."""
    return counts.repeat_interleave(clips.windows, dim=1)


def _of_clips(values: Tensor, clips: ClipFeatures) -> Tensor:
    """Values of features `[M]` summed over those of each clip `[N]`."""
    return torch.zeros(len(clips), dtype=values.dtype).index_add_(0, _owners(clips), values)


def _owners(clips: ClipFeatures) -> Tensor:
    """The clip of each feature `[M]`."""
    return torch.arange(len(clips)).repeat_interleave(clips.windows)


def frechet(sets: Comparison) -> Scores:
    """Frechet distance of the features; with VGGish it is FAD. Marked where a set's covariance is singular."""
    named = (("reference", sets.reference), ("generated", sets.generated))
    singular = [singular_set(name, *clips.features.shape) for name, clips in named]
    for remark in filter(None, singular):
        _log.warning("Frechet distance: %s", remark)
    value, reference, generated = sets.frechet
    slopes = reference.of(sets.reference.features), generated.of(sets.generated.features)
    found = estimate(sets.linear(value, *slopes), sets.sizes, floor=0.0)
    return {"frechet_distance": replace(found, remark="; ".join(filter(None, singular)))}


def frechet_infinity(sets: Comparison) -> Scores:
    """The distance extrapolated to infinitely many generated clips.

    Its bias is linear in 1/n where n is above the width D of the features, down to the smallest part, a quarter. Hence
    TooFewClipsError for a set of D vectors or fewer, or of fewer than `FEWEST_CLIPS` clips, and a mark on the estimate
    where a quarter has D vectors or fewer, or where it is negative.
    """
    vectors, width = sets.generated.features.shape
    if vectors <= width or len(sets.generated) < FEWEST_CLIPS:
        reason = (
            f"too few clips: {len(sets.generated)} with {vectors} feature vectors, and the extrapolation needs "
            f"{FEWEST_CLIPS} clips and more than the {width} vectors that a feature is wide"
        )
        raise TooFewClipsError("frechet_distance_infinity", reason)
    found = estimate(sets.linear(*_extrapolated(sets)), sets.sizes)
    return {"frechet_distance_infinity": replace(found, remark=_doubts(found.value, vectors, width))}


def _extrapolated(sets: Comparison) -> tuple[float, Tensor, Tensor]:
    """As `foley.metrics.distances.extrapolated_distance`, and its derivatives: weighted sums of those of parts."""
    clips, owners = sets.generated, _owners(sets.generated)
    value, reference, _ = sets.frechet  # the whole, whose weight is 1
    generated = torch.zeros(len(owners)).double()
    for weight, part in dealt_parts(torch.arange(len(clips))):
        rows = torch.isin(owners, part)
        whole = len(part) == len(clips)
        found = sets.frechet if whole else frechet_slopes(sets.known, GaussianRoot.fit(clips.features[rows]))
        generated[rows] += weight * found[2].of(clips.features[rows])
        if not whole:
            value += weight * found[0]
            reference = reference.plus(found[1], weight)
    return value, reference.of(sets.reference.features), generated


def _doubts(value: float, vectors: int, width: int) -> str:
    doubts = []
    if vectors // MOST_PARTS <= width:
        need = MOST_PARTS * (width + 1)
        doubts.append(f"too few clips: {vectors} feature vectors, and the fit is sound from {need} on")
    if value < 0:
        doubts.append("negative, which no distance is: too few clips to tell it from 0")
    return "; ".join(doubts)


def kad(sets: Comparison) -> Scores:
    """Kernel audio distance, unbiased at any n."""
    reference, generated = sets.counts
    counts = _of_windows(reference, sets.reference), _of_windows(generated, sets.generated)
    values = kernel_audio_distance(sets.reference.features, sets.generated.features, counts)
    return {"kernel_audio_distance": estimate(values, sets.sizes)}


def kl(sets: Comparison) -> Scores:
    """Divergence of class posteriors in both directions: of pairs where there are pairs, else of the sets' means."""
    if sets.pairs is None:
        return _unpaired_kl(sets)
    reference, generated = sets.reference.logits[sets.pairs], sets.generated.logits
    counts = sets.counts[1]
    found = {}
    for name, measure in (("kl_softmax", kl_softmax), ("kl_sigmoid", kl_sigmoid)):
        for suffix, first, second in (("", reference, generated), ("_reversed", generated, reference)):
            found[name + suffix] = estimate(counts @ measure(first, second) / counts.sum(dim=1), str(len(generated)))
    return found


def _unpaired_kl(sets: Comparison) -> Scores:
    logits, counts = (sets.reference.logits, sets.generated.logits), sets.counts
    forwards, backwards = kl_marginal(*logits, counts), kl_marginal(*logits[::-1], counts[::-1])
    return {
        "kl_marginal": estimate(forwards, sets.sizes, floor=0.0),
        "kl_marginal_reversed": estimate(backwards, sets.sizes, floor=0.0),
    }


def inception(sets: Comparison) -> Scores:
    """Inception score of the generated clips: the mean over splits, with fewer splits where there are too few clips."""
    n = len(sets.generated)
    splits, remark = min(sets.inception_splits, n), ""
    if splits < sets.inception_splits:
        remark = f"{splits} splits instead of {sets.inception_splits}, for there are {n} clips"
        _log.warning("inception score: %s", remark)
    counts = sets.counts[1]
    values = inception_scores(sets.generated.logits, splits, counts).mean(dim=1)
    return {"inception_score": replace(estimate(values, str(n), floor=1.0), remark=remark)}


def clap(sets: Comparison) -> Scores:
    """Mean cosine of clips and their captions, and, as a check, of clips and the next clip's caption.

    Raises CaptionError where a clip has no caption, or where it makes no difference whose caption it is.
    """
    captions = [caption for caption in sets.generated.captions if caption]
    if len(captions) < len(sets.generated):
        raise CaptionError(
            f"CLAP score: {len(sets.generated) - len(captions)} of {len(sets.generated)} generated clips have no "
            "caption; give each a sidecar JSON with its `prompt`"
        )
    if not isinstance(sets.extractor, CaptionExtractor):
        raise CaptionError(f"CLAP score: {type(sets.extractor).__name__} takes no captions; use protocol=clap")
    captions = [plain_caption(caption) for caption in captions]  # a structured form is for the generator
    known = list(dict.fromkeys(captions))
    place = {caption: number for number, caption in enumerate(known)}
    texts = torch.cat([sets.extractor.text(known[start : start + 64]) for start in range(0, len(known), 64)])
    own = torch.tensor([place[caption] for caption in captions])
    values = (sets.generated.features * texts[own]).sum(dim=1).double()
    counts = sets.counts[1]
    scores = {"clap_score": estimate(counts @ values / counts.sum(dim=1), str(len(captions)))}
    if len(known) > 1:
        scores["clap_score_unrelated"] = _unrelated(sets.generated.features, texts[(own + 1) % len(known)], counts)
    return scores


def _unrelated(features: Tensor, texts: Tensor, counts: Tensor) -> Estimate:
    values = (features * texts).sum(dim=1).double()
    score = estimate(counts @ values / counts.sum(dim=1), str(len(features)))
    if score.value >= HIGHEST_SIMILARITY:
        raise CaptionError(
            f"CLAP score: captions of other clips score {score.value:.3f}, which must be under {HIGHEST_SIMILARITY}; "
            "this is no trained CLAP, or its tokenizer is another's: fetch its files again"
        )
    return score


SCORES: Mapping[str, Callable[[Comparison], Scores]] = {
    "frechet": frechet,
    "frechet_infinity": frechet_infinity,
    "kad": kad,
    "kl": kl,
    "inception": inception,
    "clap": clap,
}
