"""From the command line's configs: calibrate a system, sample it accelerated, and measure the trade-off."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compose_command, load_command, run_command
from hydra.utils import instantiate
from stirring_parts import stir

from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.calibration import require_calibrations
from foley.accel.combined import NoAcceleration
from foley.core.config import PROJECT_ROOT
from foley.core.devices import described_processor
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system, save_system

CONFIGS: dict[str, dict[str, Any]] = {
    "denoiser": {
        "_target_": "foley.models.dit.model.DiffusionTransformer",
        **{"latent_channels": 4, "width": 32, "depth": 2, "num_heads": 2, "context_dim": 16},
        "modulation": {"_target_": "foley.nn.adaln.AdaLNSola", "rank": 2, "alpha": 2},
    },
    "text": {
        "_target_": "foley.models.text.SmallTextEncoder",
        "tokenizer_file": str(PROJECT_ROOT / "data" / "tokenizer" / "audiocaps.json"),
        **{"dim": 16, "depth": 1, "num_heads": 2, "max_length": 32},
    },
    "codec": {
        "_target_": "foley.models.codec.waveform_vae.WaveformVAE",
        **{"channels": 4, "multipliers": [1, 2], "strides": [4, 10], "latent_channels": 4, "num_units": [1, 1]},
        "sample_rate_hz": 2000,
    },
    "normaliser": {"_target_": "foley.models.codec.normaliser.LatentNormaliser", "channels": 4},
    "process": {"_target_": "foley.diffusion.process.DiffusionProcess"},
}
QUICK = ("steps=4", "duration_seconds=0.5", "device=cpu")


@pytest.fixture(scope="module")
def system_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    system, directory = build_system(CONFIGS), tmp_path_factory.mktemp("system")
    stir(system.modules["denoiser"])  # layers that start at zero would have nothing to cache
    save_system(system, directory)
    (directory / "prompts.txt").write_text("rain\na dog barks\na bell\n")
    run_command("script/calibrate", f"system={directory}", f"prompts={directory}/prompts.txt", "num_prompts=2", *QUICK)
    return directory


def _accelerator(name: str, system_dir: Path, *overrides: str) -> Any:
    return instantiate(compose_command("sample", f"system={system_dir}", f"accel={name}", *overrides).accel)


def test_calibration_lands_where_the_accelerators_look(system_dir: Path) -> None:
    files = sorted(file.name for file in (system_dir / "calibration").iterdir())
    assert files == ["ddim_4.json", "ddim_4.png", "ddim_4.safetensors"]
    info = json.loads((system_dir / "calibration" / "ddim_4.json").read_text())
    assert info["num_prompts"] == 2
    assert info["signature"]["solver"] == "ddim"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("none", ()),
        ("audiocache", ()),
        ("audiocache", ("accel.reuse=taylor",)),
        ("smoothcache", ()),
        ("fora", ()),
        ("budget", ("accel.target_speedup=1.2",)),
        ("local_global", ("accel.window_frames=2",)),
        ("audiocache_local_global", ("accel.attention.window_frames=2",)),
    ],
)
def test_every_accelerator_of_the_configs_generates(name: str, overrides: tuple[str, ...], system_dir: Path) -> None:
    pipeline = TextToAudio.load(system_dir)
    accelerator = _accelerator(name, system_dir, *overrides)
    result = pipeline.generate(["rain", "wind"], 0.5, num_steps=4, accelerator=accelerator, batch_size=1)
    assert result.audio.shape == (2, 1, 1000)
    cost = result.settings
    assert cost["mac_speedup"] == pytest.approx(cost["macs_uncached"] / cost["macs"])


def test_compiled_blocks_are_accelerated_too_and_not_counted(system_dir: Path) -> None:
    torch.compiler.reset()
    pipeline, accelerator = TextToAudio.load(system_dir), _accelerator("fora", system_dir)
    plain = pipeline.generate(["rain"], 0.5, num_steps=4, accelerator=accelerator).audio
    with torch.compiler.set_stance("force_eager"):  # compiled in name: a compiler would take its time
        pipeline.optimise(compiled=True)
        result = pipeline.generate(["rain"], 0.5, num_steps=4, accelerator=accelerator)
    torch.testing.assert_close(result.audio, plain)
    assert "macs" not in result.settings


def test_threshold_zero_is_bitwise_equal_through_the_pipeline(system_dir: Path) -> None:
    pipeline = TextToAudio.load(system_dir)
    neutral = _accelerator("audiocache", system_dir, "accel.threshold=0")
    audio = [
        pipeline.generate(["rain"], 0.5, num_steps=4, accelerator=a).audio for a in (None, NoAcceleration(), neutral)
    ]
    assert torch.equal(audio[0], audio[1])
    assert torch.equal(audio[0], audio[2])


def test_the_missing_calibration_of_a_system_is_a_command_to_copy(system_dir: Path) -> None:
    pipeline = TextToAudio.load(system_dir)
    accelerator = _accelerator("audiocache", system_dir, "accel.calibrate=never")
    with pytest.raises(FileNotFoundError, match=f"calibrate.py system={system_dir} solver=ddim prompts=FILE steps=3 "):
        pipeline.generate(["rain"], 0.5, num_steps=3, accelerator=accelerator)


@pytest.mark.parametrize(
    ("named", "options"),
    [
        (["system=some dir/system"], ["system=some dir/system"]),
        (["system=ezaudio_xl"], ["system=ezaudio_xl"]),
        (["system=ezaudio_l", "hub_dir=/hub"], ["system=ezaudio_l", "hub_dir=/hub"]),
    ],
)
def test_the_command_for_a_missing_calibration_names_the_model_and_the_place(
    named: list[str], options: list[str], tmp_path: Path
) -> None:
    never = ["accel=audiocache", "accel.calibrate=never"]
    accelerator = instantiate(compose_command("sample", *named, f"cache_dir={tmp_path}", *never).accel)
    with pytest.raises(FileNotFoundError) as error:
        require_calibrations(accelerator, "ddim", 25, 3.0)
    script, command = str(error.value).rpartition("python scripts/calibrate.py ")[1:]
    assert script
    overrides = shlex.split(command)
    assert set(options) <= set(overrides)
    calibrate = compose_command("script/calibrate", *overrides)
    assert (calibrate.solver.name, calibrate.steps, calibrate.guidance_scale) == ("ddim", 25, 3)
    assert str(Path(calibrate.output_dir) / "ddim_25.json") in str(error.value)


def test_a_missing_calibration_is_noticed_inside_a_combination_and_before_the_solver_is_known(system_dir: Path) -> None:
    accelerator = _accelerator("audiocache_local_global", system_dir, "accel.cache.calibrate=never")
    require_calibrations(accelerator, None, None, None)
    require_calibrations(accelerator, "ddim", 4, None)
    with pytest.raises(FileNotFoundError, match=r"\*_5.json does not exist.* steps=5 output_dir="):
        require_calibrations(accelerator, None, 5, None)
    require_calibrations(NoAcceleration(), "ddim", 5, 3.0)


def test_the_calibration_directory_can_be_given(system_dir: Path, tmp_path: Path) -> None:
    assert isinstance(_accelerator("audiocache", system_dir, f"accel.calibration_dir={tmp_path}"), AudioCache)


TWO_PROMPTS = '{"caption": "rain falls", "label": "rain"}\n{"caption": "wind blows", "label": "wind"}\n'
LAYER_CACHES = ("audiocache", "smoothcache", "fora", "budget", "budget_greedy")


def _bench(system_dir: Path, output_dir: Path, *overrides: str) -> dict[str, Any]:
    if not any(override.startswith("prompts=") for override in overrides):
        overrides = (f"prompts={system_dir}/prompts.txt", *overrides)
    run_command("bench/caching", f"system={system_dir}", "repeats=1", f"output_dir={output_dir}", *QUICK, *overrides)
    result: dict[str, Any] = json.loads((output_dir / "caching.json").read_text())
    return result


def test_the_benchmark_reports_every_policy_value_and_reuse(system_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(TWO_PROMPTS)
    narrow = (
        "sweeps.audiocache.values=[0.0,9.0]",
        "sweeps.smoothcache.values=[9.0]",
        "sweeps.fora.values=[2]",
        "sweeps.fora.reuses=[hold,taylor]",
    )
    spent = ("sweeps.budget.values=[1.2]", "longer_clips_seconds=[0.5,8]")
    chosen = f"policies=[{','.join(LAYER_CACHES)}]"
    result = _bench(system_dir, tmp_path, f"prompts={prompts}", chosen, *narrow, *spent)
    rows, settings = result["rows"], result["settings"]
    for row in rows:
        assert row["tmacs"] * row["mac_speedup"] == pytest.approx(settings["tmacs_uncached"])
        assert row["real_time_factor"] == pytest.approx(row["seconds"] / (2 * 0.5))  # two clips of 0.5 s
        assert (row["machine"], row["batch_size"]) == (described_processor(), 2)
        assert row["wall_speedup"] == pytest.approx(settings["seconds_uncached"] / row["seconds"])
        own = settings["processor_seconds_uncached"] / row["processor_seconds"]
        assert row["processor_speedup"] == pytest.approx(own)
        assert (row["latent_error_median"] == 0) == (row["latent_error"] == 0)
    names = ["audiocache"] * 4 + [name for name in ("smoothcache", "fora", "budget", "budget_greedy") for _ in "12"]
    assert [(row["policy"], row["reuse"]) for row in rows] == list(zip(names, ["hold", "taylor"] * 6, strict=True))
    assert (rows[0]["latent_error"], rows[0]["mac_speedup"], rows[0]["computed_fraction"]) == (0.0, 1.0, 1.0)
    assert all(row["mac_speedup"] > 1 and row["latent_error"] > 0 for row in rows[2:])
    assert rows[-1]["mac_speedup"] >= 1.2
    longer = [row["mac_speedup"] for row in result["longer_clips"] if row["policy"] == "fora"]
    assert longer[0] == pytest.approx(rows[6]["mac_speedup"])  # hold, at the length that was run
    assert longer[2] > longer[0]  # attention grows with the square of the length
    assert 0 < result["changes"]["earliest_half"] <= result["changes"]["latest_half"] < 1
    (methods,) = result["budget_methods"]
    assert min(methods["dynamic"], methods["greedy"]) > 0
    assert {row["label_accuracy"] for row in rows} == {None}  # this system's rate is not the extractor's
    assert (tmp_path / "caching.png").stat().st_size > 0
    assert not (tmp_path / "parts").exists()
    drawn = {file.name for file in (tmp_path / "schedules").iterdir()}
    schedules = ("audiocache_0", "audiocache_9", "smoothcache_9", "fora_2", "budget_1.2", "budget_greedy_1.2")
    assert drawn == {f"{name}.png" for name in schedules}


def test_the_benchmark_holds_every_policy_against_fewer_steps(system_dir: Path, tmp_path: Path) -> None:
    narrow = ("policies=[fewer_steps,prediction_target,fora]", "sweeps.fewer_steps.values=[1.33,2,4]")
    narrow = (*narrow, "sweeps.prediction_target.values=[2]", "sweeps.fora.values=[2]")
    rows = _bench(system_dir, tmp_path, *narrow, "reuses=[hold]", "sweeps.fora.reuses=[hold]")["rows"]
    policies = [*(("fewer steps", n) for n in (3, 2, 1)), ("prediction_target", 2), ("fora", 2)]
    assert [(row["policy"], row["value"]) for row in rows] == policies
    assert [row["mac_speedup"] for row in rows[:4]] == pytest.approx([4 / 3, 2, 4, 2])
    assert (system_dir / "calibration" / "prediction_ddim_4_w3.json").is_file()  # what was missing was made
    assert rows[-1]["error_ratio"] == pytest.approx(rows[-1]["latent_error"] / rows[-1]["fewer_steps_error"])
    assert rows[-1]["beats_fewer_steps"] == ("yes" if rows[-1]["error_ratio"] < 1 else "no")


@pytest.mark.slow
def test_a_benchmark_that_was_broken_off_goes_on(system_dir: Path, tmp_path: Path) -> None:
    batches = ("num=2", "batch_size=4", "reuses=[hold]", "sweeps.fora.reuses=[hold]", "sweeps.fora.values=[2]")
    missing = ("sweeps.budget.accel.calibration_dir=nowhere", "sweeps.budget.accel.calibrate=never")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        _bench(system_dir, tmp_path, *batches, "policies=[fora,budget]", *missing)
    kept = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "parts").glob("*.json")}
    assert set(kept) == {"uncached_0-0-0", "fora_2_hold-0-0"}  # of the first batch of four, of six clips
    kept["fora_2_hold-0-0"]["seconds"] = 1000.0
    (tmp_path / "parts/fora_2_hold-0-0.json").write_text(json.dumps(kept["fora_2_hold-0-0"]))
    batches = (*batches, "longer_clips_seconds=[]")
    (row,) = _bench(system_dir, tmp_path, *batches, "policies=[fora]")["rows"]
    assert 1000 < row["seconds"] < 1100
    (row,) = _bench(system_dir, tmp_path, *batches, "policies=[fora]")["rows"]  # its parts are gone
    assert row["seconds"] < 1000


def test_a_policy_that_no_sweep_holds_is_named() -> None:
    with pytest.raises(ValueError, match="policies names 'nothing'"):
        run_command("bench/caching", "prompts=x", "policies=[nothing]")


def test_the_benchmark_spends_the_budget_in_two_ways() -> None:
    sweeps = compose_command("bench/caching", "prompts=x").sweeps
    assert (sweeps.budget.accel.method, sweeps.budget_greedy.accel.method) == ("dynamic", "greedy")


def test_the_demo_holds_what_is_recommended_and_the_paper_against_fewer_steps() -> None:
    demo = compose_command("script/demo")
    assert list(demo.variants)[:4] == ["no acceleration", demo.yardstick, "prediction reuse", "AudioCache"]
    assert demo.variants.AudioCache.accel.threshold == compose_command("sample", "accel=audiocache").accel.threshold
    assert 50 / demo.variants["fewer steps"].steps == pytest.approx(
        demo.variants["prediction reuse"].accel.interval, 0.1
    )


def test_the_demo_says_how_far_off_a_policy_is_of_fewer_steps() -> None:
    say = load_command("script/demo")["against_yardstick"]
    scores = {"none": {"spectral_convergence": 0.0}, "fewer steps": {"spectral_convergence": 0.1}}
    scores |= {"AudioCache": {"spectral_convergence": 0.25}}
    assert say(scores, "AudioCache", "fewer steps") == ["2.5 times as far off as fewer steps"]
    assert say(scores, "none", "fewer steps") == say(scores, "fewer steps", "fewer steps") == []
    assert say(scores, "AudioCache", "absent") == []


def test_the_benchmark_reads_finer_calibrations(system_dir: Path, tmp_path: Path) -> None:
    narrow = (
        "policies=[audiocache,smoothcache,fora]",
        "sweeps.audiocache.values=[9.0]",
        "reuses=[hold]",
        "sweeps.fora.reuses=[hold]",
    )
    finer = ("sweeps.smoothcache.values=[9.0]", "sweeps.fora.values=[2]", "steps=2", "calibrated_steps=[4]")
    rows = _bench(system_dir, tmp_path, *narrow, *finer)["rows"]
    assert [(row["policy"], row["calibrated_steps"]) for row in rows] == [
        ("audiocache", 4), ("smoothcache", 4), ("fora", None),
    ]  # fmt: skip
    assert (tmp_path / "schedules" / "smoothcache_from_4_9.png").is_file()


def test_the_benchmark_samples_with_the_eta_that_it_was_given(system_dir: Path, tmp_path: Path) -> None:
    narrow = ("policies=[fora]", "reuses=[hold]", "sweeps.fora.reuses=[hold]", "steps=2", "sweeps.fora.values=[2]")
    assert _bench(system_dir, tmp_path, *narrow, "solver.eta=0.5")["settings"]["solver"] == "ddim_eta0.5"
