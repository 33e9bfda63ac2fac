"""Candidates and their ranking: what lies in the folder, that both go on where they stopped, and what is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_system import CONFIGS, STEPS
from stirring_parts import stir
from torch import Tensor

from foley.data.latent_format import LatentCacheError
from foley.data.latents import LatentCacheIndex, LatentReader, StaleCacheError
from foley.data.preferences import PREFERENCES_FILE, PreferenceError, Preferences
from foley.generation.preferences import Candidates, generate_candidates, merge_candidates, rank_candidates
from foley.generation.prompts import LabelledPrompts
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system

PROMPTS = LabelledPrompts(["rain", "a bell rings", "wind", "a dog barks"], ["rain", "bell", None, "dog bark"])
CANDIDATES = Candidates(PROMPTS, num=3, seed=10, val_fraction=0.25)
SETTINGS = GenerationSettings(**STEPS, batch_size=2)


class Loudness:
    """A reward that needs no network; counts its clips, and stops after some."""

    def __init__(self, name: str = "loudness", stop_after: int | None = None) -> None:
        self.identity = {"reward": name}
        self.heard: list[str] = []
        self.stop_after = stop_after

    def __call__(
        self, audio: Tensor, sample_rate_hz: int, captions: Sequence[str], labels: Sequence[str | None]
    ) -> list[float]:
        assert audio.shape == (len(captions), 1, 1000)
        assert sample_rate_hz == 2000
        self.heard += captions
        if self.stop_after is not None and len(self.heard) > self.stop_after:
            raise KeyboardInterrupt
        return audio.abs().mean(dim=(1, 2)).tolist()


@pytest.fixture(scope="module")
def generator() -> TextToAudio:
    torch.manual_seed(0)
    system = build_system(CONFIGS)
    stir(system.modules["denoiser"])  # zero-initialised layers would hide the text
    system.modules["normaliser"].set(torch.full((4,), 0.5), torch.full((4,), 2.0))
    return TextToAudio(system)


@pytest.fixture(scope="module")
def folder(generator: TextToAudio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "pairs"
    generate_candidates(generator, CANDIDATES, SETTINGS, folder)
    merge_candidates(folder, CANDIDATES)
    return folder


def latents(folder: Path) -> dict[str, Tensor]:
    index = LatentCacheIndex.read(folder)
    reader = LatentReader(index)
    return {id: reader.read(row, 0, int(index.clips.num_frames[row])) for row, id in enumerate(index.clips.id)}


def test_latents_are_those_of_the_same_prompt_and_seed_before_they_are_normalised(
    generator: TextToAudio, folder: Path
) -> None:
    index = LatentCacheIndex.read(folder)
    assert sorted(index.clips.id) == [f"{row:06d}/{n}" for row in range(4) for n in range(3)]
    assert index.layout.store == "sample"
    held_out = [entry.id for entry in index.entries if entry.split == "val"]
    assert held_out == ["000000/0", "000000/1", "000000/2"]
    (entry,) = [entry for entry in index.entries if entry.id == "000001/2"]
    assert (entry.caption, entry.label, entry.duration_seconds) == ("a bell rings", "bell", 0.5)
    audio = generator.generate(["a bell rings"], seeds=[10 + 3 + 2], **STEPS).audio
    kept = latents(folder)["000001/2"][:, 0].float().T
    decoded = generator.codec.decode(kept[None])[..., : audio.shape[-1]]
    torch.testing.assert_close(decoded, audio, atol=2e-2, rtol=0.1)  # as float16 holds them


def test_the_loudest_and_the_quietest_are_the_pair_of_a_prompt(generator: TextToAudio, folder: Path) -> None:
    reward = Loudness()
    found = rank_candidates(generator, reward, folder, batch_size=5)
    assert len(reward.heard) == 12
    assert len(found.pairs) == 4
    assert {pair.winner[:6] for pair in found.pairs} == {f"{row:06d}" for row in range(4)}
    for pair in found.pairs:
        assert pair.winner[:6] == pair.loser[:6]
        assert pair.winner_reward > pair.loser_reward
    assert found.facts["mean_losers"] < found.facts["mean_all"] < found.facts["mean_winners"]
    assert Preferences.read(LatentCacheIndex.read(folder)) == found
    again = Loudness()
    assert rank_candidates(generator, again, folder).pairs == found.pairs
    assert again.heard == []  # the scores are kept
    other = Loudness("another")
    rank_candidates(generator, other, folder)
    assert len(other.heard) == 12


def test_a_ranking_goes_on_where_it_was_stopped(generator: TextToAudio, folder: Path) -> None:
    stopped = Loudness("stopped", stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        rank_candidates(generator, stopped, folder, batch_size=3)
    rest = Loudness("stopped")
    assert rank_candidates(generator, rest, folder).pairs == rank_candidates(generator, Loudness(), folder).pairs
    assert len(rest.heard) == 6


def test_a_generation_goes_on_where_it_was_stopped(
    generator: TextToAudio, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, denoise, calls = tmp_path / "pairs", generator.denoise_clips, []

    def counted(clips: Sequence[object], settings: GenerationSettings) -> None:
        calls.append(len(clips))
        if len(calls) == 3:
            raise KeyboardInterrupt
        denoise(clips, settings)

    monkeypatch.setattr(generator, "denoise_clips", counted)
    with pytest.raises(KeyboardInterrupt):
        generate_candidates(generator, CANDIDATES, SETTINGS, target)
    with pytest.raises(LatentCacheError, match="no latent cache"):
        rank_candidates(generator, Loudness(), target)
    generate_candidates(generator, CANDIDATES, SETTINGS, target)
    assert sum(calls) == 12 + 2  # the interrupted batch again
    merge_candidates(target, CANDIDATES)
    made, expected = latents(target), latents(folder)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[id], expected[id]) for id in made)


@pytest.mark.parametrize(
    ("candidates", "settings"),
    [
        (replace(CANDIDATES, seed=11), SETTINGS),
        (replace(CANDIDATES, num=4), SETTINGS),
        (CANDIDATES, replace(SETTINGS, num_steps=5)),
    ],
)
def test_a_folder_holds_the_sounds_of_one_request(
    generator: TextToAudio, folder: Path, candidates: Candidates, settings: GenerationSettings
) -> None:
    with pytest.raises(LatentCacheError, match="holds latents of another request"):
        generate_candidates(generator, candidates, settings, folder)


def test_without_a_difference_nothing_is_preferred(generator: TextToAudio, folder: Path) -> None:
    with pytest.raises(PreferenceError, match="of 4 prompts none has two sounds whose rewards differ by more than 9"):
        rank_candidates(generator, Loudness(), folder, least_gap=9)


def test_a_reward_that_is_no_number_is_refused(generator: TextToAudio, folder: Path) -> None:
    class Broken(Loudness):
        def __call__(self, audio: Tensor, *rest: object) -> list[float]:
            return [float("nan")] * len(audio)

    with pytest.raises(ValueError, match=r"reward: nan of clip 0000"):
        rank_candidates(generator, Broken("broken"), folder)


def test_latents_of_another_codec_are_not_decoded(generator: TextToAudio, folder: Path) -> None:
    torch.manual_seed(1)
    with pytest.raises(StaleCacheError, match="was encoded by the codec"):
        rank_candidates(TextToAudio(build_system(CONFIGS)), Loudness(), folder)


@pytest.mark.parametrize(("options", "message"), [({"num": 1}, "num=1"), ({"val_fraction": 2}, "val_fraction=2")])
def test_numbers_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Candidates(PROMPTS, **options)


def test_the_file_says_how_it_came_about(generator: TextToAudio, folder: Path) -> None:
    rank_candidates(generator, Loudness(), folder, least_gap=0.0)
    stored = json.loads((folder / PREFERENCES_FILE).read_text())
    assert stored["reward"] == {"reward": "loudness"}
    assert (stored["prompts"], stored["sounds"], stored["least_gap"]) == (4, 12, 0.0)
