"""The codec's trainer: what it updates and when, repeatability, checkpoints."""

from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from training_parts import changed, fit_on_noise

from foley.losses.adversarial import HingeLoss
from foley.losses.spectral import MultiResolutionSTFTLoss
from foley.models.codec.discriminators import MultiScaleSTFTDiscriminator
from foley.models.codec.waveform_vae import WaveformVAE
from foley.system.checkpoint import load_trained
from foley.training.callbacks.listening import Reconstructions
from foley.training.callbacks.non_finite import NonFiniteGuard
from foley.training.codecs import CodecTraining
from foley.training.optim import inverse_power_schedule

CODEC = {"channels": 4, "multipliers": [2], "strides": [10], "num_units": [1], "latent_channels": 2}
WEIGHTS = {"stft": 1.0, "waveform": 0.0, "kl": 1e-4, "adversarial": 0.1, "feature_matching": 5.0}


def build(adversarial_start_step: int | None = None, **options: bool) -> CodecTraining:
    torch.manual_seed(0)
    with_discriminator = adversarial_start_step is not None
    module = CodecTraining(
        WaveformVAE(**CODEC),
        {"stft": MultiResolutionSTFTLoss(24000, (80, 40)), "waveform": torch.nn.L1Loss()},
        WEIGHTS,
        partial(torch.optim.AdamW, lr=1e-3, betas=(0.8, 0.99)),
        inverse_power_schedule,
        discriminator=MultiScaleSTFTDiscriminator((80,), 2) if with_discriminator else None,
        adversarial=HingeLoss(),
        adversarial_start_step=adversarial_start_step or 0,
        gradient_clip_norm=1.0,
        **options,
    )
    module.component_configs = {"codec": {"_target_": "foley.models.codec.waveform_vae.WaveformVAE", **CODEC}}
    return module


@pytest.mark.parametrize(("start", "expected"), [(None, {"codec"}), (9, {"codec"}), (2, {"codec", "discriminator"})])
def test_each_part_learns_from_its_start(start: int | None, expected: set[str], tmp_path: Path) -> None:
    module = build(start)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer = fit_on_noise(module, tmp_path, 1200)
    assert trainer.global_step == 4
    assert changed(before, module.state_dict()) == expected
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert {"train/loss", "train/stft", "val/loss", "val/si_sdr_db", "val/mel_distance"} <= set(
        trainer.callback_metrics
    )
    assert ("train/adversarial" in trainer.callback_metrics) == (start == 2)


def test_a_held_encoder_leaves_latents_as_they_are(tmp_path: Path) -> None:
    module = build(0, freezes_encoder=True)
    before, audio = {name: tensor.clone() for name, tensor in module.state_dict().items()}, torch.randn(1, 1, 1200)
    latent = module.codec.encode(audio)
    fit_on_noise(module, tmp_path, 1200)
    parts = {name: tensor for name, tensor in module.codec.state_dict().items()}
    moved = {name.split(".")[0] for name, tensor in parts.items() if not torch.equal(before[f"codec.{name}"], tensor)}
    assert moved == {"decoder"}
    assert torch.equal(module.codec.encode(audio), latent)


def test_the_logged_gradient_norm_is_the_one_before_clipping(tmp_path: Path) -> None:
    module = build()
    module.weights["stft"] = 1e4
    clipped: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            clipped.append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.model.parameters()])))

    trainer = fit_on_noise(module, tmp_path, 1200, callbacks=[NonFiniteGuard(), Watch()])
    assert trainer.callback_metrics["train/grad_norm"] > 100
    assert max(clipped) <= 1.001


def test_the_weights_of_a_discriminator_are_made_once_between_its_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It judges originals and copies for its own update, and both again for the model's."""
    module, made = build(0), []
    kind = next(type(part) for part in module.discriminator.modules() if type(part).__name__ == "_WeightNorm")
    weight_norm, forward = {id(part) for part in module.discriminator.modules() if isinstance(part, kind)}, kind.forward

    def counted(self, *parts):
        made.extend([id(self)] if id(self) in weight_norm else [])
        return forward(self, *parts)

    monkeypatch.setattr(kind, "forward", counted)
    fit_on_noise(module, tmp_path, 1200, steps=3)
    assert len(made) == 2 * 3 * len(weight_norm)


def test_runs_repeat_bit_for_bit(tmp_path: Path) -> None:
    first, second = build(1), build(1)
    for module in (first, second):
        fit_on_noise(module, tmp_path, 1200)
        torch.rand(3)
    assert not changed(first.state_dict(), second.state_dict())


def test_the_codec_loads_from_the_checkpoint_and_its_examples_are_written(tmp_path: Path) -> None:
    module = build(1)
    trainer = fit_on_noise(module, tmp_path, 1200, callbacks=[Reconstructions(str(tmp_path / "sounds"))])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    codec = load_trained(tmp_path / "run.ckpt", "codec")
    audio = torch.randn(1, 1, 480)
    torch.testing.assert_close(codec.encode(audio), module.codec.encode(audio))
    names = {path.name for path in (tmp_path / "sounds" / "step_000004").iterdir()}
    assert {"00_original.wav", "00_reconstruction.wav"} <= names


def test_terms_and_weights_must_agree() -> None:
    make = partial(torch.optim.AdamW, lr=1e-3)
    with pytest.raises(ValueError, match="no weight for"):
        CodecTraining(WaveformVAE(**CODEC), {"stft": torch.nn.L1Loss()}, {"kl": 1.0}, make)
    with pytest.raises(ValueError, match="not among"):
        CodecTraining(WaveformVAE(**CODEC), {}, {"kl": 1.0, "typo": 1.0}, make)
