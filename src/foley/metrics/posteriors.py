"""Scores of class posteriors, from the logits of an extractor. Everything is computed in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foley.seeding import torch_generator

KL_EPSILON = 1e-6


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
    """KL(reference || generated) `[N]` of paired class posteriors from logits `[N, K]` (AudioLDM-eval)."""
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
        total = weights[:, rows].sum(dim=1, keepdim=True).clamp_min(1)
        marginal = weights[:, rows] @ posteriors[rows] / total
        negative_entropy = torch.xlogy(posteriors[rows], posteriors[rows]).sum(dim=1)
        mean = (weights[:, rows] @ negative_entropy) / total[:, 0]
        scores.append((mean - torch.xlogy(marginal, marginal).sum(dim=1)).exp())
    return torch.stack(scores, dim=1)


def label_accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of rows of `logits [N, K]` whose largest entry is at `targets [N]`; raises ValueError on an empty set."""
    if targets.numel() == 0:
        raise ValueError("label accuracy of an empty set is undefined; give at least one labelled clip")
    return float((logits.argmax(dim=-1) == targets).double().mean())
