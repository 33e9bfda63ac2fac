"""Clotho and MusicCaps, from annotation files to AudioLCM's scores, in three commands."""

import json

import pytest
import soundfile
import torch
from commands import run_command
from small_system import CONFIGS
from tiny_clap import save_clap

from foley.metrics import protocols
from foley.metrics.embedded.network import EmbeddedExtractor
from foley.system.system import build_system, save_system

RATE_HZ = 16000
CLOTHO = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
MUSIC = "ytid,start_s,end_s,caption,is_audioset_eval\n"
SETS = {
    "clotho": (
        {
            "clotho_captions_development.csv": CLOTHO + "rain.wav,a,b,c,d,e\n",
            "clotho_captions_evaluation.csv": CLOTHO + "rain.wav,f,g,h,i,j\nwind.wav,k,l,m,n,o\n",
        },
        ["development/rain", "evaluation/rain", "evaluation/wind"],
        10,
        {"vggish": ["frechet_distance"], "panns": ["kl_softmax", "inception_score"]},
    ),
    "musiccaps": (
        {"musiccaps-public.csv": MUSIC + "".join(f"abcdefghij{n},30,40,song {n},{n > 0}\n" for n in range(5))},
        [f"abcdefghij{n}_30" for n in range(5)],
        4,
        {"vggish": ["frechet_distance"], "panns": ["kl_softmax"], "clap": ["clap_score"]},
    ),
}


@pytest.fixture
def small_extractors(monkeypatch):
    """Small networks in the place of VGGish and Cnn14, whose weights are absent; all else is the protocols' own."""
    torch.manual_seed(0)
    extractor = EmbeddedExtractor(["rain", "wind"], {}, widths=[4, 4, 4, 4, 4], feature_dim=2).eval()
    monkeypatch.setattr(protocols, "_load_published", lambda *_: (extractor, "small"))
    monkeypatch.setattr("foley.metrics.evaluation.SILENT_OUTPUT_PEAK", 0.0)  # an untrained system makes no sound


@pytest.mark.parametrize("name", ["clotho", pytest.param("musiccaps", marks=pytest.mark.slow)])
def test_a_set_is_prepared_generated_and_scored(name, small_extractors, tmp_path):
    texts, audio, count, wanted = SETS[name]
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    for number, stem in enumerate(audio):
        (tmp_path / stem).parent.mkdir(exist_ok=True)
        noise = 0.1 * torch.randn(RATE_HZ, generator=torch.Generator().manual_seed(number))
        soundfile.write(tmp_path / f"{stem}.wav", noise.numpy(), RATE_HZ)
    run_command("script/prepare", f"dataset={name}", f"audio_dir={tmp_path}", f"out={tmp_path}/set")
    save_system(build_system(CONFIGS), tmp_path / "system")
    preset, manifest = f"eval_preset={name}", tmp_path / "set/manifest.jsonl"
    small = [f"system={tmp_path}/system", "device=cpu", "steps=1", "guidance_scale=1", "duration_seconds=0.2"]
    run_command("sample", preset, f"prompts={manifest}", *small, f"output_dir={tmp_path}/made")
    made = [json.loads(file.read_text()) for file in sorted((tmp_path / "made").glob("*_seed*.json"))]
    assert len(made) == count  # those of the test split
    given = [f"eval_preset.protocol.clap.name_or_path={save_clap(tmp_path / 'clap')}"] if "clap" in wanted else []
    given += [f"samples={tmp_path}/made", f"reference={manifest}", f"audio_dir={tmp_path}", f"cache_dir={tmp_path}"]
    run_command("evaluate", preset, *given, "pairing=required", "resamples=0", f"output_dir={tmp_path}/scores")
    found = json.loads((tmp_path / "scores/evaluation.json").read_text())
    assert list(found) == list(wanted)
    for protocol, scores in wanted.items():
        assert (found[protocol]["n_generated"], found[protocol]["pairing"]) == (count, "paired by id")
        assert set(scores) <= found[protocol]["scores"].keys(), found[protocol]["unmeasured"]
