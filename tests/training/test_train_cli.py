"""`train.py` from the outside: compose, train, resume, warm-start, sweep, and train in parallel."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from latent_parts import latent_cache_writer
from omegaconf import DictConfig

from foley.core.components import CheckpointError, build_component, save_component
from foley.core.config import PROJECT_ROOT
from foley.core.seeding import torch_generator
from foley.data.latents import StaleCacheError
from foley.system.checkpoint import load_trained, read_training_checkpoint
from foley.system.system import load_system
from foley.training.callbacks.monitoring import AppendingCSVLogger
from foley.training.distillation import Teacher
from foley.training.run import _batch_counts, find_checkpoint, optimized_metric, train

QUICK = [
    "trainer.max_time=null",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.progress=null",
    "lr_schedule.warmup_steps=1",
]
SMALL = ["model.width=16", "model.depth=2", "model.num_heads=2", "data.batch_size=4", *QUICK]
STAGES = ("pretrain", "align", "finetune")
DIFFUSION = [*(f"ezaudio_xl stage={stage}" for stage in STAGES), "ezaudio_xl", "ezaudio_l"]
DIFFUSION += [*(f"tiny stage={stage}" for stage in STAGES), "tiny_ddp_smoke"]


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose("train", ["name=test", *overrides])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four random two-second clips as the tiny codec's latents."""
    channels = config().codec.latent_channels
    folder = tmp_path_factory.mktemp("latents") / "cache"
    with latent_cache_writer(folder, "hash", 24000, 480) as writer:
        for index in range(24):
            mean = torch.randn(channels, 100, generator=torch_generator("clip", index))
            split = "val" if index >= 20 else "train"
            writer.add(mean, torch.ones_like(mean), f"clip{index:02d}", "a dog barks", "dog", split, 2.0)
    return folder


def small(cache: Path, folder: Path, experiment: str, *overrides: str) -> DictConfig:
    data = [f"data.cache_dir={cache}", f"paths.output_dir={folder}"]
    return config(*f"experiment={experiment}".split(), *SMALL, *data, *overrides)


def command(*overrides: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, str(PROJECT_ROOT / "train.py"), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.parametrize("experiment", DIFFUSION)
def test_experiments_compose(experiment: str) -> None:
    cfg = config(*f"experiment={experiment}".split())
    assert cfg.task._target_ == "foley.training.diffusion.DiffusionTraining"
    assert cfg.task.denoiser.latent_channels == cfg.codec.latent_channels
    assert (cfg.task.text is None) == (cfg.model.context_dim is None) == ("pretrain" in experiment)


def test_published_numbers() -> None:
    stages = [config("experiment=ezaudio_xl", f"stage={stage}") for stage in STAGES]
    assert [stage.trainer.max_steps for stage in stages] == [100_000, 50_000, 30_000]
    assert [stage.optimizer.lr for stage in stages] == [1e-4, 5e-5, 1e-5]
    assert {stage.data.batch_size for stage in stages} == {128}


@pytest.mark.parametrize("group", ["trainer=gpu", "trainer=ddp", "trainer=fsdp", "logger=many", "debug=fdr"])
def test_groups_compose(group: str) -> None:
    cfg = config("experiment=tiny", "stage=pretrain", "data.cache_dir=x", group)
    assert cfg.trainer._target_ == "pytorch_lightning.Trainer"
    assert None not in (cfg.callbacks.ema, cfg.callbacks.non_finite)
    assert (cfg.trainer.precision == "bf16-mixed") or "trainer" not in group


def test_validation_is_counted_in_steps_whatever_a_device_accumulates() -> None:
    """The clips of an epoch and of a validation stay too."""
    plain, accumulated, share = (
        _batch_counts(config("experiment=tiny", "data.cache_dir=x", *options).trainer)
        for options in ([], ["trainer.accumulate_grad_batches=4"], ["trainer.val_check_interval=0.5"])
    )
    assert set(plain) == {"val_check_interval", "limit_val_batches"}
    assert accumulated == {name: 4 * count for name, count in plain.items()}
    assert "val_check_interval" not in share


@pytest.mark.parametrize("logger", [None, "tensorboard", "wandb", "many"])
def test_a_csv_is_written_whatever_the_logger(logger: str | None) -> None:
    """Of it the dashboard is made; one says so who takes it out."""
    chosen = [f"logger={logger}"] if logger else []
    loggers = config("experiment=tiny", "data.cache_dir=x", "paths.output_dir=y", *chosen).logger
    assert loggers.csv == {"_target_": f"{AppendingCSVLogger.__module__}.AppendingCSVLogger", "save_dir": "y"}
    assert set(loggers) == {"csv"} | ({"tensorboard", "wandb"} if logger == "many" else {logger} - {None})


def test_train_resume_and_warm_start(cache: Path, tmp_path: Path) -> None:
    first = tmp_path / "pretrain"
    metrics = train(small(cache, first, "tiny stage=pretrain"))
    assert {"train/loss", "val/loss", "val/loss_noise_level_0"} <= metrics.keys()
    assert (first / "config.yaml").is_file()
    last = first / "checkpoints/last.ckpt"
    assert read_training_checkpoint(last)["foley"]["codec_hash"] == "hash"
    assert load_trained(last, "denoiser").latent_channels == config().codec.latent_channels
    assert (load_trained(last, "normaliser").std > 1).all()

    train(
        small(cache, first, "tiny stage=pretrain", "ckpt_path=auto", "trainer.max_steps=6", "lr_schedule.total_steps=4")
    )
    assert read_training_checkpoint(last)["global_step"] == 6
    rows = list(csv.DictReader((first / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(6))

    second = tmp_path / "align"
    train(small(cache, second, "tiny", f"ckpt={last}"))
    checkpoint = read_training_checkpoint(second / "checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 4
    assert any("cross_attention" in key for key in checkpoint["state_dict"])
    assert any(key.startswith("text.") for key in checkpoint["state_dict"])


def test_a_student_is_distilled_from_a_training_checkpoint(cache: Path, tmp_path: Path) -> None:
    train(small(cache, tmp_path / "teacher", "tiny", "trainer.max_steps=2", "callbacks.audio_samples=null"))
    teacher = tmp_path / "teacher/checkpoints/last.ckpt"
    overrides = [f"system={teacher}", f"data.cache_dir={cache}", f"paths.output_dir={tmp_path / 'student'}", *QUICK]
    cfg = config("experiment=tiny_lcm", "data.batch_size=4", "trainer.precision=32-true", *overrides)
    metrics = train(cfg)
    assert {"train/loss", "val/loss"} <= metrics.keys()
    last = tmp_path / "student/checkpoints/last.ckpt"
    student = load_system(last, with_codec=False)
    assert (student.consistency.lowest_scale, student.consistency.highest_scale) == (2.0, 6.0)
    assert student.modules["denoiser"].guidance_embedding is not None
    stored = read_training_checkpoint(last)["foley"]
    assert stored["codec_hash"] == "hash"
    normalisers = [load_trained(path, "normaliser").state_dict() for path in (teacher, last)]
    assert all(torch.equal(normalisers[0][key], normalisers[1][key]) for key in normalisers[0])
    with pytest.raises(CheckpointError, match="is a student itself"):
        Teacher.load(str(last))


def test_published_distillation() -> None:
    cfg = config("experiment=audiolcm", "system=x", "data.cache_dir=y")
    assert (cfg.optimizer.lr, cfg.data.batch_size, cfg.trainer.max_steps) == (9.6e-5, 8, 15_000)
    assert (cfg.task.consistency.jump_steps, cfg.task.target_decay) == (20, 0.95)
    assert cfg.task.consistency.guidance_range == [5.0, 13.0]


def test_only_a_codec_asks_for_unused_parameters() -> None:
    assert config("experiment=tiny_vae", "trainer=ddp").trainer.strategy.find_unused_parameters is True
    assert config("experiment=tiny", "trainer=ddp").trainer.strategy.find_unused_parameters is False


def test_the_codec_must_have_made_the_latents(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = {"_target_": "foley.models.codec.waveform_vae.WaveformVAE", "channels": 2, "latent_channels": 2}
    save_component(build_component(codec), codec, tmp_path / "codec")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StaleCacheError, match="encoded by the codec hash, but the codec in use is"):
        train(small(cache, tmp_path / "run", "tiny stage=pretrain", "codec_path=codec"))
    monkeypatch.setattr("foley.system.system.hash_module", lambda module: "hash")
    train(small(cache, tmp_path / "run", "tiny stage=pretrain", "codec_path=codec", "trainer.max_steps=2"))
    stored = read_training_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["foley"]["codec_dir"]
    assert not Path(stored).is_absolute()
    assert (PROJECT_ROOT / stored).resolve() == (tmp_path / "codec").resolve()


def test_diffusion_needs_latents(tmp_path: Path) -> None:
    clips = ["data=procedural", "data.splits.sizes={train: 64}", f"paths.output_dir={tmp_path}"]
    with pytest.raises(TypeError, match="a denoiser trains on data=latents, got AudioDataModule"):
        train(config("experiment=tiny", "stage=pretrain", *clips))


def test_a_recipe_as_typed_says_in_one_message_what_it_lacks() -> None:
    with pytest.raises(
        SystemExit, match=r"it lacks\n  data\.cache_dir=\.\.\.  .*foley encode .*\n  system=\.\.\.  the teacher"
    ):
        train(config("experiment=audiolcm"))


def test_a_checkpoint_to_resume_from_must_exist(tmp_path: Path) -> None:
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint("auto", tmp_path) is None
    with pytest.raises(CheckpointError, match=r"ckpt_path=nowhere\.ckpt does not exist"):
        find_checkpoint("nowhere.ckpt", tmp_path)


def test_a_sweep_gets_a_number() -> None:
    cfg = config("experiment=tiny", "stage=pretrain", "optimized_metric=val/loss")
    assert optimized_metric(cfg, {"val/loss": 2.0}) == 2.0
    assert optimized_metric(cfg, {"val/loss": float("nan")}) == float("inf")
    with pytest.raises(KeyError, match="val/loss was not logged"):
        optimized_metric(cfg, {})


@pytest.mark.slow
def test_multirun_and_many_loggers(cache: Path, tmp_path: Path) -> None:
    overrides = ["-m", "experiment=tiny", "stage=pretrain", "logger=many", "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    result = command(*overrides, f"data.cache_dir={cache}", *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    for job in ("0", "1"):
        assert (tmp_path / job / "checkpoints/last.ckpt").is_file()
        assert list((tmp_path / job / "wandb").glob("offline-run-*"))
        assert list((tmp_path / job / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_two_processes_share_the_samples(cache: Path, tmp_path: Path) -> None:
    overrides = ["experiment=tiny_ddp_smoke", "trainer.devices=2", f"hydra.run.dir={tmp_path}"]
    result = command(*overrides, f"data.cache_dir={cache}", *SMALL, "data.batch_size=8")
    assert result.returncode == 0, result.stderr[-3000:]
    checkpoint = read_training_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 4
    # 20 clips are 2 steps of 2 x 4 different clips: 4 steps are 2 epochs.
    assert checkpoint["LatentDataModule"]["epoch"] == 2


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_two_nodes_that_torchrun_starts_train_one_run_and_one_process_goes_on(cache: Path, tmp_path: Path) -> None:
    """Two agents of one process each stand for two nodes; then the whole batch is one process's, in two halves."""
    run = tmp_path / "run"
    recipe = [
        "experiment=tiny_ddp_smoke",
        f"hydra.run.dir={run}",
        f"data.cache_dir={cache}",
        *SMALL,
        "data.batch_size=8",
    ]
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    program = [str(PROJECT_ROOT / "train.py"), *recipe, "trainer.num_nodes=2", "trainer.devices=1"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *nodes, f"--node-rank={rank}", *program],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    words = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], words
    assert "a step trains on data.batch_size=8 clips: 4 at a time (devices: 2, trainer.acc" in words[0]
    assert "a step trains on" not in words[1]
    steps = [int(row["step"]) for row in csv.DictReader((run / "metrics.csv").open()) if row["train/loss"]]
    assert steps == [0, 1, 2, 3]
    state = read_training_checkpoint(run / "checkpoints/last.ckpt")["LatentDataModule"]
    assert state == {"epoch": 2, "consumed": 0, "size": 20, "batches": 4, "accumulated": 1}
    alone = ["trainer=cpu", "trainer.max_steps=6", "trainer.accumulate_grad_batches=2", "ckpt_path=auto"]
    result = command(*recipe, *alone)
    assert result.returncode == 0, result.stderr[-3000:]
    state = read_training_checkpoint(run / "checkpoints/last.ckpt")["LatentDataModule"]
    assert state == {"epoch": 3, "consumed": 0, "size": 20, "batches": 12, "accumulated": 2}


@pytest.mark.slow
def test_two_processes_train_a_codec_and_its_discriminator(tmp_path: Path) -> None:
    """Two steps without the discriminator, which has no gradients then, and two with it."""
    clips = ["data=procedural", "data.splits.sizes={train: 16, val: 4}", "data.splits.duration_seconds=0.5"]
    sizes = ["data.duration_seconds=0.3", "data.batch_size=4", "codec.width=16", "codec.latent_channels=4"]
    parallel = ["trainer=ddp_cpu", "trainer.devices=2", "task.adversarial_start_step=2"]
    result = command("experiment=tiny_vae", f"hydra.run.dir={tmp_path}", *clips, *sizes, *parallel, *QUICK)
    assert result.returncode == 0, result.stderr[-3000:]
    checkpoint = read_training_checkpoint(tmp_path / "checkpoints/last.ckpt")
    updates = [{slot["step"].item() for slot in state["state"].values()} for state in checkpoint["optimizer_states"]]
    assert updates == [{4}, {2}]


@pytest.mark.slow
def test_optuna_searches(cache: Path, tmp_path: Path) -> None:
    overrides = ["-m", "experiment=tiny", "stage=pretrain", "hparams_search=optuna", "hydra.sweeper.n_trials=2"]
    result = command(*overrides, f"hydra.sweep.dir={tmp_path}", f"data.cache_dir={cache}", *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "optimization_results.yaml").is_file()
