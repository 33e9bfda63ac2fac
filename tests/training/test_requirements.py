"""What a recipe says, as it is typed, of what it lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from foley.core.config import CONFIG_DIR, PROJECT_ROOT
from foley.training import requirements
from foley.training.requirements import refuse_missing
from foley.training.values import require_values

EXPERIMENTS = sorted(
    str(file.relative_to(CONFIG_DIR / "experiment").with_suffix(""))
    for file in (CONFIG_DIR / "experiment").rglob("*.yaml")
)
ON_WHAT_SHIPS = {"demo/codec", "demo/decoder", "demo/vae", "first", "tiny_mel_vae", "tiny_vae", "tiny_vocoder"}


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", ["name=test", *overrides])


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, and nothing of the Hugging Face hub."""
    monkeypatch.setattr(requirements, "gpu_memory_gib", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def lacks(*overrides: str) -> str:
    with pytest.raises(SystemExit) as refusal:
        refuse_missing(config(*overrides))
    return str(refusal.value)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_recipe_as_typed_begins_or_says_all_that_it_lacks(experiment: str) -> None:
    cfg = config(f"experiment={experiment}")
    require_values(cfg)
    if experiment in ON_WHAT_SHIPS:
        refuse_missing(cfg)
        return
    told = lacks(f"experiment={experiment}")
    assert told.startswith("test cannot train yet; it lacks\n")
    clips = "data.splits.folder=...  a folder" if experiment == "lora" else "data.splits=...  clips"
    assert ("data.cache_dir=...  latents, made by: foley encode" in told) != (clips in told)
    assert ("trainer=cpu  there is no GPU here" in told) == (cfg.trainer.accelerator == "gpu")
    assert ("text.download=true  fetches" in told) == ("T5" in str(cfg.get("text")))
    assert ("text.directory=..." in told) == (experiment == "video_to_audio")
    assert told.endswith("in a minute.")


def test_a_stage_without_text_lacks_no_encoder() -> None:
    assert "flan-t5" not in lacks("experiment=ezaudio_xl", "stage=pretrain")
    assert "fetches 11.4 GB of google/flan-t5-xl" in lacks("experiment=ezaudio_xl", "stage=align")


def test_what_is_there_is_not_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents/index.json").touch()
    given = [f"data.cache_dir={tmp_path}/latents", f"codec_path={tmp_path}/latents", f"text.name_or_path={tmp_path}"]
    refuse_missing(config("experiment=ezaudio_xl", "trainer=cpu", *given))
    told = lacks("experiment=ezaudio_xl", *given)
    assert [line.split()[0] for line in told.splitlines()[1:-1]] == ["trainer=cpu"]


@pytest.mark.parametrize(
    ("experiment", "named"),
    [
        ("tiny", "data.cache_dir={} no latents are there"),
        ("tiny_vae data=manifest", "data.splits.manifest={} does not exist"),
        ("tiny_vae", "codec_path={} does not exist"),
        ("tiny_lcm data.cache_dir=x", "system={} does not exist"),
    ],
)
def test_what_is_named_must_exist(experiment: str, named: str, tmp_path: Path) -> None:
    option, _, fault = named.partition("={} ")
    told = lacks(*f"experiment={experiment}".split(), f"{option}={tmp_path}/none")
    assert f"{option}={tmp_path}/none  {fault}; " in told


def test_the_files_of_a_published_teacher_are_named_until_they_are_there(tmp_path: Path) -> None:
    given = ["experiment=audiolcm", "system=ezaudio_xl"]
    told = lacks(*given)
    assert "3.5 GB or more that are not on this machine, fetched by: hf download OpenSound/EzAudio ckpts/" in told
    assert "11.4 GB that are not on this machine, by: hf download google/flan-t5-xl" in told
    for folder, files in (
        ("models--OpenSound--EzAudio", ["ckpts/s3/ezaudio_s3_xl.pt", "ckpts/vae/1m.pt"]),
        ("models--google--flan-t5-xl", ["config.json", "model.safetensors"]),
    ):
        put_into_hub(tmp_path / "hub" / folder, files)
    assert "hf download" not in lacks(*given)


def test_published_weights_to_begin_with_are_named_until_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["experiment=ezaudio_xl", "stage=finetune", "ckpt=ezaudio_xl", "data.cache_dir=none"]
    told = lacks(*given)
    assert "ckpt=ezaudio_xl  3.5 GB or more that are not on this machine, fetched by: hf download OpenSound" in told
    assert "codec_path=..." not in told  # it is theirs
    for file in ("ckpts/s3/ezaudio_s3_xl.pt", "ckpts/vae/1m.pt"):
        (tmp_path / "folder/OpenSound/EzAudio" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder/OpenSound/EzAudio" / file).touch()
    monkeypatch.setenv("FOLEY_HUB_DIR", str(tmp_path / "folder"))
    assert "ckpt=" not in lacks(*given)
    assert f"ckpt={tmp_path}/gone  does not exist; the weights to start from" in lacks(
        *given[:2], f"ckpt={tmp_path}/gone"
    )


def test_a_controlnet_wants_the_codec_that_its_system_does_not_bring(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    wanted = "codec_path=...  the codec that made the latents: that of the system"
    assert wanted in lacks("experiment=tiny_controlnet", f"system={tmp_path}/last.ckpt", "data.cache_dir=none")
    assert wanted not in lacks("experiment=tiny_controlnet", "data.cache_dir=none")


def put_into_hub(folder: Path, files: list[str]) -> None:
    """Empty files, as the hub's cache keeps them."""
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    for name in files:
        (folder / "snapshots/abc" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "snapshots/abc" / name).touch()


def test_a_small_gpu_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = ["experiment=audiolcm_mel_vae", "data=procedural", "gpu_memory_gib=30"]
    monkeypatch.setattr(requirements, "gpu_memory_gib", lambda: [80.0, 24.0])
    refuse_missing(config(*given))
    assert "wants GPUs of 30 GiB or more by its estimate; the smallest here has 24 GiB" in caplog.text
    assert "gradient_checkpointing" not in caplog.text  # a codec has none
    list(requirements._gpu(config("experiment=ezaudio_xl")))
    assert "the smallest here has 24 GiB; model.gradient_checkpointing=true takes far less" in caplog.text
    monkeypatch.setattr(requirements, "gpu_memory_gib", lambda: None)
    assert "there is no GPU here, and the recipe wants one of 30 GiB or more" in lacks(*given)


def test_the_estimate_of_memory_holds_what_training_cannot_do_without() -> None:
    """Weights, gradients, two moments and the averages of EzAudio's denoisers, in float32, and their activations."""
    for experiment, parameters in (("ezaudio_xl", 874_760_256), ("ezaudio_l", 596_830_080)):
        wanted = config(f"experiment={experiment}").gpu_memory_gib
        assert 20 * parameters / 2**30 < wanted < 80 * parameters / 2**30
        assert f"the recipe wants one of {wanted:g} GiB or more" in lacks(f"experiment={experiment}")


def test_weights_in_the_cache_of_the_hub_are_found(tmp_path: Path) -> None:
    assert not requirements._in_hub_cache("google/flan-t5-xl", "main")
    put_into_hub(tmp_path / "hub/models--google--flan-t5-xl", ["config.json", "model.safetensors.index.json"])
    assert requirements._in_hub_cache("google/flan-t5-xl", "main")


def test_nothing_heavy_is_loaded_to_say_so(tmp_path: Path) -> None:
    """The command in its process, and then the modules of that process."""
    program = (
        "import runpy, sys\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "finally: print(*{'torch', 'pytorch_lightning', 'transformers', 'matplotlib'} & set(sys.modules), 'loaded')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "experiment=ezaudio_xl", f"hydra.run.dir={tmp_path}/run"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_CACHE": str(tmp_path)},
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "loaded\n")
    assert [line.split()[0] for line in done.stderr.splitlines()] == [
        "ezaudio_xl",
        "data.cache_dir=...",
        "text.download=true",
        "trainer=cpu",
        "codec_path=...",
        "Without",
    ]
