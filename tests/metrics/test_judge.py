"""Judging clips in memory, and the benchmarks that do: guidance, training runs, and clips beyond the trained length."""

import json
import math

import pytest
import soundfile
import torch
from commands import run_command as run
from small_system import CONFIGS, training_checkpoint
from stirring_parts import stir

from foley.core.components import CheckpointError
from foley.core.config import PROJECT_ROOT
from foley.core.hashing import hash_module
from foley.data.procedural import ProceduralDataset
from foley.generation.prompts import LabelledPrompts
from foley.metrics.features import ClipFeatures
from foley.metrics.judge import QUALITIES, FrechetAudioDistance, Judge
from foley.metrics.latency import peak_memory_bytes, reset_peak_memory
from foley.metrics.reconstruction import GriffinLim, mel_distance
from foley.metrics.scores import share
from foley.models.codec.dac import baseline
from foley.system.system import build_system, save_system

RATE = 24000
EXTRACTOR = PROJECT_ROOT / "data/extractor"
FULL_RATE = {**CONFIGS, "codec": {**CONFIGS["codec"], "sample_rate_hz": RATE}}


@pytest.fixture(scope="module")
def clips():
    dataset = ProceduralDataset(32, 7, 2.0, sample_rate_hz=RATE)
    return [dataset.render(index) for index in range(32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips):
    """A system, two runs that trained it, prompts with labels, and a folder of reference clips."""
    path = tmp_path_factory.mktemp("judging")
    system = build_system(FULL_RATE)
    stir(system.modules["denoiser"])  # its last layer starts at zero, which a rescale would divide by
    save_system(system, path / "system")
    checkpoint = training_checkpoint(system, path, hash_module(system.modules["codec"]))
    for seed in range(2):
        (path / f"runs/{seed}/checkpoints").mkdir(parents=True)
        (path / f"runs/{seed}/checkpoints/step_000010.ckpt").symlink_to(checkpoint)
        (path / f"runs/{seed}/metrics.csv").write_text(f"step,train/loss,val/loss\n4,1.0,\n9,,{seed + 1}\n")
    (path / "prompts.jsonl").write_text('{"caption": "rain falls", "label": "rain"}\n{"caption": "wind"}\n')
    (path / "reference").mkdir()
    for item in clips[:4]:
        soundfile.write(path / f"reference/{item.id}.wav", item.audio.numpy(), RATE)
    return path


def test_real_clips_are_recognised_and_a_set_is_at_no_distance_from_itself(folder, clips):
    judge = Judge.load(EXTRACTOR, folder / "reference")
    audio = torch.stack([item.audio for item in clips])[:, None]
    scores = judge.score(audio, RATE, [item.label for item in clips])
    assert scores["label_accuracy"] > 0.9
    same = judge.score(audio[:4], RATE, [None] * 4)
    assert same["label_accuracy"] is None
    assert same["frechet_distance"] < 0.1 < scores["frechet_distance"]


def test_an_assessment_is_against_the_clips_of_the_prompts_labels_with_intervals(folder, clips):
    rows = [{"path": f"reference/{item.id}.wav", "caption": item.caption, "label": item.label} for item in clips[:4]]
    (folder / "recordings.jsonl").write_text("\n".join(json.dumps({**row, "split": "test"}) for row in rows))
    labels = {clips[0].label, clips[1].label}
    judge = Judge.of_recordings(EXTRACTOR, folder / "recordings.jsonl", "test", labels)
    assert set(judge.reference.labels) == labels
    audio, names = torch.stack([item.audio for item in clips[:4]])[:, None], [item.label for item in clips[:4]]
    halves = [judge.clips(audio[part], RATE, names[part]) for part in (slice(0, 1), slice(1, 4))]
    joined = ClipFeatures.joined(halves)
    assert joined.labels == names
    found = judge.assess(joined)
    assert tuple(found) == QUALITIES
    assert found["label_accuracy"] == judge.score(audio, RATE, names)["label_accuracy"]
    for name in ("label_accuracy", "frechet_distance", "kl"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert set(Judge.load(EXTRACTOR).assess(judge.clips(audio, RATE, [None] * 4)).values()) == {None}
    assert judge.clips(audio, RATE // 2, names) is None
    with pytest.raises(ValueError, match="no clip of it has one of the labels of the prompts"):
        Judge.of_recordings(EXTRACTOR, folder / "recordings.jsonl", None, {"organ", None})


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_the_interval_of_a_share_is_wilsons(hits, n, low, high):
    found = share(hits, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_fad_is_the_frechet_distance_of_its_protocols_features_at_any_rate(folder, clips):
    """VGGish's weights are absent: under another protocol the way from clips to a number is the same."""
    judge = Judge.load(EXTRACTOR, folder / "reference")
    fad = FrechetAudioDistance.under(judge.protocol, folder / "reference")
    audio = torch.stack([item.audio for item in clips[8:16]])[:, None]
    assert fad.score(audio, RATE) == pytest.approx(judge.score(audio, RATE, [None] * 8)["frechet_distance"])
    assert fad.score(audio[..., ::2], RATE // 2) > 0
    with pytest.raises(CheckpointError, match="vggish"):
        FrechetAudioDistance.load(folder, folder / "reference")


def test_what_cannot_be_judged_is_none(clips):
    scores = Judge.load(EXTRACTOR).score(clips[0].audio[None, None], 16000, ["rain"])
    assert scores == {"label_accuracy": None, "frechet_distance": None}


def test_prompts_are_spread_over_the_file(folder):
    assert LabelledPrompts.read(folder / "prompts.jsonl") == (["rain falls", "wind"], ["rain", None])
    assert LabelledPrompts.read(folder / "prompts.jsonl", 1).captions == ["rain falls"]


def test_a_row_for_each_scale_and_rescale(folder, tmp_path):
    paths = (f"system={folder}/system", f"prompts={folder}/prompts.jsonl", f"reference={folder}/reference")
    sizes = ("scales=[1,3]", "rescales=[0,0.5]", "rule_scales=[3]", "steps=2", "duration_seconds=0.1", "device=cpu")
    rules = ("rules.interval.start=0", "rules.interval.stop=0.5")
    run("bench/guidance", *paths, *sizes, *rules, f"output_dir={tmp_path}")
    measured = json.loads((tmp_path / "guidance.json").read_text())
    rows = measured["rows"]
    assert [(row["guidance_scale"], row["rescale"]) for row in rows] == [(1, 0), (3, 0), (1, 0.5), (3, 0.5)]
    assert all(row["label_accuracy"] is not None and row["frechet_distance"] > 0 for row in rows)
    plain, interval, projected = (row["gmacs"] for row in measured["rules"])
    assert [row["guidance"] for row in measured["rules"]] == ["cfg", "interval", "apg"]
    assert (interval, projected) == (pytest.approx(0.75 * plain), plain)  # one of two evaluations has one branch


def test_runs_are_scored_at_their_checkpoints_and_averaged_over_seeds(folder, tmp_path):
    paths = (
        f"prompts={folder}/prompts.jsonl",
        f"+runs.tiny={{parent: {folder}/runs, folders: '[0-9]', first_step: 5}}",
    )
    run("bench/training", *paths, "steps=2", "duration_seconds=0.1", "device=cpu", f"output_dir={tmp_path}")
    results = json.loads((tmp_path / "training.json").read_text())
    assert [(row["folder"], row["step"], row["val_loss"]) for row in results["rows"]] == [
        ("0", 15, 1.0),
        ("1", 15, 2.0),
    ]
    (summary,) = results["summary"]
    assert (summary["run"], summary["n"], summary["val_loss"]) == ("tiny", 2, 1.5)
    assert summary["val_loss_std"] == pytest.approx(math.sqrt(0.5))


def test_a_run_without_checkpoints_is_named(folder, tmp_path):
    with pytest.raises(Exception, match=r"runs.none: no folder"):
        run("bench/training", f"+runs.none={{parent: {folder}/runs, folders: 'x*'}}", f"output_dir={tmp_path}")


def test_long_clips_are_judged_piece_by_piece_in_every_way(folder, tmp_path):
    paths = (f"system={folder}/system", f"prompts={folder}/prompts.jsonl", "num_prompts=2", "device=cpu")
    run("bench/beyond_training", *paths, "durations_seconds=[2,4]", "steps=1", f"output_dir={tmp_path}")
    rows = json.loads((tmp_path / "beyond_training.json").read_text())["rows"]
    assert [(row["duration_seconds"], row["way"]) for row in rows] == [
        (seconds, way) for seconds in (2, 4) for way in ("local_global", "windows", "dense")
    ]
    assert all(0 <= row["label_accuracy_last_quarter"] <= 1 and row["total_seconds"] > 0 for row in rows)


def test_peak_memory_forgets_what_came_before():
    device = torch.device("cpu")
    if peak_memory_bytes(device) is None:
        pytest.skip("this system does not tell")
    large = torch.ones(50_000_000)
    held = peak_memory_bytes(device)
    del large
    reset_peak_memory(device)
    assert peak_memory_bytes(device) < held - 100_000_000


def test_mel_bands_keep_the_colour_of_a_clip(clips):
    audio = torch.stack([item.audio for item in clips[:2]])[:, None]
    restored = GriffinLim(RATE).reconstruct(audio)
    assert restored.shape == audio.shape
    noise = torch.randn_like(audio) * audio.std()
    assert bool((mel_distance(restored, audio, RATE) < 0.3 * mel_distance(noise, audio, RATE)).all())
    assert GriffinLim(RATE).reconstruct(audio[..., :100]).shape == (2, 1, 100)


def test_weights_that_are_not_there_are_named():
    with pytest.raises(CheckpointError, match=r"dac_weights=none.pth: no such file"):
        baseline("none.pth")


@pytest.mark.slow
def test_the_descript_codec_gives_back_as_many_samples(tmp_path):
    from dac import DAC

    sizes = {"encoder_dim": 8, "encoder_rates": [2, 4], "decoder_dim": 32, "decoder_rates": [4, 2], "sample_rate": RATE}
    DAC(**sizes, n_codebooks=2, codebook_size=16).save(tmp_path / "dac.pth", package=False)
    assert baseline(str(tmp_path / "dac.pth")).reconstruct(torch.randn(1, 1, 1001)).shape == (1, 1, 1001)
