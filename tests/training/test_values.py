"""Settings that no run can begin with, refused by name before anything is made or loaded."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from foley.core.config import CONFIG_DIR
from foley.training.run import train
from foley.training.values import require_values


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", ["name=test", *overrides])


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("optimizer=nonsense", "optimizer=nonsense: optimizer has settings of its own: .* optimizer.lr=1e-4"),
        ("callbacks.ema=nonsense", "callbacks.ema=nonsense: .*callbacks.ema=null, which leaves it out"),
        ("logger.csv=true", "logger.csv=True: .*logger.csv=null"),
        ("optimizer.lr=abc", "optimizer.lr=abc: give a number > 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan: give a number > 0"),
        ("optimizer.lr=null", "optimizer.lr=null: give a number > 0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1: give a number >= 0"),
        ("data.batch_size=-1", "data.batch_size=-1: give a whole number >= 1"),
        ("data.batch_size=1.5", "data.batch_size=1.5: give a whole number >= 1"),
        ("seed=abc", "seed=abc: give a whole number >= 0"),
        ("trainer.max_steps=0", "trainer.max_steps=0: give a whole number >= 1"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval=0: give a number > 0"),
        ("trainer.gradient_clip_val=0.5", "trainer.gradient_clip_val=0.5: .*task.gradient_clip_norm=0.5"),
        ("task.gradient_clip_norm=0", "task.gradient_clip_norm=0: give a number > 0"),
        ("trainer.max_time=soon", "trainer.max_time=soon: give DD:HH:MM:SS"),
        ("callbacks.ema.decay=2", "callbacks.ema.decay=2: give a number >= 0 and <= 1"),
        ("stage=nonsense", "stage=nonsense: there is no such stage; this recipe has pretrain, align, finetune"),
        ("trainer.max_steps=40", "lr_schedule.warmup_steps=100 leaves nothing .* lr_schedule.warmup_steps=4"),
        ("trainer.max_steps=-1", "gives a cosine no end"),
    ],
)
def test_what_cannot_be_is_refused_by_name(typed: str, told: str, tmp_path: Path) -> None:
    cfg = config("experiment=tiny", f"paths.output_dir={tmp_path}/run", typed)
    with pytest.raises(ValueError, match=told):
        train(cfg)
    assert not (tmp_path / "run").exists()


def test_clips_have_a_channel() -> None:
    with pytest.raises(ValueError, match=r"data\.channels=0: give a whole number >= 1"):
        require_values(config("experiment=tiny_vae", "data.channels=0"))


@pytest.mark.parametrize("typed", ["callbacks.ema=null", "trainer.gradient_clip_val=null", "trainer.max_time=null"])
def test_what_may_be_left_out_may(typed: str) -> None:
    require_values(config("experiment=tiny", typed))


def test_a_fused_optimizer_and_scaled_gradients_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.fused=true with trainer\.precision=16-mixed"):
        require_values(config("experiment=tiny", "optimizer.fused=true", "trainer.precision=16-mixed"))


def test_a_run_without_a_schedule_that_ends_may_go_on_for_ever() -> None:
    require_values(config("experiment=tiny_vae", "lr_schedule=constant", "trainer.max_steps=-1"))
