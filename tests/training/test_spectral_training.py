"""Training codecs of spectra: what each step updates, what is logged, and what can be loaded."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import changed, fit_on_noise

from foley.core.components import build_component
from foley.losses.adversarial import LeastSquaresLoss
from foley.losses.spectral import BandedLogLoss, LogMelLoss
from foley.models.codec.discriminators import PatchDiscriminator, PeriodResolutionDiscriminator
from foley.system.checkpoint import load_trained
from foley.training.adversarial import AdversarialTraining
from foley.training.callbacks.listening import Reconstructions
from foley.training.codecs import MelVAETraining, SpectralVAETraining, VocoderTraining

SPECTROGRAM = {"_target_": "foley.models.codec.mel_vae.MelSpectrogram", "sample_rate_hz": 16000}
MEL_VAE = {
    "_target_": "foley.models.codec.mel_vae.MelVAE",
    "spectrogram": SPECTROGRAM,
    **{"channels": 16, "multipliers": [1], "strides": [2], "num_blocks": 1, "latent_channels": 4, "norm_groups": 4},
}
VOCODER = {
    "_target_": "foley.models.codec.vocoder.BigVGAN",
    "spectrogram": SPECTROGRAM,
    **{"channels": 8, "strides": [16, 16], "kernels": [3], "dilations": [1], "convs_per_unit": 1},
}
SPECTRAL_VAE = {
    "_target_": "foley.models.codec.spectral_vae.SpectralVAE",
    **{"width": 8, "window_samples": 256, "frame_samples": 64, "latent_channels": 4, "sample_rate_hz": 16000},
}
SAMPLES = 8100  # no multiple of a frame
MEL_WEIGHTS = {"mel": 1.0, "kl": 1e-6, "adversarial": 0.1, "feature_matching": 0.0}


def build(kind: str, adversarial_start_step: int | None = None, **options: Any) -> AdversarialTraining:
    torch.manual_seed(0)
    options |= {"adversarial": LeastSquaresLoss(), "adversarial_start_step": adversarial_start_step or 0}
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    judged = adversarial_start_step is not None
    module: AdversarialTraining
    if kind == "mel_vae":
        options["discriminator"] = PatchDiscriminator(2, 2) if judged else None
        module = MelVAETraining(build_component(MEL_VAE), {"mel": torch.nn.L1Loss()}, MEL_WEIGHTS, optimizer, **options)
        module.component_configs = {"mel_vae": MEL_VAE}
    elif kind == "codec":
        options["discriminator"] = PatchDiscriminator(2, 2) if judged else None
        terms = {"mel": BandedLogLoss(16000, 256, 20)}
        module = SpectralVAETraining(build_component(SPECTRAL_VAE), terms, MEL_WEIGHTS, optimizer, **options)
        module.component_configs = {"codec": SPECTRAL_VAE}
    else:
        options["discriminator"] = PeriodResolutionDiscriminator((2,), ((256, 64, 256),), 1) if judged else None
        loss = LogMelLoss(16000, floor=1e-5, mel_scale="slaney")
        weights = {"mel": 45.0, "adversarial": 8.0, "feature_matching": 80.0}
        module = VocoderTraining(build_component(VOCODER), {"mel": loss}, weights, optimizer, **options)
        module.component_configs = {"vocoder": VOCODER}
    return module


@pytest.mark.parametrize("kind", ["mel_vae", "vocoder", "codec"])
@pytest.mark.parametrize(("start", "judged"), [(None, False), (9, False), (2, True)])
def test_the_discriminator_acts_from_its_start_step_on(
    kind: str, start: int | None, judged: bool, tmp_path: Path
) -> None:
    module = build(kind, start)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer = fit_on_noise(module, tmp_path, SAMPLES)
    assert changed(before, module.state_dict()) == ({kind, "discriminator"} if judged else {kind})
    assert trainer.global_step == 4
    assert all(parameter.requires_grad for parameter in module.parameters())
    metrics = set(trainer.callback_metrics)
    own = {
        "mel_vae": {"train/kl", "val/latent_std"},
        "vocoder": {"val/si_sdr_db", "val/mel_distance"},
        "codec": {"train/kl", "val/latent_std", "val/mel_distance"},
    }
    assert {"train/loss", "train/mel", "val/loss"} | own[kind] <= metrics
    assert ("train/adversarial" in metrics) == ("train/discriminator" in metrics) == judged
    assert ("train/feature_matching" in metrics) == (judged and kind == "vocoder")


@pytest.mark.parametrize("kind", ["mel_vae", "vocoder", "codec"])
def test_the_part_loads_from_the_checkpoint(kind: str, tmp_path: Path) -> None:
    module = build(kind, 1)
    trainer = fit_on_noise(module, tmp_path, SAMPLES, callbacks=[Reconstructions(str(tmp_path / "sounds"))])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded, mel = load_trained(tmp_path / "run.ckpt", kind), torch.randn(1, 80, 4)
    assert type(loaded) is type(module.model)
    expected = module.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    result = {"mel_vae": lambda: loaded.encode_moments(mel)[0], "vocoder": lambda: loaded(mel)}
    assert result.get(kind, lambda: loaded.reconstruct(mel[:, :1]))().isfinite().all()
    assert (tmp_path / "sounds" / "step_000004" / "00_reconstruction.wav").is_file() == (kind != "mel_vae")


@pytest.mark.parametrize("limit", [1e9, 1e-3])
def test_an_adaptive_weight_lets_the_discriminator_pull_as_hard_as_the_terms(limit: float) -> None:
    module = build("mel_vae", 0, adaptive_weight_limit=limit)
    module.log = lambda *_, **__: None
    pair = module.render({"audio": torch.randn(2, 1, SAMPLES)}, None)  # type: ignore[typeddict-item]
    values, judged = module._reconstruction_terms(pair), module._adversarial_terms(pair)
    balance = module._balance(values, judged)
    rebuilt, adversarial = (
        torch.autograd.grad(loss, module.last_weight, retain_graph=True)[0].norm()
        for loss in (module.weights["mel"] * values["mel"], judged["adversarial"])
    )
    assert not balance.requires_grad
    assert balance.item() == pytest.approx(min(limit, (rebuilt / (adversarial + 1e-4)).item()))
    total = module._weighted_sum(values | judged, balance).item()
    fixed = module._weighted_sum(values).item()
    assert total == pytest.approx(fixed + 0.1 * balance.item() * judged["adversarial"].item())


def test_the_published_training_of_the_mel_vae(tmp_path: Path) -> None:
    options = {"adaptive_weight_limit": 0.2, "r1_weight": 3.0}
    trainer = fit_on_noise(build("mel_vae", 1, **options), tmp_path, SAMPLES)
    assert 0 < trainer.callback_metrics["train/adaptive_weight"] <= 0.2
    with pytest.raises(ValueError, match=r"adaptive_weight_limit=0\.2: SpectralVAE names no last layer"):
        build("codec", 1, **options).configure_optimizers()


def test_the_gradient_penalty_is_added_to_the_discriminators_loss(tmp_path: Path) -> None:
    losses = [
        fit_on_noise(build("mel_vae", 0, r1_weight=weight), tmp_path, SAMPLES, steps=1).callback_metrics
        for weight in (0.0, 3.0, 6.0)
    ]
    plain, once, twice = (float(metrics["train/discriminator"]) for metrics in losses)
    assert once > plain
    assert twice - plain == pytest.approx(2 * (once - plain), rel=1e-3)


def test_one_clip_is_learned(tmp_path: Path) -> None:
    """Both sines of a clip: the mel VAE's reconstruction comes much closer than it starts."""
    module = build("mel_vae")
    time = torch.arange(8192) / 16000
    audio = 0.3 * (torch.sin(2 * torch.pi * 440 * time) + torch.sin(2 * torch.pi * 3000 * time))
    batch = {"audio": audio[None, None]}
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)

    def loss() -> torch.Tensor:
        pair = module.render(batch, None)  # type: ignore[arg-type]
        return (pair.generated - pair.original).abs().mean()

    first = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert loss().item() < 0.2 * first


def test_pairs_are_of_one_shape() -> None:
    batch: Any = {"audio": torch.randn(2, 1, SAMPLES)}
    mel, audio, spectra = (build(kind).render(batch, None) for kind in ("mel_vae", "vocoder", "codec"))
    assert mel.original.shape == mel.generated.shape == (2, 80, 32)
    assert audio.original.shape == audio.generated.shape == (2, 1, SAMPLES)
    assert spectra.original.shape == spectra.generated.shape == (2, 128, 129)
