"""An accelerator whose curves are missing has them made, kept and read again; `calibrate=never` refuses as before."""

import stat
from dataclasses import replace

import pytest
import torch
from small_system import CONFIGS, STEPS

from foley.accel.attention.local_global import LocalGlobal
from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.calibration import Calibration, require_calibrations
from foley.accel.caching.prediction import PredictionReuse
from foley.accel.caching.prediction_calibration import PredictionCovariance
from foley.accel.combined import Combined
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.calibrating import NUM_PROMPTS, calibration_prompts
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system

CAPTIONS = [f"a dog barks {number} times" for number in range(9)]


@pytest.fixture(scope="module")
def generator():
    return TextToAudio(replace(build_system(CONFIGS), trained_seconds=0.5))


def generate(generator, folder, calibrate="auto", threshold=0.3, **options):
    cache = AudioCache(folder, threshold=threshold, calibrate=calibrate)
    generator.generate(["rain"], **{**STEPS, **options}, accelerator=cache)
    return cache


def kept(folder):
    return sorted(file.name for file in folder.rglob("*.json"))


def test_missing_curves_are_made_and_kept_for_solver_steps_and_guidance(generator, tmp_path):
    generate(generator, tmp_path)
    generate(generator, tmp_path, solver="euler", num_steps=3)
    generate(generator, tmp_path, guidance=ClassifierFreeGuidance(4.5))
    assert kept(tmp_path) == ["ddim_4_w3.json", "ddim_4_w4.5.json", "euler_3_w3.json"]
    signature = Calibration.load(tmp_path / "euler_3_w3").signature
    assert (signature.solver, signature.num_steps, signature.guidance_scale) == ("euler", 3, 3.0)
    assert signature.model_hash == generator.model_hash


def test_prediction_reuse_has_its_covariance_made(generator, tmp_path):
    reuse = PredictionReuse(target_speedup=2, calibration_dir=tmp_path, calibrate="auto")
    settings = generator.generate(["rain"], **STEPS, accelerator=reuse).settings
    assert (len(settings["computed_evaluations"]), settings["mac_speedup"]) == (2, 2.0)
    assert kept(tmp_path) == ["prediction_ddim_4_w3.json"]
    for quantity, solver in (("auto", "ddpm"), ("prediction", "ddpm")):  # of one the clean latent, of the other not
        reuse = PredictionReuse(quantity=quantity, target_speedup=2, calibration_dir=tmp_path, calibrate="auto")
        generator.generate(["rain"], **{**STEPS, "solver": solver}, accelerator=reuse)
    of_clean, of_prediction = (
        PredictionCovariance.load(tmp_path / f"prediction_{name}").covariance
        for name in ("ddpm_4_w3", "prediction_ddpm_4_w3")
    )
    assert not torch.allclose(of_clean, of_prediction)


def test_curves_of_ddim_with_fresh_noise_are_kept_apart(generator, tmp_path):
    generate(generator, tmp_path)
    generate(generator, tmp_path, eta=1.0)
    assert kept(tmp_path) == ["ddim_4_w3.json", "ddim_eta1_4_w3.json"]
    plain, fresh = (Calibration.load(tmp_path / f"{name}_4_w3") for name in ("ddim", "ddim_eta1"))
    assert (fresh.signature.solver, fresh.timesteps) == ("ddim_eta1", plain.timesteps)
    assert not torch.allclose(plain.mean, fresh.mean)
    with pytest.raises(FileNotFoundError, match=r"solver=ddim eta=1 prompts=FILE steps=4"):
        AudioCache(tmp_path).require_calibration("ddim_eta1", 4, 3.0)


def test_kept_curves_are_read_and_not_made_again(generator, tmp_path):
    first = generate(generator, tmp_path)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    second = generate(generator, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == written
    assert torch.equal(first.schedule.compute, second.schedule.compute)


def test_the_result_is_that_of_a_calibration_by_hand(generator, tmp_path):
    generate(generator, tmp_path)
    for file in tmp_path.glob("ddim_4_w3.*"):
        file.rename(tmp_path / file.name.replace("_w3", ""))
    by_hand = generate(generator, tmp_path, calibrate="never")
    assert torch.equal(by_hand.schedule.compute, generate(generator, tmp_path).schedule.compute)
    assert kept(tmp_path) == ["ddim_4.json"]  # the curves of scripts/calibrate.py serve


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, '{"signature": 1}'])
def test_damaged_curves_are_warned_of_and_made_anew(generator, tmp_path, caplog, content):
    generate(generator, tmp_path)
    (tmp_path / "ddim_4_w3.json").write_text(content, encoding="utf-8")
    generate(generator, tmp_path)
    assert any("ddim_4_w3.json" in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    Calibration.load(tmp_path / "ddim_4_w3")


def test_curves_of_other_weights_are_not_read(generator, tmp_path):
    generate(generator, tmp_path)
    other = TextToAudio(replace(build_system(CONFIGS), trained_seconds=0.5))
    generate(other, tmp_path)
    assert Calibration.load(tmp_path / "ddim_4_w3").signature.model_hash == other.model_hash != generator.model_hash


def test_where_the_system_cannot_be_written_the_cache_folder_is(generator, tmp_path, monkeypatch):
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "cache"))
    in_the_way = tmp_path / "system"
    in_the_way.write_text("no folder can be made here", encoding="utf-8")
    generate(generator, in_the_way / "calibration")
    home = tmp_path / "cache" / "calibration" / generator.model_hash[:16]
    assert kept(home) == ["ddim_4_w3.json"]
    (home / "ddim_4_w3.json").chmod(stat.S_IRUSR)
    generate(generator, in_the_way / "calibration")  # read from there


def test_never_refuses_by_the_command_that_makes_them(generator, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scripts/calibrate\.py .*steps=4"):
        generate(generator, tmp_path, calibrate="never")
    assert kept(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"scripts/calibrate\.py"):
        require_calibrations(AudioCache(tmp_path), "ddim", 25, 3.0)
    require_calibrations(AudioCache(tmp_path, calibrate="auto"), "ddim", 25, 3.0)
    with pytest.raises(ValueError, match=r"accel\.calibrate must be one of auto, never, got 'yes'"):
        AudioCache(tmp_path, calibrate="yes")


def test_a_cache_beside_another_accelerator_calibrates_too(generator, tmp_path):
    both = Combined.of(cache=AudioCache(tmp_path, calibrate="auto"), attention=LocalGlobal(4))
    generator.generate(["rain"], **STEPS, accelerator=both)
    assert kept(tmp_path) == ["ddim_4_w3.json"]


def test_finer_curves_are_made_where_they_are_asked_for(generator, tmp_path):
    cache = AudioCache(tmp_path, calibrate="auto", calibrated_steps=6)
    generator.generate(["rain"], **STEPS, accelerator=cache)
    assert kept(tmp_path) == ["ddim_6_w3.json"]


def test_prompts_are_the_systems_captions_or_the_demos():
    assert len(calibration_prompts(CAPTIONS)) == NUM_PROMPTS
    assert set(calibration_prompts(CAPTIONS)) <= set(CAPTIONS)
    assert calibration_prompts(["rain"]) == ["rain"]
    assert len(set(calibration_prompts([]))) == NUM_PROMPTS
