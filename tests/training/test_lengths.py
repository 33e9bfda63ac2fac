"""Clips of 1 to 10 seconds, from a cache in buckets of like length to a system that is told how long its clips are."""

from pathlib import Path

import pytest
import torch
from latent_parts import latent_cache_writer
from small_system import CONFIGS
from training_parts import CHANNELS, TinyText, build_module, run

from foley.core.components import build_component
from foley.data.datamodule import LatentDataModule
from foley.diffusion.process import DiffusionProcess
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system

SECONDS = (1.0, 2.0, 5.0, 10.0)
RATE_HZ, HOP_SAMPLES = 2000, 40  # 50 frames a second
TOLD = {**CONFIGS["denoiser"], "length_embedding": True}


@pytest.fixture
def data(tmp_path: Path) -> LatentDataModule:
    """Two batches of each length in an epoch, cut to 10 s: one clip is longer."""
    folder = tmp_path / "latents"
    with latent_cache_writer(folder, "c0dec", RATE_HZ, HOP_SAMPLES) as writer:
        for index in range(16):
            seconds = 12.0 if index == 15 else SECONDS[index % 4]
            latent = torch.full((CHANNELS, round(seconds * 50)), float(index))
            for split in ("train", "val")[: 1 + (index < 4)]:
                writer.add(latent, torch.zeros_like(latent), f"{index}", f"clip {index}", "", split, seconds)
    return LatentDataModule(str(folder), 10.0, batch_size=2, bucket_batches=100)


def test_batches_are_of_one_length_and_ten_seconds_stay_ten(data: LatentDataModule) -> None:
    batches = list(data.train_dataloader())
    assert sorted(batch["latent"].shape[-1] for batch in batches) == [50, 50, 100, 100, 250, 250, 500, 500]
    assert not any(batch["is_padded"] for batch in batches)


class Told(DiffusionProcess):
    """Remembers the lengths that it made noisy."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[int] = []

    def add_noise(self, clean, noise, timestep):
        self.frames.append(clean.shape[-1])
        return super().add_noise(clean, noise, timestep)


def test_a_run_in_buckets_trains_the_duration_condition(data: LatentDataModule, tmp_path: Path) -> None:
    module = build_module(text=TinyText(), mask_padding=True)
    module.denoiser = build_component({**TOLD, "latent_channels": CHANNELS, "context_dim": TinyText.dim}, "denoiser")
    torch.nn.init.normal_(module.denoiser.output_layer.conv.weight)  # it starts at zero, and lets no gradient through
    torch.nn.init.normal_(module.denoiser.output_layer.modulation.weight)
    module.process = Told()
    before = module.denoiser.length_embedding.projection.weight.clone()
    trainer, *_ = run(tmp_path / "run", 2, module=module, data=data, limit_val_batches=0)
    assert trainer.global_step == 2
    assert set(module.process.frames) <= {50, 100, 250, 500}
    assert not torch.equal(module.denoiser.length_embedding.projection.weight, before)


def test_clips_of_every_length_are_made_and_differ_by_the_condition() -> None:
    torch.manual_seed(0)
    system = build_system({**CONFIGS, "denoiser": TOLD})
    denoiser = system.modules["denoiser"]
    for layer in (denoiser.output_layer.conv, denoiser.output_layer.modulation, denoiser.shared_modulation):
        torch.nn.init.normal_(layer.weight, std=0.1)
    sounds = TextToAudio(system)

    def made() -> list[torch.Tensor]:
        return [sounds.generate(["rain"], seconds, num_steps=2).audio for seconds in (1.0, 2.0, 10.0)]

    untold = made()  # the embedding starts at zero
    assert [audio.shape[-1] for audio in untold] == [2000, 4000, 20000]
    torch.nn.init.normal_(denoiser.length_embedding.projection.weight)
    assert not any(torch.allclose(one, other) for one, other in zip(untold, made(), strict=True))
