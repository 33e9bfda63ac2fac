"""Training of the embedded extractor: what is drawn, what damage keeps, and that it learns."""

import pytest
import pytorch_lightning as pl
import torch

from foley.data.dataset import AudioItem
from foley.data.manifest import ManifestEntry
from foley.data.procedural import CLASS_NAMES
from foley.metrics.embedded.data import build_labels
from foley.metrics.embedded.network import EmbeddedExtractor
from foley.metrics.embedded.train import (
    BalancedSampler,
    ExtractorTraining,
    MelAugmentation,
    TrainingClip,
    WindowDataset,
    training_loader,
)

RATE_HZ = 24000


def entry(id: str, label: str, tmp_path) -> ManifestEntry:
    return ManifestEntry(tmp_path / id, "caption", id, label=label)


def test_labels_are_procedural_classes_and_frequent_real_ones(tmp_path) -> None:
    entries = [entry(f"digits/{i}", "seven", tmp_path) for i in range(5)]
    entries += [entry("effects/1", "rain", tmp_path), entry("effects/2", "rare", tmp_path)]
    labels = build_labels(entries, minimum_clips=5)
    assert labels.labels == [*CLASS_NAMES, "seven"]
    assert labels.groups == {"procedural": list(CLASS_NAMES), "digits": ["seven"], "effects": ["rain"]}


def test_windows_crop_long_clips_and_place_short_ones_in_silence() -> None:
    long, short = torch.arange(20.0).repeat(2, 1), torch.ones(2, 3)
    windows = WindowDataset([TrainingClip(long, 0), TrainingClip(short, 1)], window_frames=8, seed=0)
    for draw in range(20):
        cropped = windows[0, draw][0]
        assert cropped.shape == (2, 8)
        assert torch.equal(cropped[0].diff(), torch.ones(7))
        assert windows[1, draw][0].sum() == short.sum()
    assert torch.equal(windows[0, 3][0], windows[0, 3][0])
    assert len({float(windows[0, draw][0][0, 0]) for draw in range(20)}) > 3


@pytest.mark.parametrize(("balance", "share"), [(1.0, 0.5), (0.0, 0.9), (0.5, 0.75)])
def test_balance_is_the_exponent_of_class_sizes(balance: float, share: float) -> None:
    targets = [0] * 900 + [1] * 100
    keys = list(BalancedSampler(targets, draws=20000, balance=balance, seed=0))
    assert sum(targets[index] == 0 for index, _ in keys) / 20000 == pytest.approx(share, abs=0.02)
    assert [draw for _, draw in keys] == list(range(20000))


def test_augmentation_is_seeded_and_keeps_its_input() -> None:
    power = torch.rand(3, 64, 50) + 0.1
    before = power.clone()
    first = MelAugmentation()(power, torch.Generator().manual_seed(1))
    second = MelAugmentation()(power, torch.Generator().manual_seed(1))
    assert torch.equal(first, second)
    assert torch.equal(power, before)
    assert (first >= 0).all()
    assert first.isfinite().all()


def test_two_sounds_are_told_apart_after_a_few_steps() -> None:
    torch.manual_seed(0)
    extractor = EmbeddedExtractor(["low", "high"], {}, widths=(4, 8, 8, 8, 8), feature_dim=16)
    time = torch.arange(RATE_HZ // 2) / RATE_HZ
    items = [
        AudioItem(torch.sin(2 * torch.pi * base * (1 + 0.02 * i) * time), "", label)
        for i in range(8)
        for label, base in (("low", 200), ("high", 3000))
    ]
    loader = training_loader({"tones": items}, extractor, 0, window_seconds=0.5, batch_size=16, steps=30, balance=1.0)
    module = ExtractorTraining(extractor, MelAugmentation(), 30, 0.01, 0.0, 0.0, seed=0)
    trainer = pl.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, loader)
    with torch.no_grad():
        logits = extractor.eval()(torch.stack([item.audio for item in items])).logits
    assert logits.argmax(1).tolist() == [0, 1] * 8
