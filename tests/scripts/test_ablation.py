"""The denoisers of Fig. 2 of EzAudio: one recipe, and what each block costs."""

import json
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from foley.core.config import PROJECT_ROOT

MILLIONS = {"ezaudio": 596.8, "crossdit": 688.7, "pixart": 537.7, "stable_audio": 688.2}


def composed(config, *overrides):
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose(config, overrides=list(overrides), return_hydra_config=True)


def recipe(name):
    """Everything but the denoiser, its numbers for the denoiser included."""
    cfg = composed("train", "experiment=ablation", f"model={name}")
    assert cfg.model.depth == 24
    plain = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key not in ("hydra", "model")]))
    plain["optimizer"] = OmegaConf.to_container(cfg.optimizer, resolve=True)
    return plain, OmegaConf.to_container(cfg.model)


@pytest.mark.parametrize("name", MILLIONS)
def test_ablations_differ_in_the_block_alone(name):
    settings, model = recipe(name)
    expected, base = recipe("ezaudio")
    assert settings == expected
    shared = ("latent_channels", "context_dim", "width", "depth", "num_heads", "gradient_checkpointing")
    assert {key: model[key] for key in shared} == {key: base[key] for key in shared}
    assert (settings["trainer"]["max_steps"], settings["optimizer"]["lr"]) == (80000, 1e-4)


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_the_script_compares_the_denoisers_of_the_ablations(name, millions):
    compared = composed("script/compare_parameters").denoisers[name]
    trained = composed("train", "experiment=ablation", f"model={name}").model
    with open_dict(trained):
        assert trained.pop("xavier_output")  # where a layer starts is nothing to count
    assert compared == trained
    with torch.device("meta"):
        denoiser = instantiate(compared)
    assert round(sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6, 1) == millions


@pytest.mark.slow
def test_the_script_writes_sizes_and_memory(tmp_path):
    script, results = str(PROJECT_ROOT / "scripts" / "compare_parameters.py"), tmp_path / "parameters.json"
    command = [sys.executable, script, "size=tiny", "codec=tiny", "device=cpu", "autocast=false", "num_frames=50"]
    command += [f"results_file={results}", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "| crossdit |" in done.stdout + done.stderr
    written = json.loads(results.read_text())
    assert written["settings"]["memory"] == "counted"
    for name, row in written["rows"].items():
        with torch.device("meta"):
            denoiser = instantiate(composed("script/compare_parameters", "size=tiny", "codec=tiny").denoisers[name])
        assert row["parameters"] == sum(parameter.numel() for parameter in denoiser.parameters())
        assert row["state_bytes"] == 16 * row["parameters"]
        assert row["state_bytes"] < row["checkpointed_bytes"] < row["stored_bytes"]
