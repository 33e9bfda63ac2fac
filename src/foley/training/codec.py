"""Trains a waveform codec: reconstruction, KL and, from a chosen step on, adversarial terms."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foley.data.types import AudioBatch
from foley.losses.adversarial import FeatureMaps, feature_matching
from foley.metrics.reconstruction import mel_distance, si_sdr, stft_distance
from foley.models.vae.base import AudioVAE
from foley.seeding import torch_generator
from foley.training.base import FoleyModule
from foley.training.optim import parameter_groups

Schedule = Callable[[Optimizer], Any]
_ADVERSARIAL_TERMS = {"adversarial", "feature_matching"}


class AdversarialLoss(Protocol):
    """What `foley.losses.adversarial` offers."""

    def discriminator(self, real: FeatureMaps, generated: FeatureMaps) -> Tensor: ...

    def generator(self, generated: FeatureMaps) -> Tensor: ...


class CodecTraining(FoleyModule):
    """A VAE with named loss terms, and an optional discriminator that joins at `adversarial_start_step`.

    A step is one update of the codec; before the adversarial terms start, the discriminator costs nothing. Full and
    bfloat16 precision are supported, float16 with its loss scaling is not.

    Args:
        codec: the model.
        terms: name to loss of (reconstruction, original), both `[B, 1, T]`.
        weights: name to weight, for each of `terms`, for "kl", and with a discriminator for "adversarial" and
            "feature_matching"; a term of weight 0 is not computed.
        optimizer, lr_schedule: partials for the codec; the first takes parameter groups, the second an optimizer.
        discriminator: maps audio to feature maps; None trains without adversarial terms.
        discriminator_optimizer: partial; the schedule is the codec's, counted from the discriminator's first step.
        adversarial: the kind of adversarial loss.
        adversarial_start_step: codec updates before the discriminator joins.
        gradient_clip_norm: largest gradient norm, for each of the two; None does not clip.
        num_examples: pairs (original, reconstruction) of each validation kept in `examples`.
        seed: of the posterior noise.

    Raises:
        ValueError: where terms and weights do not name the same losses.
    """

    def __init__(
        self,
        codec: AudioVAE,
        terms: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        optimizer: Callable[..., Optimizer],
        lr_schedule: Schedule | None = None,
        discriminator: nn.Module | None = None,
        discriminator_optimizer: Callable[..., Optimizer] | None = None,
        adversarial: AdversarialLoss | None = None,
        adversarial_start_step: int = 0,
        gradient_clip_norm: float | None = None,
        num_examples: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_weights(set(terms), weights, discriminator is not None)
        self.automatic_optimization = False
        self.codec = codec
        self.terms = nn.ModuleDict({name: term for name, term in terms.items() if weights[name]})
        self.weights = dict(weights)
        self.make_optimizer = optimizer
        self.make_lr_schedule = lr_schedule
        self.discriminator = discriminator
        self.make_discriminator_optimizer = discriminator_optimizer or optimizer
        self.adversarial = adversarial
        self.adversarial_start_step = adversarial_start_step
        self.gradient_clip_norm = gradient_clip_norm
        self.num_examples = num_examples
        self.seed = seed
        self.examples: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> Any:
        makers: list[tuple[nn.Module, Callable[..., Optimizer]]] = [(self.codec, self.make_optimizer)]
        if self.discriminator is not None:
            makers.append((self.discriminator, self.make_discriminator_optimizer))
        optimizers = [make(parameter_groups(part)) for part, make in makers]
        if self.make_lr_schedule is None:
            return [{"optimizer": optimizer} for optimizer in optimizers]
        return [{"optimizer": optimizer, "lr_scheduler": self.make_lr_schedule(optimizer)} for optimizer in optimizers]

    def training_step(self, batch: AudioBatch, batch_idx: int) -> dict[str, Tensor]:
        """One update of the codec, after one of the discriminator where that has joined; returns the codec's loss."""
        audio = batch["audio"]
        posterior = self.codec.posterior(audio)
        noise = torch_generator("posterior", self.seed, self.global_step, self.global_rank)
        reconstruction = self.codec.decode(posterior.sample(noise))[..., : audio.shape[-1]].float()
        values = self._reconstruction_terms(reconstruction, audio) | {"kl": posterior.kl()}
        adversarial = self.discriminator is not None and self.global_step >= self.adversarial_start_step
        if adversarial:
            self._update_discriminator(audio, reconstruction.detach())
            self.discriminator.requires_grad_(False)  # type: ignore[union-attr]
            values |= self._adversarial_terms(reconstruction, audio)
        loss = self._weighted_sum(values)
        self._update_codec(loss)
        if adversarial:
            self.discriminator.requires_grad_(True)  # type: ignore[union-attr]
        self.log("train/loss", loss, prog_bar=True, batch_size=len(audio))
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(audio))
        return {"loss": loss.detach()}

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Log the loss and the distances of the reconstruction from the posterior's mean; keep the first pairs."""
        audio = batch["audio"]
        posterior = self.codec.posterior(audio)
        reconstruction = self.codec.decode(posterior.mean)[..., : audio.shape[-1]].float()
        values = self._reconstruction_terms(reconstruction, audio) | {"kl": posterior.kl()}
        distances = {
            "si_sdr_db": si_sdr(reconstruction, audio).mean(),
            "mel_distance": mel_distance(reconstruction, audio, self.codec.sample_rate_hz).mean(),
            "stft_distance": stft_distance(reconstruction, audio).mean(),
            "latent_std": posterior.mean.std(),
        }
        metrics = {"loss": self._weighted_sum(values), **values, **distances}
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, batch_size=len(audio), sync_dist=True)
        if batch_idx == 0:
            pairs = zip(audio[: self.num_examples].cpu(), reconstruction[: self.num_examples].cpu(), strict=True)
            self.examples = list(pairs)

    def _reconstruction_terms(self, reconstruction: Tensor, audio: Tensor) -> dict[str, Tensor]:
        return {name: term(reconstruction, audio) for name, term in self.terms.items()}

    def _adversarial_terms(self, reconstruction: Tensor, audio: Tensor) -> dict[str, Tensor]:
        """The discriminator's say on the codec; its own parameters must not require gradients here."""
        discriminator, adversarial = self._opponent()
        generated = discriminator(reconstruction)
        with torch.no_grad():
            real = discriminator(audio)
        return {
            "adversarial": adversarial.generator(generated),
            "feature_matching": feature_matching(real, generated),
        }

    def _weighted_sum(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum()

    def _update_codec(self, loss: Tensor) -> None:
        optimizers, schedules = _listed(self.optimizers()), _listed(self.lr_schedulers())
        optimizers[0].zero_grad()
        self.manual_backward(loss)
        if self.gradient_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.codec.parameters(), self.gradient_clip_norm)
        optimizers[0].step()
        if schedules:
            schedules[0].step()

    def _update_discriminator(self, audio: Tensor, generated: Tensor) -> None:
        discriminator, adversarial = self._opponent()
        # The bare optimizer: Lightning would count its step as a global one, and steps here are the codec's.
        optimizer = cast(list[Optimizer], self.optimizers(use_pl_optimizer=False))[1]
        schedules = _listed(self.lr_schedulers())
        loss = adversarial.discriminator(discriminator(audio), discriminator(generated))
        optimizer.zero_grad()
        self.manual_backward(loss)
        limit = float("inf") if self.gradient_clip_norm is None else self.gradient_clip_norm
        norm = nn.utils.clip_grad_norm_(discriminator.parameters(), limit)
        # The guard against non-finite gradients watches Lightning's steps only. Gradients agree on all ranks here.
        if bool(norm.isfinite()):
            optimizer.step()
        if schedules:
            schedules[1].step()
        self.log("train/discriminator", loss, batch_size=len(audio))

    def _opponent(self) -> tuple[nn.Module, AdversarialLoss]:
        if self.discriminator is None or self.adversarial is None:
            raise ValueError("task.discriminator and task.adversarial must be set for adversarial terms")
        return self.discriminator, self.adversarial


def _listed(value: Any) -> list[Any]:
    """Lightning gives None, one object or a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_weights(terms: set[str], weights: Mapping[str, float], has_discriminator: bool) -> None:
    wanted = terms | {"kl"} | (_ADVERSARIAL_TERMS if has_discriminator else set())
    if missing := sorted(wanted - set(weights)):
        raise ValueError(f"task.weights {dict(weights)} gives no weight for {missing}")
    if unknown := sorted(set(weights) - wanted - _ADVERSARIAL_TERMS):
        raise ValueError(f"task.weights names {unknown}, which are not among the terms {sorted(wanted)}")
