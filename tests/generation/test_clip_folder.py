"""Test sets of a prompt file: shared out, continued, and never written twice."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from commands import run_command
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from small_system import CONFIGS

from foley.cli.sampling import requested_settings
from foley.core.config import PROJECT_ROOT
from foley.core.devices import described_processor
from foley.core.locks import FolderInUseError, only_writer
from foley.core.reading import DamagedFileError
from foley.generation import clip_folder
from foley.metrics.features import scan_directory
from foley.system.system import build_system, save_system

ROWS = [("dog", "a dog barks"), ("dog", "barking, loud"), ("rain", "rain falls"), ("rain", "drops"), ("bell", "a bell")]


@pytest.fixture(scope="module")
def system_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("system")
    save_system(build_system(CONFIGS), directory)
    return directory


@pytest.fixture(scope="module")
def audiocaps(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "audiocaps_test.csv"
    rows = [f'{index},{clip},30,"{caption}"' for index, (clip, caption) in enumerate(ROWS, start=100)]
    file.write_text("\n".join(["audiocap_id,youtube_id,start_time,caption", *rows]), encoding="utf-8")
    return file


def sample(*overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROJECT_ROOT / "sample.py"), "steps=2", "duration_seconds=0.2", *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def contents(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*_seed*.*")}


def record(wave):
    """What a clip's JSON says, but for costs, which are means over its batch, and how long that took on what."""
    facts = json.loads(wave.with_suffix(".json").read_text(encoding="utf-8"))
    assert facts.pop("real_time_factor") > 0
    assert facts.pop("machine")
    assert facts.pop("batch_size") >= 1
    facts["settings"] = {key: value for key, value in facts["settings"].items() if not key.startswith("mac")}
    return facts


def config(*overrides: str):
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose("sample", overrides=["prompt=rain", *overrides])


@pytest.mark.slow
def test_two_processes_make_the_clips_of_one_and_go_on_where_they_stopped(system_dir, audiocaps, tmp_path):
    given = [f"prompts={audiocaps}", f"system={system_dir}", "device=cpu", "seed=7"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    done = sample(*given, f"output_dir={alone}", "batch_size=4")
    assert done.returncode == 0, done.stderr
    assert (alone / "index.html").is_file()
    waves = sorted(alone.glob("*.wav"))
    assert len(waves) == len(ROWS)
    for index, wave in enumerate(waves):
        facts = json.loads(wave.with_suffix(".json").read_text(encoding="utf-8"))
        assert (facts["prompt"], facts["seed"], facts["id"]) == (ROWS[index][1], 7 + index, str(100 + index))

    # As if killed after two clips: one of them has no JSON yet.
    shared.mkdir()
    for name in ["test_set.json", *(file.name for wave in waves[1:3] for file in alone.glob(f"{wave.stem}.*"))]:
        (shared / name).write_bytes((alone / name).read_bytes())
    (shared / waves[2].with_suffix(".json").name).unlink()
    kept = contents(shared)[waves[1].name]
    done = sample(*given, f"output_dir={shared}", "trainer=ddp_cpu", "trainer.devices=2", "batch_size=1")
    assert done.returncode == 0, done.stderr
    assert "4 clips made" in done.stdout + done.stderr
    assert "1 were there already" in done.stdout + done.stderr
    assert contents(shared)[waves[1].name] == kept
    for wave in waves:
        # Sums of another batch size and number of threads are rounded otherwise.
        np.testing.assert_allclose(
            soundfile.read(shared / wave.name)[0], soundfile.read(wave)[0], rtol=0, atol=4 / 2**15
        )
        assert record(alone / wave.name) == record(shared / wave.name)

    before = contents(shared)
    done = sample(*given, f"output_dir={shared}")
    assert "0 clips made" in done.stdout + done.stderr
    pages = {name for name in before if name.endswith(".png")}
    assert {k: v for k, v in contents(shared).items() if k not in pages} == {
        k: v for k, v in before.items() if k not in pages
    }
    done = sample(*given, f"output_dir={shared}", "guidance_scale=2")
    assert done.returncode != 0
    assert "guidance_scale was None, is 2" in done.stderr


@pytest.mark.slow
def test_processes_share_out_a_file_only():
    done = sample("prompt=rain", "trainer=ddp_cpu")
    assert done.returncode != 0
    assert "give prompts=FILE" in done.stderr


PAPERS = {
    "ezaudio": ("ezaudio_xl", 100, 5.0, 0.75, 10.0, "random", ["panns", "clap_16khz"]),
    "audiocache": ("stable_audio_open", 100, 7.0, 0.0, 10.0, "all", ["stable_audio"]),
    "audiocache_47s": ("stable_audio_open", 100, 7.0, 0.0, 47.0, "all", ["stable_audio"]),
    "audiocache_heun": ("stable_audio_open", 100, 7.0, 0.0, 10.0, "all", ["stable_audio"]),
    "audiocache_200": ("stable_audio_open", 200, 7.0, 0.0, 10.0, "all", ["stable_audio"]),
    "audiocache_500": ("stable_audio_open", 500, 7.0, 0.0, 10.0, "all", ["stable_audio"]),
    "smoothcache_030": ("stable_audio_open", 100, 7.0, 0.0, 10.0, "all", ["stable_audio"]),
    "smoothcache": ("stable_audio_open", 100, 7.0, 0.0, 10.0, "all", ["stable_audio"]),
    "litefocus": ("audioldm2", 200, 3.5, 0.0, 10.0, "all", ["vggish", "panns", "clap"]),
    "audiolcm": (None, 2, 5.0, 0.0, 10.0, "all", ["vggish", "panns", "clap"]),
}


@pytest.mark.parametrize(
    ("paper", "solver", "parameter", "value"),
    [
        ("audiocache", "dpmpp_3m_sde", "threshold", 0.3),
        ("audiocache_heun", "heun", "threshold", 0.3),
        ("audiocache_200", "dpmpp_3m_sde", "threshold", 0.4),
        ("audiocache_500", "dpmpp_3m_sde", "threshold", 0.6),
        ("smoothcache", "dpmpp_3m_sde", "alpha", 0.15),
        ("smoothcache_030", "dpmpp_3m_sde", "alpha", 0.3),
    ],
)
def test_tables_of_stable_audio_open_name_their_solver(paper, solver, parameter, value):
    cfg = config("system=stable_audio_open", f"eval_preset={paper}")
    assert (cfg.solver.name, cfg.accel[parameter]) == (solver, value)
    published = config("system=stable_audio_open", f"eval_preset={paper}", "solver=published")
    assert (published.solver.name, published.steps) == ("published", cfg.steps)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_papers_test_set(paper):
    model, *expected = PAPERS[paper]
    cfg = config(f"eval_preset={paper}", *([] if model is None else [f"system={model}"]))
    found = [cfg.steps, cfg.guidance_scale, cfg.guidance_rescale, cfg.duration_seconds, cfg.captions]
    assert [*found, list(cfg.eval_preset.protocol)] == expected
    assert cfg.eta == (1.0 if paper == "ezaudio" else 0.0)
    by_hand = config(f"eval_preset={paper}", "steps=7", "guidance=none", "solver=heun", "accel=none", "captions=first")
    assert (by_hand.steps, by_hand.guidance_scale, by_hand.solver.name) == (7, 1.0, "heun")
    assert (by_hand.eta, by_hand.captions) == (0.0, "first")
    assert requested_settings(config("solver=ddim", "eta=0.5")).eta == 0.5
    assert requested_settings(by_hand).accelerator.__class__.__name__ == "NoAcceleration"


@pytest.mark.parametrize(("name", "clap"), [("clotho", []), ("musiccaps", ["clap"])])
def test_the_other_test_sets_of_audiolcm(name, clap):
    ours, theirs = config(f"eval_preset={name}"), config("eval_preset=audiolcm")
    assert list(ours.eval_preset.protocol) == ["vggish", "panns", *clap]
    assert (ours.split, theirs.split) == ("test", None)
    same = ("steps", "guidance_scale", "guidance_rescale", "duration_seconds", "captions", "accel")
    assert [ours[key] for key in same] == [theirs[key] for key in same]


def test_a_papers_accelerator_comes_with_its_test_set():
    names = {paper: type(instantiate(config(f"eval_preset={paper}").accel)).__name__ for paper in PAPERS}
    assert names == {
        "ezaudio": "NoAcceleration",
        "audiocache": "AudioCache",
        **dict.fromkeys(("audiocache_47s", "audiocache_heun", "audiocache_200", "audiocache_500"), "AudioCache"),
        "smoothcache_030": "SmoothCache",
        "smoothcache": "SmoothCache",
        "litefocus": "LiteFocus",
        "audiolcm": "NoAcceleration",
    }
    assert config("eval_preset=audiocache").accel.calibration_dir.system.endswith("data/demo")
    assert config("eval_preset=ezaudio", "steps=3").solver.name == "ddim"


@pytest.fixture
def sampled(system_dir, tmp_path):
    """A folder with the clips of one prompt, and what makes more in it."""

    def run(*overrides: str) -> None:
        fixed = [f"system={system_dir}", "device=cpu", "steps=1", "duration_seconds=0.2", f"output_dir={tmp_path}"]
        run_command("sample", *fixed, *overrides)

    run("prompt=rain", "num=2")
    return run


def names(folder):
    return sorted(file.name for file in folder.glob("*.wav"))


def test_the_clips_of_another_request_are_refused(sampled, audiocaps, tmp_path):
    before = contents(tmp_path)
    for other in (["prompt=wind"], ["prompt=rain", "num=1"], ["prompt=rain", "num=2", "guidance_scale=2"]):
        with pytest.raises(ValueError, match=r"holds clips of another request .*overwrite=true to remove them"):
            sampled(*other)
    with pytest.raises(ValueError, match="holds clips of another request"):
        sampled(f"prompts={audiocaps}")
    assert contents(tmp_path) == before


def test_the_same_request_may_be_made_again(sampled, tmp_path):
    before = names(tmp_path)
    sampled("prompt=rain", "num=2", "batch_size=1")
    assert names(tmp_path) == before


def test_on_request_they_are_removed_and_nothing_else(sampled, audiocaps, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    sampled("prompt=wind", "overwrite=true")
    assert names(tmp_path) == ["000_wind_seed0.wav"]
    assert not list(tmp_path.glob("*rain*"))
    assert (tmp_path / "notes.txt").is_file()
    sampled(f"prompts={audiocaps}", "overwrite=true")
    assert len(names(tmp_path)) == len(ROWS)
    sampled(f"prompts={audiocaps}")  # goes on, and finds all there
    with pytest.raises(ValueError, match=r"guidance_scale was None, is 2.*overwrite=true"):
        sampled(f"prompts={audiocaps}", "guidance_scale=2")
    sampled(f"prompts={audiocaps}", "guidance_scale=2", "overwrite=true")


def test_a_large_set_lies_in_subfolders_with_a_page_each(sampled, audiocaps, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_folder, "FOLDER_CLIPS", 2)
    given = (f"prompts={audiocaps}", "overwrite=true")
    sampled(*given)
    relative = [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*.wav"))]
    assert [name.partition("_")[0] for name in relative] == ["0000/000", "0000/001", "0001/002", "0001/003", "0002/004"]
    assert [clip.id for clip in scan_directory(tmp_path)] == [str(100 + index) for index in range(len(ROWS))]
    pages = [tmp_path / name for name in ("index.html", "index_0001.html", "index_0002.html")]
    for number, page in enumerate(pages):
        text = page.read_text(encoding="utf-8")
        assert [other.name in text for other in pages] == [other != page for other in pages]
        shown = relative[2 * number : 2 * number + 2]
        assert [f'src="{name}"' in text for name in relative] == [name in shown for name in relative]
    assert "5 generated sounds, 3 to 4" in pages[1].read_text(encoding="utf-8")

    drawn = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    (tmp_path / relative[3]).with_suffix(".json").unlink()
    sampled(f"prompts={audiocaps}")  # makes the fourth anew
    again = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    assert [file.name.partition("_")[0] for file in again if again[file] != drawn[file]] == ["003"]

    (tmp_path / "0001" / "notes.txt").write_text("mine", encoding="utf-8")
    sampled("prompt=wind", "overwrite=true")
    assert [file.name for file in tmp_path.rglob("*.wav")] == ["000_wind_seed0.wav"]
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir()) == ["0001"]
    assert not pages[1].exists()


def test_a_large_set_that_was_begun_flat_goes_on(sampled, audiocaps, tmp_path, monkeypatch):
    sampled(f"prompts={audiocaps}", "overwrite=true")
    lost = next(tmp_path.glob("003_*.json"))
    kept = {name: content for name, content in contents(tmp_path).items() if not name.startswith("003_")}
    for file in tmp_path.glob("003_*"):
        file.unlink()
    monkeypatch.setattr(clip_folder, "FOLDER_CLIPS", 2)
    sampled(f"prompts={audiocaps}")
    assert contents(tmp_path) == kept
    assert (tmp_path / "0001" / lost.name).is_file()
    page = (tmp_path / "index_0001.html").read_text(encoding="utf-8")
    assert 'src="002_barking' not in page
    assert 'src="002_rain-falls_seed2.wav"' in page
    assert 'src="0001/003_drops_seed3.wav"' in page


def test_a_second_writer_is_refused(sampled, tmp_path):
    with only_writer(tmp_path, "clips"), pytest.raises(FolderInUseError, match="another process is writing clips"):
        sampled("prompt=rain", "num=2")


def test_a_damaged_record_is_named(sampled, audiocaps, tmp_path):
    sampled(f"prompts={audiocaps}", "overwrite=true")
    (tmp_path / "test_set.json").write_text("{", encoding="utf-8")
    with pytest.raises(DamagedFileError, match=r"test_set\.json"):
        sampled(f"prompts={audiocaps}")
    sidecar = next(tmp_path.glob("*_seed0.json"))
    (tmp_path / "test_set.json").unlink()
    sidecar.write_text("[]", encoding="utf-8")
    with pytest.raises(DamagedFileError, match=sidecar.name):
        sampled(f"prompts={audiocaps}")


def test_json_and_log_give_the_real_time_factor(sampled, tmp_path, caplog):
    caplog.set_level("INFO")
    sampled("prompt=rain", "num=2")
    facts = json.loads((tmp_path / "000_rain_seed0.json").read_text(encoding="utf-8"))
    computing = sum(facts["timings_of_all_samples"].values())
    assert facts["real_time_factor"] == pytest.approx(computing / (2 * 0.2), abs=1e-4)
    assert (facts["machine"], facts["batch_size"]) == (described_processor(), 2)
    words = f"RTF {facts['real_time_factor']:.3g} ({facts['machine']}, batch 2)"
    assert any(record.getMessage().startswith(words) for record in caplog.records)
    assert f"<dt>RTF</dt><dd>{words.removeprefix('RTF ')}</dd>" in (tmp_path / "index.html").read_text(encoding="utf-8")
