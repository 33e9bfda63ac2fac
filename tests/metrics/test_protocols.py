"""Protocols by name: known ones state themselves, unknown ones and absent weights fail at once."""

import pytest
import torch
from commands import compose_command
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from tiny_clap import save_clap

from foley.core.components import CheckpointError, save_component
from foley.core.config import PROJECT_ROOT
from foley.metrics.embedded.network import EmbeddedExtractor
from foley.metrics.features import LabelledAudio, extract_audio
from foley.metrics.protocols import ProtocolError, clap, clap_16khz, load_protocol, panns, stable_audio, vggish

CONFIG = {"labels": ["a", "b"], "label_groups": {}, "widths": [4, 4, 4, 4, 4], "feature_dim": 8}


@pytest.fixture
def extractor_directory(tmp_path):
    target = f"{EmbeddedExtractor.__module__}.{EmbeddedExtractor.__qualname__}"
    save_component(EmbeddedExtractor(**CONFIG), {"_target_": target, **CONFIG}, tmp_path)
    return tmp_path


def test_embedded_states_what_its_numbers_depend_on(extractor_directory) -> None:
    stated = load_protocol("embedded", extractor_directory).describe()
    assert (stated["protocol"], stated["version"], stated["sample_rate_hz"], stated["channels"]) == (
        "embedded",
        1,
        24000,
        1,
    )
    assert {"padding", "resampler", "level", "channel_rule", "extractor_hash", "direction"} <= set(stated)


@pytest.mark.parametrize("name", ["clapp", "../embedded"])
def test_unknown_protocols_name_what_exists(name: str, extractor_directory) -> None:
    with pytest.raises(ProtocolError, match=r"unknown protocol.*available: embedded, panns, vggish"):
        load_protocol(name, extractor_directory)


def test_absent_and_foreign_weights_are_refused(extractor_directory, tmp_path) -> None:
    with pytest.raises(ProtocolError, match=r"model\.safetensors does not exist.*SHA-256 abc.*train_extractor"):
        load_protocol("embedded", tmp_path / "nothing", "abc")
    with pytest.raises(ProtocolError, match="expected abc"):
        load_protocol("embedded", extractor_directory, "abc")


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (panns, r"Cnn14_16k_mAP=0\.438\.pth does not exist .*none is published.*zenodo\.org/records/3987831"),
        (vggish, r"vggish-10086976\.pth does not exist .*SHA-256: 10086976.*github\.com/harritaylor/torchvggish"),
        (stable_audio, r"torchopenl3_mel256_env_512\.pth\.tar does not exist .*github\.com/torchopenl3"),
    ],
)
def test_absent_published_weights_fail_at_once_with_file_source_and_hash(build, named: str, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=named):
        build(tmp_path)


def test_weights_of_another_hash_are_refused(tmp_path) -> None:
    (tmp_path / "vggish-10086976.pth").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"has SHA-256 .*, expected 10086976"):
        vggish(tmp_path)


def test_clap_that_cannot_tell_captions_apart_is_refused(tmp_path) -> None:
    with pytest.raises(ProtocolError, match=r"unrelated captions have a similarity of"):
        clap(str(save_clap(tmp_path / "one", words=[])))
    (protocol,) = clap(str(save_clap(tmp_path / "two")))
    clips = [LabelledAudio(torch.randn(48000), None, None, caption) for caption in ("a dog barks", "rain falls")]
    features = extract_audio(clips, protocol)
    assert features.features.shape == (2, 12)
    assert features.logits.shape == (2, 0)


def test_clap_at_16_khz_is_a_protocol_of_its_own(tmp_path) -> None:
    weights = str(save_clap(tmp_path))
    (wide,), (narrow,) = clap(weights), clap_16khz(weights)
    assert (narrow.name, narrow.scores, narrow.extractor_hash) == ("clap_16khz", wide.scores, wide.extractor_hash)
    assert (narrow.describe()["through_hz"], narrow.sample_rate_hz) == (16000, 48000)
    assert narrow.identity != wide.identity  # so that no cached features of one are taken for the other's


@pytest.mark.parametrize("name", ["clap", "clap_16khz"])
def test_each_clap_protocol_takes_the_package_of_its_authors(name: str) -> None:
    option = f"eval_preset.protocol.{name}" if name == "clap_16khz" else f"protocol.{name}"
    chosen = "eval_preset=ezaudio" if name == "clap_16khz" else f"protocol={name}"
    cfg = compose_command("evaluate", "samples=x", "reference=y", chosen, f"{option}.backend=laion_clap")
    with pytest.raises(InstantiationException, match="backend=laion_clap takes its weights from a file"):
        instantiate(cfg.protocol[name])


def test_the_shipped_extractor_tells_procedural_sounds_apart() -> None:
    protocol = load_protocol("embedded", PROJECT_ROOT / "data" / "extractor")
    time = torch.arange(2 * protocol.sample_rate_hz) / protocol.sample_rate_hz
    noise = torch.randn(time.shape, generator=torch.Generator().manual_seed(0))
    clips = [LabelledAudio(0.5 * torch.sin(2 * torch.pi * 700 * time)), LabelledAudio(0.1 * noise)]
    chosen = extract_audio(clips, protocol).logits.argmax(1)
    assert [protocol.extractor.labels[index] for index in chosen] == ["pure tone", "white noise"]
