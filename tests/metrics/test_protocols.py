"""Protocols by name: known ones state themselves, unknown ones and absent weights fail at once."""

import pytest
import torch

from foley.checkpoint import save_component
from foley.config import PROJECT_ROOT
from foley.metrics.clips import LabelledAudio
from foley.metrics.extractors.embedded import EmbeddedExtractor
from foley.metrics.features import extract_audio
from foley.metrics.protocols import ProtocolError, load_protocol

CONFIG = {"labels": ["a", "b"], "label_groups": {}, "widths": [4, 4, 4, 4, 4], "feature_dim": 8}


@pytest.fixture
def extractor_directory(tmp_path):
    target = f"{EmbeddedExtractor.__module__}.{EmbeddedExtractor.__qualname__}"
    save_component(EmbeddedExtractor(**CONFIG), {"_target_": target, **CONFIG}, tmp_path)
    return tmp_path


def test_embedded_states_what_its_numbers_depend_on(extractor_directory) -> None:
    protocol = load_protocol("embedded", extractor_directory)
    stated = protocol.describe()
    assert (stated["protocol"], stated["version"], stated["sample_rate_hz"], stated["channels"]) == (
        "embedded",
        1,
        24000,
        1,
    )
    assert {"padding", "extractor_hash", "direction"} <= set(stated)


def test_padding_is_a_whole_number_of_seconds_and_at_least_two(extractor_directory) -> None:
    protocol = load_protocol("embedded", extractor_directory)
    for samples, padded in ((1, 48000), (48000, 48000), (48001, 72000)):
        audio = torch.ones(samples)
        assert protocol.pad(audio).shape == (padded,)
        assert protocol.pad(audio).sum() == samples


@pytest.mark.parametrize("name", ["panns", "vggish", "../embedded"])
def test_unknown_protocols_name_what_exists(name: str, extractor_directory) -> None:
    with pytest.raises(ProtocolError, match=r"unknown protocol.*available: embedded"):
        load_protocol(name, extractor_directory)


def test_absent_and_foreign_weights_are_refused(extractor_directory, tmp_path) -> None:
    with pytest.raises(ProtocolError, match=r"model\.safetensors does not exist.*SHA-256 abc.*train_extractor"):
        load_protocol("embedded", tmp_path / "nothing", "abc")
    with pytest.raises(ProtocolError, match="expected abc"):
        load_protocol("embedded", extractor_directory, "abc")


def test_the_shipped_extractor_tells_procedural_sounds_apart() -> None:
    protocol = load_protocol("embedded", PROJECT_ROOT / "data" / "extractor")
    time = torch.arange(2 * protocol.sample_rate_hz) / protocol.sample_rate_hz
    noise = torch.randn(time.shape, generator=torch.Generator().manual_seed(0))
    clips = [LabelledAudio(0.5 * torch.sin(2 * torch.pi * 700 * time)), LabelledAudio(0.1 * noise)]
    chosen = extract_audio(clips, protocol).logits.argmax(1)
    assert [protocol.extractor.labels[index] for index in chosen] == ["pure tone", "white noise"]
