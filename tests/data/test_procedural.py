"""The procedural data set: determinism, balance, bounds, and captions that are true of the sound."""

import numpy as np
import pytest
import torch

from foley.data.procedural import CLASS_NAMES, ProceduralDataset, captions_for, components_of
from foley.data.procedural.captions import TEMPLATES, _tidy
from foley.data.procedural.dataset import CLASSES
from foley.data.procedural.synthesis import Timeline

RATE_HZ = 24_000


def _dominant_hz(audio: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(audio.size)))
    return float(np.argmax(spectrum) * RATE_HZ / audio.size)


def _centroid_hz(audio: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(audio)) ** 2
    return float(np.sum(power * np.fft.rfftfreq(audio.size, 1 / RATE_HZ)) / power.sum())


def _draw(name: str, seed: int = 0, seconds: float = 2.0) -> np.ndarray:
    return CLASSES[name].draw(Timeline(round(seconds * RATE_HZ), RATE_HZ, np.random.default_rng(seed)))[0]


def test_there_are_at_least_24_classes_with_8_distinct_canonical_captions_each() -> None:
    assert len(CLASS_NAMES) >= 24
    assert set(CLASS_NAMES) == set(TEMPLATES)
    captions = [caption for name in CLASS_NAMES for caption in captions_for(name)]
    assert len(captions) == len(set(captions)) >= 8 * len(CLASS_NAMES)
    assert not any("{" in caption or "  " in caption for caption in captions)
    with pytest.raises(KeyError, match="kazoo"):
        captions_for("kazoo")


def test_an_item_depends_on_seed_and_index_only() -> None:
    first, again = ProceduralDataset(64, 7, 0.5), ProceduralDataset(64, 7, 0.5)
    other = ProceduralDataset(64, 8, 0.5)
    for index in (0, 11, 63):
        item = first.render(index, 0)
        repeated = again.render(index, 5)
        assert torch.equal(item.audio, repeated.audio)
        assert (item.caption, item.label, item.id) == (repeated.caption, repeated.label, repeated.id)
        assert not torch.equal(item.audio, other.render(index, 0).audio)


def test_fresh_clips_each_epoch_when_asked_for() -> None:
    dataset = ProceduralDataset(8, 7, 0.5, fresh_each_epoch=True)
    assert torch.equal(dataset.render(3, 1).audio, dataset.render(3, 1).audio)
    assert not torch.equal(dataset.render(3, 1).audio, dataset.render(3, 2).audio)
    assert dataset.render(3, 1).label == dataset.render(3, 2).label
    assert dataset.render(3, 1).id != dataset.render(3, 2).id


def test_classes_alternate_with_the_index() -> None:
    dataset = ProceduralDataset(2 * len(CLASS_NAMES), 0, 0.1)
    labels = [dataset.render(index, 0).label for index in range(len(dataset))]
    assert labels == [*CLASS_NAMES, *CLASS_NAMES]
    some = ProceduralDataset(4, 0, 0.1, classes=["rain", "bell"])
    assert [some.render(index, 0).label for index in range(4)] == ["rain", "bell", "rain", "bell"]


@pytest.mark.parametrize("seconds", [0.02, 0.3, 2.0, 5.0])
def test_every_clip_is_finite_bounded_and_audible(seconds: float) -> None:
    count = len(CLASS_NAMES) * (2 if seconds <= 2 else 1)
    dataset = ProceduralDataset(count, 1, seconds, combination_probability=0.3)
    for index in range(count):
        audio = dataset.render(index, 0).audio
        assert audio.dtype == torch.float32
        assert audio.shape == (round(seconds * RATE_HZ),)
        assert bool(torch.isfinite(audio).all())
        assert 0.2 < float(audio.abs().max()) < 0.95


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_a_two_second_clip_shows_its_class_in_any_draw(name: str) -> None:
    for seed in range(4):
        audio = _draw(name, seed)
        half_energies = (audio.reshape(2, -1) ** 2).sum(axis=1)
        assert half_energies.max() > 0
        assert np.argmax(np.abs(audio) > 0.1 * np.abs(audio).max()) < 0.45 * audio.size


def test_combinations_name_both_components_and_hold_both() -> None:
    dataset = ProceduralDataset(40, 3, 1.0, classes=["white noise", "pure tone"], combination_probability=1.0)
    kinds = set()
    for index in range(40):
        item = dataset.render(index, 0)
        assert set(components_of(item.label)) == {"white noise", "pure tone"}
        assert components_of(item.label)[0] == dataset.classes[index % 2]
        in_sequence = any(word in item.caption for word in ("then", "followed by", "after that"))
        flatness = [_flatness(half) for half in item.audio.numpy().reshape(2, -1)]
        assert (max(flatness) / min(flatness) > 100) == in_sequence, item.caption
        kinds.add(in_sequence)
    assert kinds == {True, False}


def _flatness(audio: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(audio * np.hanning(audio.size)))[10:] ** 2
    return float(np.exp(np.mean(np.log(power + 1e-12))) / np.mean(power))


def test_the_pitch_word_is_true_of_the_tone() -> None:
    dataset = ProceduralDataset(60, 0, 0.5, classes=["pure tone"])
    pitches: dict[str, list[float]] = {"low": [], "high": []}
    for index in range(60):
        item = dataset.render(index, 0)
        words = item.caption.split()
        for key, forms in {"low": {"low", "low-pitched", "deep"}, "high": {"high", "high-pitched"}}.items():
            if forms & set(words):
                pitches[key].append(_dominant_hz(item.audio.numpy()))
    assert min(len(found) for found in pitches.values()) > 3
    assert max(pitches["low"]) < 300 * 5 ** (1 / 3) + 5
    assert min(pitches["high"]) > 300 * 5 ** (2 / 3) - 5


@pytest.mark.parametrize(("name", "sign"), [("rising sweep", 1), ("falling sweep", -1)])
def test_sweeps_go_the_way_they_are_called(name: str, sign: int) -> None:
    frames = [_dominant_hz(frame) for frame in _draw(name, seconds=0.8).reshape(16, -1)]
    assert np.all(sign * np.diff(frames) > 0)


def test_noises_differ_in_their_spectra() -> None:
    names = ("brown noise", "wind", "pink noise", "white noise")
    centroids = [np.mean([_centroid_hz(_draw(name, seed)) for seed in range(4)]) for name in names]
    assert np.all(np.diff(centroids) > 40)
    assert _centroid_hz(_draw("rain")) > 5000
    assert _centroid_hz(_draw("thunder")) < 300


def test_ocean_swells_and_white_noise_does_not() -> None:
    def swing(name: str) -> float:
        levels = np.sqrt((_draw(name).reshape(20, -1) ** 2).mean(axis=1))
        return float(levels.max() / levels.min())

    assert swing("ocean") > 8
    assert swing("white noise") < 1.2


def test_the_rate_parameter_is_the_number_of_events() -> None:
    timeline = Timeline(4 * RATE_HZ, RATE_HZ, np.random.default_rng(0))
    audio = CLASSES["metronome"].render(timeline, rate_hz=3.0)
    loud = np.abs(audio).reshape(-1, 240).max(axis=1) > 0.3
    assert abs(int(np.sum(np.diff(loud.astype(int)) == 1)) - 12) <= 1


@pytest.mark.parametrize(
    ("text", "tidied"),
    [("a  alarm", "an alarm"), ("an high tone", "a high tone"), ("a low hum", "a low hum"), ("an  x", "a x")],
)
def test_articles_and_gaps_are_tidied(text: str, tidied: str) -> None:
    assert _tidy(text) == tidied


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["kazoo"]}, "kazoo"),
        ({"classes": []}, "choose among"),
        ({"sample_rate_hz": 8000}, "8000"),
        ({"duration_seconds": 0.0}, "0.0"),
        ({"combination_probability": 2.0}, "2.0"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProceduralDataset(**{"size": 4, "seed": 0, "duration_seconds": 1.0, **arguments})


def test_an_index_outside_is_refused() -> None:
    with pytest.raises(IndexError, match="4"):
        ProceduralDataset(4, 0, 1.0).render(4, 0)
