"""Trains a model that renders a signal anew, on named terms and, from a chosen step on, on adversarial ones.

    model:          sum_i weight_i term_i(generated, original)
    discriminator:  hinge or least squares of original and generated (see `foley.losses.adversarial`)

With `adaptive_weight_limit` the weight of "adversarial" is multiplied, at each step, by how much harder the terms pull
at the last layer of the decoder than the discriminator does.

The signal is whatever the subclass says: audio, a mel spectrogram, log magnitudes. `VariationalTraining` adds what
trainers of VAEs share: a draw of the posterior, its divergence as a term, and the spread of its means.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from foley.core.seeding import torch_generator
from foley.data.dataset import AudioBatch
from foley.losses.adversarial import FeatureMaps, adaptive_weight, feature_matching, gradient_penalty
from foley.metrics.reconstruction import mel_distance, si_sdr, stft_distance
from foley.models.codec.base import GaussianPosterior
from foley.training.base import FoleyModule
from foley.training.gradients import clip_gradients, drop_unless_finite, gradient_norm
from foley.training.optim import parameter_groups

Schedule = Callable[[Optimizer], Any]
_ADVERSARIAL_TERMS = {"adversarial", "feature_matching"}


class AdversarialLoss(Protocol):
    """What `foley.losses.adversarial` offers."""

    def discriminator(self, real: FeatureMaps, generated: FeatureMaps) -> Tensor: ...

    def generator(self, generated: FeatureMaps) -> Tensor: ...


@dataclass(frozen=True)
class Pair:
    """A signal and what the model made of it, of one shape; further loss terms, and numbers to log at validation."""

    original: Tensor
    generated: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    measures: Mapping[str, Tensor] = field(default_factory=dict)


class AdversarialTraining(FoleyModule):
    """A model with named loss terms, and an optional discriminator that joins at `adversarial_start_step`.

    A subclass names the model and renders a batch. A step is one update of the model; before the adversarial terms
    start, the discriminator costs nothing. Full and bfloat16 precision are supported, float16 with its loss scaling
    is not.

    Args:
        terms: name to loss of (generated, original).
        weights: name to weight, for each of `terms` and of the subclass's `own_terms`, and with a discriminator for
            "adversarial" and "feature_matching"; one of `terms` with weight 0 is not computed.
        optimizer, lr_schedule: partials for the model; the first takes parameter groups, the second an optimizer.
        discriminator: maps signals to feature maps; None trains without adversarial terms.
        discriminator_optimizer: partial; the schedule is the model's, counted from the discriminator's first step.
        adversarial: the kind of adversarial loss.
        adversarial_start_step: model updates before the discriminator joins.
        adaptive_weight_limit: the most by which the weight "adversarial" is multiplied, see `adaptive_weight`; None
            leaves it fixed.
        r1_weight: of the discriminator's gradient penalty at originals, see `gradient_penalty`; 0 does without.
        gradient_clip_norm: largest gradient norm, for each of the two; None does not clip.
        num_examples: pairs (original, generated) of each validation kept in `examples`, where they are heard.
        seed: of the noise.

    Raises:
        ValueError: where terms and weights do not name the same losses; when training starts, for an adaptive weight of
            a model without a `last_weight`.
    """

    own_terms: ClassVar[frozenset[str]] = frozenset()
    """Names of the terms that pairs bring along."""

    def __init__(
        self,
        terms: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        optimizer: Callable[..., Optimizer],
        lr_schedule: Schedule | None = None,
        discriminator: nn.Module | None = None,
        discriminator_optimizer: Callable[..., Optimizer] | None = None,
        adversarial: AdversarialLoss | None = None,
        adversarial_start_step: int = 0,
        adaptive_weight_limit: float | None = None,
        r1_weight: float = 0.0,
        gradient_clip_norm: float | None = None,
        num_examples: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(gradient_clip_norm)
        _check_weights(set(terms) | self.own_terms, weights, discriminator is not None)
        self.automatic_optimization = False  # two optimizers take turns, which Lightning leaves to us
        # Weight 0 costs nothing.
        self.terms = nn.ModuleDict({name: term for name, term in terms.items() if weights[name]})
        self.weights = dict(weights)
        self.make_optimizer = optimizer
        self.make_lr_schedule = lr_schedule
        self.discriminator = discriminator
        self.make_discriminator_optimizer = discriminator_optimizer or optimizer
        self.adversarial = adversarial
        self.adversarial_start_step = adversarial_start_step
        self.adaptive_weight_limit = adaptive_weight_limit
        self.r1_weight = r1_weight
        self.num_examples = num_examples
        self.seed = seed
        self.examples: list[tuple[Tensor, Tensor]] = []  # (original, generated), each [channels, T]

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        raise NotImplementedError

    @property
    def sample_rate_hz(self) -> int | None:
        """Of what is heard of pairs; None where that is nothing."""
        raise NotImplementedError

    @property
    def last_weight(self) -> Tensor:
        """Weight of the decoder's last layer; raises ValueError where the model has none that stands for itself."""
        raise ValueError(
            f"task.adaptive_weight_limit={self.adaptive_weight_limit}: {type(self.model).__name__} names no last layer "
            "to balance gradients at; leave it null, which keeps the weight fixed"
        )

    def heard(self, batch: AudioBatch, pair: Pair) -> tuple[Tensor, Tensor]:
        """Original and generated audio `[B, channels, T]` of a pair, at `sample_rate_hz`."""
        return pair.original, pair.generated

    def render(self, batch: AudioBatch, noise: torch.Generator | None) -> Pair:
        """What the model makes of a batch: with noise where it takes some, and without at validation."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        if self.adaptive_weight_limit is not None:
            _ = self.last_weight  # refused now, not when the discriminator joins
        # The model's first, then the discriminator's: each is found by its place.
        makers: list[tuple[nn.Module, Callable[..., Optimizer]]] = [(self.model, self.make_optimizer)]
        if self.discriminator is not None:
            makers.append((self.discriminator, self.make_discriminator_optimizer))
        optimizers = [make(parameter_groups(part)) for part, make in makers]
        if self.make_lr_schedule is None:
            return [{"optimizer": optimizer} for optimizer in optimizers]
        return [{"optimizer": optimizer, "lr_scheduler": self.make_lr_schedule(optimizer)} for optimizer in optimizers]

    def training_step(self, batch: AudioBatch, batch_idx: int) -> dict[str, Tensor]:
        """One update of the model, after one of the discriminator where that has joined; returns the model's loss."""
        # The noise follows from the step, so that a resumed run repeats itself.
        seeds = "posterior", self.seed, self.global_step, self.global_rank
        pair = self.render(batch, torch_generator(*seeds, device=self.device))
        values = self._reconstruction_terms(pair)
        # The step counts updates of the model alone, see `_update_discriminator`.
        adversarial = self.discriminator is not None and self.global_step >= self.adversarial_start_step
        balance: Tensor | float = 1.0
        if adversarial:
            self._update_discriminator(pair.original, pair.generated.detach())  # the model does not learn from this
            # The model's loss goes through the discriminator, which must not gather gradients from it.
            self.discriminator.requires_grad_(False)  # type: ignore[union-attr]
            balance = self._balance(values, judged := self._adversarial_terms(pair))
            values |= judged
        loss = self._weighted_sum(values, balance)
        self._update_model(loss)
        if adversarial:
            self.discriminator.requires_grad_(True)  # type: ignore[union-attr]
        batch_size = len(pair.original)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=batch_size)
        return {"loss": loss.detach()}

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Log the loss, the pair's measures and, of audio, its distances; keep the first pairs of audio."""
        pair = self.render(batch, None)
        values = self._reconstruction_terms(pair)
        metrics = {"loss": self._weighted_sum(values), **values, **pair.measures}
        if self.sample_rate_hz is not None:
            audio = self.heard(batch, pair)
            metrics |= _audio_distances(*audio, self.sample_rate_hz)
            if batch_idx == 0:
                self.examples = list(zip(*(signal[: self.num_examples].cpu() for signal in audio), strict=True))
        self.log_dict(
            {f"val/{name}": value for name, value in metrics.items()}, batch_size=len(pair.original), sync_dist=True
        )

    def _reconstruction_terms(self, pair: Pair) -> dict[str, Tensor]:
        return {name: term(pair.generated, pair.original) for name, term in self.terms.items()} | dict(pair.terms)

    def _adversarial_terms(self, pair: Pair) -> dict[str, Tensor]:
        """The discriminator's say on the model; its own parameters must not require gradients here."""
        discriminator, adversarial = self._opponent()
        with parametrize.cached():  # weights g v / |v| are made once for both passes
            generated = discriminator(pair.generated)  # with gradients, which are the model's
            values = {"adversarial": adversarial.generator(generated)}
            if self.weights["feature_matching"]:
                with torch.no_grad():  # an aim, which nothing here trains
                    real = discriminator(pair.original)
                values["feature_matching"] = feature_matching(real, generated)
        return values

    def _balance(self, values: Mapping[str, Tensor], judged: Mapping[str, Tensor]) -> Tensor | float:
        """What the weight "adversarial" is multiplied by: 1 where it is fixed."""
        if self.adaptive_weight_limit is None:
            return 1.0
        # What is rebuilt, without the divergence: it does not reach the decoder.
        reconstruction = self._weighted_sum({name: values[name] for name in self.terms})
        balance = adaptive_weight(reconstruction, judged["adversarial"], self.last_weight, self.adaptive_weight_limit)
        self.log("train/adaptive_weight", balance)
        return balance

    def _weighted_sum(self, values: Mapping[str, Tensor], balance: Tensor | float = 1.0) -> Tensor:
        # sum_i weight_i term_i.
        weights = {name: weight * (balance if name == "adversarial" else 1.0) for name, weight in self.weights.items()}
        return torch.stack([weights[name] * value for name, value in values.items()]).sum()

    def _update_model(self, loss: Tensor) -> None:
        optimizers, schedules = _listed(self.optimizers()), _listed(self.lr_schedulers())
        optimizers[0].zero_grad()
        self.manual_backward(loss)
        optimizers[0].step()
        if schedules:
            schedules[0].step()  # by the step, not by the epoch

    def _update_discriminator(self, original: Tensor, generated: Tensor) -> None:
        discriminator, adversarial = self._opponent()
        # The bare optimizer: Lightning would count its step as a global one, and steps here are the model's.
        optimizer = cast(list[Optimizer], self.optimizers(use_pl_optimizer=False))[1]
        schedules = _listed(self.lr_schedulers())
        penalised = original.detach().requires_grad_(self.r1_weight > 0)
        with parametrize.cached():  # until the weights change
            real = discriminator(penalised)
            loss = adversarial.discriminator(real, discriminator(generated))
        if self.r1_weight:
            loss = loss + self.r1_weight * gradient_penalty(real, penalised)
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = gradient_norm(optimizer)
        clip_gradients(optimizer, self.gradient_clip_norm, norm)
        # The guard against non-finite gradients watches Lightning's steps only. Gradients agree on all ranks here.
        drop_unless_finite(optimizer, norm)
        optimizer.step()
        if schedules:
            schedules[1].step()
        self.log("train/discriminator", loss, batch_size=len(original))
        self.log("train/discriminator_grad_norm", norm, batch_size=len(original))

    def _opponent(self) -> tuple[nn.Module, AdversarialLoss]:
        if self.discriminator is None or self.adversarial is None:
            raise ValueError("task.discriminator and task.adversarial must be set for adversarial terms")
        return self.discriminator, self.adversarial


class VariationalTraining(AdversarialTraining):
    """A VAE, with the term "kl" beside those of (reconstruction, original); see `AdversarialTraining`."""

    own_terms = frozenset({"kl"})

    def reconstruct(
        self,
        original: Tensor,
        posterior: GaussianPosterior,
        decode: Callable[[Tensor], Tensor],
        noise: torch.Generator | None,
    ) -> Pair:
        """`original` and what `decode` makes of a draw of its posterior, or of the mean where there is no noise."""
        latent = posterior.mean if noise is None else posterior.sample(noise)
        # The spread of the means nears 0 where the posterior has collapsed and says nothing of its item.
        return Pair(original, decode(latent).float(), {"kl": posterior.kl()}, {"latent_std": posterior.mean.std()})


def _audio_distances(original: Tensor, generated: Tensor, sample_rate_hz: int) -> dict[str, Tensor]:
    return {
        "si_sdr_db": si_sdr(generated, original).mean(),
        "mel_distance": mel_distance(generated, original, sample_rate_hz).mean(),
        "stft_distance": stft_distance(generated, original).mean(),
    }


def _listed(value: Any) -> list[Any]:
    """Lightning gives None, one object or a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_weights(terms: set[str], weights: Mapping[str, float], has_discriminator: bool) -> None:
    wanted = terms | (_ADVERSARIAL_TERMS if has_discriminator else set())
    if missing := sorted(wanted - set(weights)):
        raise ValueError(f"task.weights {dict(weights)} gives no weight for {missing}")
    if unknown := sorted(set(weights) - wanted - _ADVERSARIAL_TERMS):
        raise ValueError(f"task.weights names {unknown}, which are not among the terms {sorted(wanted)}")
