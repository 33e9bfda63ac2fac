"""Train the embedded extractor: a classifier of sounds that must also judge noisy, filtered and generated ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from foley.core.seeding import numpy_generator, torch_generator
from foley.data.dataset import AudioItem
from foley.metrics.embedded.network import EmbeddedExtractor


@dataclass(frozen=True)
class TrainingClip:
    """Mel power `[M, F]` of a clip and the index of its label."""

    power: Tensor
    target: int


class WindowDataset(Dataset[tuple[Tensor, int]]):
    """Windows `[M, window_frames]` of clips; the draw in the key (clip, draw) decides where the window lies.

    A longer clip is cropped anywhere, a shorter one lies anywhere in silence.
    """

    def __init__(self, clips: Sequence[TrainingClip], window_frames: int, seed: int) -> None:
        self._clips, self._window_frames, self._seed = clips, window_frames, seed

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, draw = key
        clip = self._clips[index]
        room = clip.power.shape[1] - self._window_frames
        offset = round(float(numpy_generator("extractor_window", self._seed, draw).random()) * abs(room))
        if room >= 0:
            return clip.power[:, offset : offset + self._window_frames], clip.target
        return nn.functional.pad(clip.power, (offset, -room - offset)), clip.target


class BalancedSampler(Sampler[tuple[int, int]]):
    """`draws` keys with replacement; a class of n clips is drawn with weight `n ** (1 - balance)`.

    balance = 1 draws all classes alike, 0 draws all clips alike.
    """

    def __init__(self, targets: Sequence[int], draws: int, balance: float, seed: int) -> None:
        classes, counts = torch.tensor(targets).unique(return_inverse=True, return_counts=True)[1:]
        self._weights = counts[classes].double() ** -balance
        self._draws, self._seed = draws, seed

    def __len__(self) -> int:
        return self._draws

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch_generator("extractor_sampler", self._seed)
        chosen = torch.multinomial(self._weights, self._draws, replacement=True, generator=generator)
        return zip(chosen.tolist(), range(self._draws), strict=True)


@dataclass(frozen=True)
class MelAugmentation:
    """Damage done to mel power `[B, M, F]`, where filters are gains and uncorrelated noise adds.

    Attributes:
        equaliser_db: largest gain of a random smooth filter.
        jitter_db: largest standard deviation of independent errors of the cells, as a codec makes them.
        snr_db: range of the noise level below the mean power.
        low_pass_share: share of clips cut off above a random band of the upper half.
        mask_bands, mask_frames: largest masked block (SpecAugment, Park et al. 2019).
    """

    equaliser_db: float = 4.0
    jitter_db: float = 3.0
    snr_db: tuple[float, float] = (10.0, 60.0)
    low_pass_share: float = 0.3
    mask_bands: int = 8
    mask_frames: int = 16

    def __call__(self, power: Tensor, generator: torch.Generator) -> Tensor:
        """A damaged copy of `power`."""
        batch, bands, frames = power.shape

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=generator)

        knots = uniform(-self.equaliser_db, self.equaliser_db, batch, 1, 6)
        filter_db = nn.functional.interpolate(knots, bands, mode="linear", align_corners=True).transpose(1, 2)
        jitter = torch.randn(power.shape, generator=generator) * uniform(0, self.jitter_db, batch, 1, 1)
        damaged = power * 10 ** ((filter_db + jitter) / 10)

        band = torch.arange(bands).view(1, bands, 1)
        cut = torch.where(
            uniform(0, 1, batch, 1, 1) < self.low_pass_share, uniform(bands / 2, bands, batch, 1, 1), bands
        )
        damaged = torch.where(band < cut, damaged, damaged * 1e-5)

        level = power.mean(dim=(1, 2), keepdim=True) * 10 ** (-uniform(*self.snr_db, batch, 1, 1) / 10)
        tilt = torch.linspace(0, 1, bands).view(1, bands, 1) * uniform(-2, 2, batch, 1, 1)
        damaged = damaged + level * 10**tilt * (0.5 + uniform(0, 1, batch, bands, frames))

        return (
            damaged
            * _outside_block(band, bands, self.mask_bands, uniform(0, 1, 2, batch, 1, 1))
            * _outside_block(
                torch.arange(frames).view(1, 1, frames), frames, self.mask_frames, uniform(0, 1, 2, batch, 1, 1)
            )
        )


def _outside_block(position: Tensor, size: int, largest: int, draws: Tensor) -> Tensor:
    """1 outside a random block of up to `largest` positions, 0 inside; `draws [2, B, 1, 1]` in [0, 1)."""
    width = draws[0] * largest
    start = draws[1] * (size - width)
    return 1 - ((position >= start) & (position < start + width)).float()


class ExtractorTraining(pl.LightningModule):
    """Cross-entropy training under a one-cycle learning rate.

    Args:
        steps: length of the learning-rate cycle, in optimizer steps.
    """

    def __init__(
        self,
        extractor: EmbeddedExtractor,
        augmentation: MelAugmentation,
        steps: int,
        learning_rate: float,
        weight_decay: float,
        label_smoothing: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.extractor, self._augmentation = extractor, augmentation
        self._steps, self._learning_rate, self._weight_decay = steps, learning_rate, weight_decay
        self._loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self._seed = seed

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """`batch` is (mel power `[B, M, F]`, targets `[B]`)."""
        power, targets = batch
        generator = torch_generator("extractor_augmentation", self._seed, self.global_step)
        damaged = self._augmentation(power.cpu(), generator).to(power.device)
        logits = self.extractor.from_spectrogram(self.extractor.spectrogram.scale(damaged)).logits
        loss: Tensor = self._loss(logits, targets)
        accuracy = (logits.argmax(dim=1) == targets).float().mean()
        self.log_dict({"train/loss": loss, "train/accuracy": accuracy}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a one-cycle schedule per step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self._learning_rate, weight_decay=self._weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self._learning_rate, total_steps=self._steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def training_loader(
    groups: Mapping[str, Sequence[AudioItem]],
    extractor: EmbeddedExtractor,
    seed: int,
    window_seconds: float,
    batch_size: int,
    steps: int,
    balance: float,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """`steps` batches of (mel power `[B, M, F]`, targets `[B]`) drawn from all `groups` of clips.

    The spectrograms are computed once: they are the larger half of a step, and a quarter of the waveforms' memory.
    """
    index = {label: position for position, label in enumerate(extractor.labels)}
    spectrogram = extractor.spectrogram
    clips = [
        TrainingClip(spectrogram.power(item.audio.unsqueeze(0))[0], index[item.label])
        for group in groups.values()
        for item in group
    ]
    sampler = BalancedSampler([clip.target for clip in clips], batch_size * steps, balance, seed)
    window_frames = round(window_seconds * extractor.sample_rate_hz / spectrogram.hop_samples) + 1
    dataset = WindowDataset(clips, window_frames, seed)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler)  # type: ignore[arg-type]
