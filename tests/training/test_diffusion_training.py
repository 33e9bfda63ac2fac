"""The diffusion objective, the averages, warm starts, and what checkpoints hold."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_parts
from pretend_device import PretendDevice
from torch import nn
from training_parts import CHANNELS, FRAMES, LatentSamples, TinyText, build_module, build_trainer, collate, run

from foley.core.components import CheckpointError
from foley.core.seeding import torch_generator
from foley.data.dataset import SampleKey
from foley.diffusion.process import DiffusionProcess
from foley.models.codec.normaliser import LatentNormaliser
from foley.models.text import TextEmbedding
from foley.system.checkpoint import read_training_checkpoint
from foley.training.diffusion import DiffusionTraining
from foley.training.run import warm_start


def batch_of(size: int = 3):
    return collate([LatentSamples(size)[SampleKey(index)] for index in range(size)])


class Oracle(nn.Module):
    """Predicts zero for everything but adds `error` on chosen frames; remembers its inputs."""

    latent_channels = CHANNELS

    def __init__(self, error: torch.Tensor) -> None:
        super().__init__()
        self.error = error
        self.inputs: dict = {}

    def forward(self, noisy, timestep, **inputs):
        self.inputs = inputs
        return self.error.expand_as(noisy)


class Zero(DiffusionProcess):
    def target(self, clean, noise, timestep):
        return torch.zeros_like(clean)


def errors(mask_padding: bool, hidden: torch.Tensor | None):
    """Errors of 1 on frames 0-5 and 3 on frames 6-11; frames 8-11 are padding."""
    frames = torch.where(torch.arange(FRAMES) < 6, 1.0, 3.0)
    module = DiffusionTraining(
        Oracle(frames), Zero(), LatentNormaliser(CHANNELS), optimizer=torch.optim.SGD, mask_padding=mask_padding
    )
    clean = batch_of(2)["latent"]
    padded = (torch.arange(FRAMES) < 8).expand(2, -1)
    valid = module.valid_frames({"frame_mask": padded, "is_padded": True})
    means = module._errors(clean, clean, torch.zeros(2, dtype=torch.long), None, valid, hidden)
    return means.tolist(), module.denoiser.inputs


def test_loss_counts_hidden_valid_frames_only() -> None:
    hidden = torch.zeros(2, FRAMES, dtype=torch.bool)
    hidden[0, 4:10] = True
    hidden[1, 7] = True
    assert errors(False, None)[0] == [(6 + 54) / 12, (6 + 54) / 12]
    assert errors(True, None)[0] == [(6 + 18) / 8, (6 + 18) / 8]
    assert errors(False, hidden)[0] == pytest.approx([(2 + 36) / 6, 9])
    means, inputs = errors(True, hidden)
    assert means == [(2 + 18) / 4, 9]
    assert inputs["frame_mask"] is not None
    assert torch.equal(inputs["hidden_mask"], hidden)
    assert errors(False, hidden)[1]["frame_mask"] is None


def test_items_weigh_alike_whatever_is_hidden_of_them(tmp_path: Path, monkeypatch) -> None:
    """The loss averages over the frames of each item, then over items, as published."""
    module = build_module()
    monkeypatch.setattr(module, "_errors", lambda *_: torch.tensor([1.0, 3.0, 5.0], requires_grad=True))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "condition", lambda *_: None)
    module._trainer = SimpleNamespace(global_step=0, global_rank=0)
    assert module.training_step(batch_of(), 0).item() == 3


def test_a_batch_without_padding_has_no_mask_and_the_same_loss(tmp_path: Path, monkeypatch) -> None:
    """So that flash attention is reached, which takes none, and nobody looks into a mask on the device."""
    module = build_module(mask_padding=True)
    assert module.valid_frames(batch_of()) is None
    assert module.valid_frames(batch_of() | {"is_padded": True}) is not None
    losses = []
    for name, is_padded in (("none", False), ("all true", True)):
        monkeypatch.setattr(
            training_parts, "collate", lambda items, said=is_padded: collate(items) | {"is_padded": said}
        )
        losses.append(run(tmp_path / name, 2, module=build_module(mask_padding=True))[2].losses)
    assert losses[0] == losses[1]


def test_a_loss_on_a_gpu_waits_for_nothing_that_it_draws_on_the_host() -> None:
    module = build_module(mask_padding=True)
    module.text.length_multiple = 1
    batch, timestep, dropped = batch_of(), torch.tensor([900, 500, 100]), torch.tensor([True, False, True])
    context, mask = torch.ones(3, 2, 6), torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    hidden = module.masking(3, FRAMES, torch_generator("hidden"))

    def loss(put):
        module._unconditional = TextEmbedding(put(torch.zeros(1, 1, 6)), put(torch.ones(1, 1).bool()))
        there = batch | {"context": put(context), "context_mask": put(mask)}
        clean, text = put(batch["latent"]), module.condition(there, dropped)
        return module._errors(clean, clean, put(timestep), text, module.valid_frames(batch), hidden)

    with torch.no_grad():
        expected = loss(lambda x: x)
        with PretendDevice() as device:
            device.put_module(module.denoiser)
            module.process.levels(device.put(timestep))  # copied once a run
            device.waits.clear()
            assert torch.equal(device.get(loss(device.put)), expected)
    assert device.waits == []


def test_random_draws_depend_on_the_step_alone(tmp_path: Path) -> None:
    """The global generators have no influence."""
    logs = []
    for seed in (1, 2):
        module = build_module()
        torch.manual_seed(seed)
        logs.append(run(tmp_path / str(seed), 3, module=module)[2].losses)
    assert logs[0] == logs[1]
    assert len(set(logs[0])) == 3


def test_caption_dropout_empties_captions(tmp_path: Path) -> None:
    seen: list[str] = []

    class Listener(TinyText):
        def forward(self, prompts):
            seen.extend(prompts)
            return super().forward(prompts)

    run(tmp_path, 1, module=build_module(Listener(), caption_dropout=1.0))
    assert set(seen) == {""}


def test_validation_uses_averages_and_repeats_itself(tmp_path: Path) -> None:
    trainer, module, _ = run(tmp_path, 7)
    first = trainer.callback_metrics["val/loss"]
    levels = [trainer.callback_metrics[f"val/loss_noise_level_{index}"] for index in range(4)]
    assert all(level > 0 for level in levels)
    checkpoint = read_training_checkpoint(tmp_path / "checkpoints/step_000007.ckpt")
    name = "denoiser.inner.weight"
    assert torch.equal(module.state_dict()[name], checkpoint["current_weights"][name])
    module.load_state_dict(checkpoint["state_dict"])
    again = build_trainer(tmp_path / "again", 1)
    again.callbacks[0]._average = {}  # no averages: the weights themselves are validated
    again.validate(module, dataloaders=trainer.datamodule.val_dataloader(), verbose=False)
    assert torch.equal(again.callback_metrics["val/loss"], first)


def test_average_in_closed_form(tmp_path: Path) -> None:
    run(tmp_path, 3, every=1)
    states = [read_training_checkpoint(tmp_path / f"checkpoints/step_{step:06d}.ckpt") for step in (1, 2, 3)]
    name = "denoiser.outer.weight"
    average = states[0]["state_dict"][name]
    for step, state in enumerate(states[1:], start=2):
        average = average.lerp(state["current_weights"][name], 1 - (1 + step) / (10 + step))
    torch.testing.assert_close(average, states[-1]["state_dict"][name])


@pytest.mark.parametrize("trainable", [True, False])
def test_a_frozen_text_encoder_is_not_in_the_checkpoint(tmp_path: Path, trainable: bool) -> None:
    run(tmp_path, 2, module=build_module(TinyText(trainable)))
    checkpoint = read_training_checkpoint(tmp_path / "checkpoints/last.ckpt")
    for entry in ("state_dict", "current_weights"):
        assert any(key.startswith("text.") for key in checkpoint[entry]) == trainable
    run(tmp_path, 4, tmp_path / "checkpoints/last.ckpt", module=build_module(TinyText(trainable)))


def test_warm_start_reports_what_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stage 1 has no cross-attention and no text; stage 2 adds both."""
    run(tmp_path, 2, module=build_module(context_dim=None))
    path = tmp_path / "checkpoints/last.ckpt"
    module = build_module()
    report = warm_start(module, path)
    assert set(report.new) == {
        "denoiser.cross_attention.weight",
        "denoiser.cross_attention.bias",
        "text.table.weight",
    }
    assert report.dropped == ()
    assert "text.table.weight" in caplog.text
    saved = read_training_checkpoint(path)["state_dict"]
    assert all(torch.equal(module.state_dict()[key], saved[key]) for key in report.loaded)


def test_warm_start_refuses_another_shape_or_codec(tmp_path: Path) -> None:
    module = build_module()
    module.checkpoint_metadata["codec_hash"] = "one"
    run(tmp_path, 2, module=module)
    path = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(CheckpointError, match=r"cross_attention.weight: \(8, 6\) in the checkpoint, \(8, 5\)"):
        warm_start(build_module(context_dim=5), path)
    other = build_module()
    other.checkpoint_metadata["codec_hash"] = "two"
    with pytest.raises(CheckpointError, match=r"codec one.*codec two"):
        warm_start(other, path)


def test_minimum_snr_weights_reach_the_loss(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", 1)[2].losses
    weighted = run(tmp_path / "weighted", 1, module=build_module(min_snr_gamma=5.0))[2].losses
    assert plain != weighted


def test_optimizer_is_a_partial_over_groups() -> None:
    module = build_module()
    module.make_lr_schedule = None
    module.make_optimizer = partial(torch.optim.AdamW, lr=0.5, weight_decay=0.25)
    assert [group["weight_decay"] for group in module.configure_optimizers().param_groups] == [0.25, 0.0]
