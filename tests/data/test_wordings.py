"""Wordings: what a clip may be called besides its caption, and that what is held out is said nowhere else."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import load_command
from latent_parts import latent_cache_writer
from small_system import CONFIGS

from foley.core.config import PROJECT_ROOT
from foley.data.dataset import AudioItem, SampleKey, draw_caption
from foley.data.entries import Entries, ManifestEntry
from foley.data.procedural.captions import _LEVELS, TEMPLATES, _tidy
from foley.data.procedural.dataset import CLASS_NAMES, CLASSES
from foley.data.splits import clip_splits
from foley.data.wordings import Wordings, WordingsError, normal_form
from foley.system.system import build_system

TABLE = PROJECT_ROOT / "data/prompts/wordings.yaml"


@pytest.fixture(scope="module")
def shipped() -> Wordings:
    return Wordings.read(TABLE)


def template_captions() -> set[str]:
    """Everything that a template can say, in normal form: each adjective in each slot, each adverb behind it."""
    adverbs = ("", *(adverb for level in _LEVELS for adverb in level))
    said = set()
    for name, templates in TEMPLATES.items():
        parameters = CLASSES[name].parameters.items()
        words = {slot.removesuffix("_hz"): ("", *own.low_words, *own.high_words) for slot, own in parameters}
        for template, chosen, adverb in product(templates, product(*words.values()), adverbs):
            said.add(normal_form(_tidy(f"{template.format(**dict(zip(words, chosen, strict=True)))} {adverb}")))
    return said


def test_no_held_out_wording_is_ever_trained_on(shipped: Wordings, shared: Path) -> None:
    captions = [json.loads(line)["caption"] for line in (shared / "data/clips.jsonl").read_text().splitlines()]
    trained = template_captions() | {normal_form(caption) for caption in captions}
    assert normal_form("a heavy rain shower loudly") in trained
    held_out = [text for own in shipped.labels.values() for text in own.held_out]
    assert [text for text in held_out if normal_form(text) in trained] == []
    assert len(set(map(normal_form, held_out))) == len(held_out)


def test_every_recording_has_its_caption_and_others_and_every_class_paraphrases(
    shipped: Wordings, shared: Path
) -> None:
    for line in (shared / "data/clips.jsonl").read_text().splitlines():
        clip = json.loads(line)
        own = shipped.labels[clip["label"]]
        assert clip["caption"] in own.all_known
        assert len(own.beside(clip["caption"])) >= 2
    assert all(len(shipped.labels[name].held_out) >= 3 for name in CLASS_NAMES)


def test_a_caption_of_its_own_goes_before_the_label(tmp_path: Path) -> None:
    (tmp_path / "wordings.yaml").write_text(
        "step:\n  known: [a step, someone treads]\n  captions: {a step on ice: [ice cracks under a step]}\n"
        "two: &digit {known: ['{label} is said']}\nthree: *digit\n"
    )
    table = Wordings.read(tmp_path / "wordings.yaml")
    clips = [("a step", "step"), ("a step on ice", "step"), ("someone says two", "two"), ("rain", "rain")]
    entries = Entries.of(
        [
            ManifestEntry(Path(f"{label}{at}.wav"), caption, str(at), label=label)
            for at, (caption, label) in enumerate(clips)
        ]
    ).with_other_captions([(), ("on ice",), (), ()])
    found = [entry.other_captions for entry in table.add_to(entries)]
    assert found == [("someone treads",), ("on ice", "ice cracks under a step"), ("two is said",), ()]
    assert table.labels["three"].known == ["three is said"]


def test_training_draws_the_wordings_evenly_and_again_alike(shared: Path) -> None:
    splits = clip_splits(str(shared / "data/clips.jsonl"), 24000, check_files=False, wordings=str(TABLE))
    entry = next(entry for entry in splits["train"].entries if entry.label == "five")
    plain = clip_splits(str(shared / "data/clips.jsonl"), 24000, check_files=False)
    assert not any(entry.other_captions for entry in plain["train"].entries)
    drawn = [draw_caption(entry, 0, SampleKey(3, epoch)) for epoch in range(800)]
    assert drawn == [draw_caption(entry, 0, SampleKey(3, epoch)) for epoch in range(800)]
    names, counts = np.unique(drawn, return_counts=True)
    assert len(names) == 8 == len({entry.caption, *entry.other_captions})
    assert 60 < counts.min() <= counts.max() < 140
    assert isinstance(splits["train"].render(0, 0), AudioItem)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- rain", "no table of labels"),
        ("rain: {know: [it rains]}", "give it some of known, captions, held_out"),
        ("rain: {known: it rains}", "list of texts"),
        ("rain: {known: [1]}", "list of texts"),
        ("rain: {known: }", "list of texts"),
        ("rain: {captions: [it rains]}", "give it some of known, captions, held_out"),
        (
            "rain: {known: [it rains]}\nwet: {held_out: [It  rains.]}",
            "held out of 'wet', is 'it rains', known of 'rain'",
        ),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "wordings.yaml").write_text(text)
    with pytest.raises(WordingsError, match=complaint):
        Wordings.read(tmp_path / "wordings.yaml")


def test_an_absent_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WordingsError, match="no such file"):
        Wordings.read(tmp_path / "none.yaml")


def test_short_clips_get_silence_up_to_lengths_of_their_own(shared: Path) -> None:
    lengths = [1.0, 2.0, 5.0, 10.0]
    options = {"check_files": False, "padded_seconds": lengths, "max_duration_seconds": 10.0}
    source = clip_splits(str(shared / "data/clips.jsonl"), 24000, **options)["test"]
    seconds = source.durations_seconds(0)
    own = source.entries.duration_seconds
    short = own < 1
    assert set(seconds[short]) == set(lengths)
    assert np.allclose(seconds[~short], own[~short].clip(max=10))
    shares = np.bincount(np.searchsorted(lengths, seconds[short])) / short.sum()
    assert np.allclose(shares, 1 / np.array(lengths) / 1.8, atol=0.08)  # 10, 5, 2 and 1 of 18
    place = int(np.flatnonzero(short & (seconds == 5))[0])
    audio = source.render(place, 0).audio
    assert audio.shape == (5 * 24000,)
    heard = round(own[place] * 24000) + 240
    assert audio[:heard].any()
    assert not audio[heard:].any()


def test_lengths_must_rise(shared: Path) -> None:
    with pytest.raises(ValueError, match="each longer than the last"):
        clip_splits(str(shared / "data/clips.jsonl"), 24000, check_files=False, padded_seconds=[2, 1])


def test_a_system_that_is_exported_knows_the_further_wordings(tmp_path: Path) -> None:
    with latent_cache_writer(tmp_path / "latents", "c0dec", 2000, 40) as writer:
        for split, caption, other in (("train", "a step", "someone treads"), ("val", "thunder", "it roars")):
            writer.add(torch.zeros(4, 9), torch.ones(4, 9), split, caption, "", split, 0.2, [other])
    with_captions = load_command("script/export_system")["with_captions"]
    assert with_captions(build_system(CONFIGS), str(tmp_path / "latents")).captions == ["a step", "someone treads"]
