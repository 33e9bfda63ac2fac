"""What a run says of its codec when it starts, and the weights that it may start from."""

import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_train_cli import cache, small  # noqa: F401  (the fixture of cached latents)

from foley.core.components import build_component, save_component
from foley.models.codec.normaliser import LatentNormaliser
from foley.training.run import train, warm_start


def test_latents_of_another_width_are_refused_before_the_text_encoder_loads(
    cache: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = small(cache, tmp_path, "tiny stage=align", "callbacks.audio_samples=null")
    OmegaConf.update(cfg, "model.latent_channels", 5)
    monkeypatch.setattr("foley.models.text.small._load_tokenizer", lambda *args: pytest.fail("the text encoder loads"))
    with pytest.raises(ValueError, match=r"the latents have \d+ channels, but the model takes 5: .*codec_path=CODEC"):
        train(cfg)


def test_statistics_of_another_width_are_refused_by_name() -> None:
    normaliser, other = LatentNormaliser(3), LatentNormaliser(4)
    with pytest.raises(ValueError, match=r"the latents have 4 channels, but the model takes 3: .*\(codec=\.\.\."):
        normaliser.set(other.mean, other.std)


def test_a_run_whose_checkpoints_could_not_be_sampled_says_so(
    cache: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg = small(cache, tmp_path, "tiny stage=align", "callbacks.audio_samples=null")
    OmegaConf.update(cfg, "trainer.max_steps", 2)
    assert cfg.codec_path is None
    with caplog.at_level(logging.WARNING):
        train(cfg)
    assert "no codec_path=: checkpoints of this run will not say which codec made their latents" in caplog.text


def test_a_run_starts_from_the_folder_of_a_component(tmp_path: Path) -> None:
    from training_parts import build_module

    module = build_module()
    config = {"_target_": "foley.models.codec.normaliser.LatentNormaliser", "channels": len(module.normaliser.mean)}
    other = build_component(config)
    other.mean.fill_(0.5)
    save_component(other, config, tmp_path)
    module.component_configs = {"normaliser": config}
    assert set(warm_start(module, str(tmp_path)).loaded) == {"normaliser.mean", "normaliser.std"}
    assert module.normaliser.mean.unique().item() == 0.5
