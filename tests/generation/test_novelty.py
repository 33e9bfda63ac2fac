"""Prompts outside a system's world: which they are, what comes nearest, and who is told."""

import json
import logging

import pytest
from small_system import CONFIGS

from foley.core.config import PROJECT_ROOT
from foley.data.procedural import CLASS_NAMES, captions_for
from foley.generation.novelty import KnownCaptions, content_stems, representative, stem
from foley.generation.prompts import Clip, read_prompts
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system, load_system, save_system

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CAPTIONS = [caption for name in CLASS_NAMES for caption in captions_for(name)]
CAPTIONS += [f"a man says the number {digit}" for digit in DIGITS]


@pytest.fixture(scope="module")
def known():
    return KnownCaptions(representative(CAPTIONS))


@pytest.mark.parametrize(
    "forms",
    ["bark barks barking barked", "wave waves", "drip drips dripping", "buzz buzzes buzzing", "idle idles idling"],
)
def test_forms_of_a_word_have_one_stem(forms):
    assert len({stem(word) for word in forms.split()}) == 1


def test_different_words_keep_different_stems():
    words = ["ring", "bell", "glass", "rain", "train", "sing", "string", "rise", "ice"]
    assert len({stem(word) for word in words}) == len(words)
    assert content_stems("A dog is barking, then the DOG barks!") == {"dog", "bark"}


def test_what_it_was_trained_on_is_familiar(known):
    assert not [caption for caption in CAPTIONS if known.judge(caption)]


@pytest.mark.parametrize(
    "prompt",
    ["", "a dog barks", "dogs barking", "a dog barks while rain falls on a roof", "rain on the roof", "birdsong"],
)
def test_other_words_for_its_world_are_familiar(known, prompt):
    assert known.judge(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "nearest"),
    [
        ("a cat meows", None),
        ("a violin plays a melody", None),
        ("traffic on a highway", None),
        ("Собака лает", None),
        ("a dog barks and a cat meows", "dog"),
        ("a helicopter hovers above the city", "helicopter"),
    ],
)
def test_strangers_are_found_with_what_comes_nearest(known, prompt, nearest):
    novelty = known.judge(prompt)
    assert novelty.familiar_share < known.required_share
    assert len(novelty.nearest) == 3
    assert set(novelty.nearest) <= set(CAPTIONS)
    assert nearest is None or nearest in novelty.nearest[0]


@pytest.mark.parametrize("prompt", ["🐕", "🐕 🌧️🌧️", "???", "---"])
def test_signs_without_a_word_are_strangers(known, prompt):
    novelty = known.judge(prompt)
    assert novelty.familiar_share == 0
    assert len(novelty.nearest) == 3


@pytest.mark.parametrize("prompt", ["", "  \n", "again and again"])
def test_what_asks_for_nothing_in_particular_is_none(known, prompt):
    assert known.judge(prompt) is None


def test_letters_of_other_widths_are_those_that_the_tokenizer_folds_them_to(known):
    wide = "".join(chr(ord(letter) + 0xFEE0) if letter != " " else "\u3000" for letter in CAPTIONS[0])
    assert wide != CAPTIONS[0]
    assert known.judge(wide) is None


def test_most_of_the_prompts_of_another_world_are_strangers(known, shared):
    prompts = read_prompts(shared / "data/audiocaps/test.csv")[::50]
    assert sum(known.judge(prompt) is not None for prompt in prompts) > len(prompts) / 2


def test_without_captions_nothing_is_judged():
    assert KnownCaptions([]).judge("a cat meows") is None


def test_representative_captions_are_few_short_and_hold_every_word():
    kept = representative([*CAPTIONS, "a dog barks, then a dog barks loudly"])
    assert len(kept) < len(CAPTIONS)
    assert {s for c in kept for s in content_stems(c)} >= {s for c in CAPTIONS for s in content_stems(c)}
    assert representative(kept) == kept


def test_a_system_carries_its_captions_warns_once_and_notes_it_in_the_json(tmp_path, caplog):
    system = build_system(CONFIGS)
    system = type(system)(system.modules, system.process, system.configs, captions=["a dog barks", "rain falls"])
    save_system(system, tmp_path / "system")
    assert load_system(tmp_path / "system").captions == ["a dog barks", "rain falls"]
    pipeline = TextToAudio.load(tmp_path / "system")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            prompts = ["a cat meows", "rain falls", "a cat meows"]
            clips = [Clip(prompt, seed, {"label": "x"}) for seed, prompt in enumerate(prompts)]
            result = pipeline.generate(clips, 0.2, num_steps=1)
    (record,) = caplog.records
    assert "'a cat meows' lies outside" in record.getMessage()
    assert "'a dog barks'" in record.getMessage()
    result.write(tmp_path / "clips")
    sidecars = [json.loads(file.read_text()) for file in sorted((tmp_path / "clips").glob("*.json"))]
    assert [sidecar.get("outside_training", {}).get("familiar_share") for sidecar in sidecars] == [0.0, None, 0.0]
    assert {sidecar["label"] for sidecar in sidecars} == {"x"}


def test_the_shipped_system_knows_its_world():
    known = KnownCaptions(load_system(PROJECT_ROOT / "data/demo", with_codec=False).captions)
    assert len(known.captions) > 100
    assert not [p for p in read_prompts(PROJECT_ROOT / "data/prompts/demo.jsonl") if known.judge(p)]
    assert known.judge("a cat meows")
