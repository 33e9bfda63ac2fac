"""The embedded extractor: what its features must not depend on."""

import pytest
import torch
from commands import compose_command

from foley.core.components import load_component, save_component
from foley.core.config import shipped
from foley.core.hashing import hash_file
from foley.metrics.embedded.network import EmbeddedExtractor, RelativeLogMel, RelativeRootMel

LABELS, GROUPS = ["a", "b", "c"], {"first": ["a", "b"]}
RATE_HZ = 24000


def build() -> EmbeddedExtractor:
    torch.manual_seed(0)
    return EmbeddedExtractor(LABELS, GROUPS, widths=(4, 4, 8, 8, 8), feature_dim=16).eval()


def noise(seconds: float) -> torch.Tensor:
    return 0.1 * torch.randn(2, round(seconds * RATE_HZ), generator=torch.Generator().manual_seed(1))


def test_shapes_for_clips_of_any_length() -> None:
    extractor = build()
    for seconds in (0.001, 0.3, 2.0, 10.0):
        output = extractor(noise(seconds))
        assert output.features.shape == (2, 16)
        assert output.logits.shape == (2, 3)


def test_gain_changes_nothing() -> None:
    extractor = build()
    torch.testing.assert_close(extractor(noise(2)).logits, extractor(0.05 * noise(2)).logits, atol=1e-4, rtol=1e-4)


def test_a_clip_does_not_depend_on_its_batch() -> None:
    extractor, clips = build(), noise(2)
    torch.testing.assert_close(extractor(clips).features[:1], extractor(clips[:1]).features)


def test_silence_is_zero_and_finite_all_the_way() -> None:
    silent = torch.zeros(1, RATE_HZ)
    spectrogram = RelativeLogMel(RATE_HZ, 64, 240, 1024, 60.0)(silent)
    assert spectrogram.abs().max() == 0
    assert build()(silent).logits.isfinite().all()


def test_features_barely_change_with_trailing_silence() -> None:
    extractor, clip = build(), noise(2)
    padded = torch.nn.functional.pad(clip, (0, 3 * RATE_HZ))
    own, other = extractor(clip).features, extractor(padded).features
    assert (own - other).norm() < 0.05 * own.norm()


def test_survives_saving_in_half_precision(tmp_path) -> None:
    extractor = build()
    target = f"{EmbeddedExtractor.__module__}.{EmbeddedExtractor.__qualname__}"
    config = {"labels": LABELS, "label_groups": GROUPS, "widths": [4, 4, 8, 8, 8], "feature_dim": 16}
    save_component(extractor, {"_target_": target, **config}, tmp_path, dtype=torch.float16)
    loaded = load_component(tmp_path)
    assert (loaded.labels, loaded.label_groups) == (LABELS, GROUPS)
    torch.testing.assert_close(loaded(noise(2)).logits, extractor(noise(2)).logits, atol=1e-2, rtol=1e-2)


def test_loudness_is_a_power_law_of_what_is_relative() -> None:
    spectrogram = RelativeRootMel(RATE_HZ, 64, 240, 1024, 0.25)
    power = torch.tensor([[[16.0, 1.0], [1e-4, 0.0]]])
    expected = torch.tensor([[[1.0, 0.5], [0.05, 0.0]]])
    torch.testing.assert_close(spectrogram.scale(power), expected)
    torch.testing.assert_close(spectrogram.scale(100 * power), expected)
    assert spectrogram(torch.zeros(1, RATE_HZ)).abs().max() == 0


def test_the_second_extractor_never_hears_a_codec() -> None:
    cfg = compose_command("script/train_second_extractor")
    assert cfg.codec_path is None
    assert cfg.augmentation.jitter_db == 0
    second = load_component(shipped("second_extractor"))
    assert isinstance(second.spectrogram, RelativeRootMel)
    assert second.spectrogram.exponent == cfg.network.exponent
    assert second.label_groups == load_component(shipped("extractor")).label_groups


@pytest.mark.parametrize("name", ["extractor", "second_extractor"])
def test_the_card_of_what_ships_names_its_weights(name: str) -> None:
    weights = shipped(name) / "model.safetensors"
    assert hash_file(weights) in (shipped(name) / "README.md").read_text()
    assert weights.stat().st_size < 1.5e6
