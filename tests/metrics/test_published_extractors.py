"""Published extractors: their checkpoints load strictly, and their front ends are those of their authors."""

import numpy as np
import pytest
import torch
from published_keys import cnn14, openl3, passt, save_state, vggish
from torchaudio.compliance.kaldi import get_mel_banks

from foley.core.components import CheckpointError
from foley.metrics.extractors import cnn14 as cnn14_module
from foley.metrics.extractors import passt as passt_module
from foley.metrics.extractors import vggish as vggish_module
from foley.metrics.extractors.cnn14 import Cnn14
from foley.metrics.extractors.openl3 import OpenL3, openl3_weights
from foley.metrics.extractors.passt import Passt
from foley.metrics.extractors.published import mel_triangles
from foley.metrics.extractors.vggish import Vggish
from foley.metrics.features import LabelledAudio, extract_audio
from foley.metrics.preprocessing import OpenL3Preprocessing, PasstPreprocessing, VggishPreprocessing
from foley.metrics.protocols import EvaluationProtocol

CHECKPOINTS = {
    "cnn14": (cnn14(), cnn14_module.WEIGHTS, Cnn14),
    "vggish": (vggish(), vggish_module.WEIGHTS, Vggish),
    "openl3": (openl3(), openl3_weights("music"), OpenL3),
    "passt": (passt(), passt_module.WEIGHTS, Passt),
}
LANDMARKS = {  # published name to ours
    "cnn14": {
        "fc1.bias": "features.bias",
        "conv_block6.bn2.bias": "blocks.6.bn2.bias",
        "logmel_extractor.melW": "filters",
    },
    "vggish": {"embeddings.4.bias": "embeddings.4.bias"},
    "openl3": {"audio_embedding_layer.bias": "convolutions.7.bias", "batch_normalization_2.bias": "norms.1.bias"},
    "passt": {"head.1.bias": "classify.bias", "blocks.11.attn.proj.bias": "blocks.11.proj.bias"},
}


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vggish_extractor() -> Vggish:
    return Vggish()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_checkpoints_load_strictly(name: str, tmp_path) -> None:
    shapes, weights, build = CHECKPOINTS[name]
    state = save_state(shapes, tmp_path / weights.file, weights.section)
    module = weights.load(build(), tmp_path / weights.file)
    own = module.state_dict()
    for published, ours in LANDMARKS[name].items():
        torch.testing.assert_close(own[ours], state[published])
    assert not module.training


def test_a_checkpoint_with_other_keys_is_refused_with_their_names(tmp_path) -> None:
    shapes = passt(48, 1)
    shapes["surprise"] = shapes.pop("norm.weight")
    save_state(shapes, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: norm\.weight[^$]*unexpected.*surprise"):
        passt_module.WEIGHTS.load(Passt(48, 1, 2), tmp_path / "file.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        passt_module.WEIGHTS.load(Passt(48, 1, 2), tmp_path / "list.pt")


def test_mel_triangles_are_those_of_kaldi() -> None:
    expected, _ = get_mel_banks(128, 1024, 32000, 0.0, 15000.0, 100.0, -500.0, 1.0)
    torch.testing.assert_close(mel_triangles(128, 1024, 32000, 0.0, 15000.0)[:-1], expected.T, atol=1e-4, rtol=0)


def test_vggish_log_mel_equals_frames_transformed_one_by_one(vggish_extractor: Vggish) -> None:
    audio = noise(1, 16000)
    frames = audio[0].double().unfold(0, 400, 160).numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    magnitude = np.abs(np.fft.rfft(frames * window, 512))
    expected = np.log(magnitude @ vggish_extractor.filters.double().numpy() + 0.01)
    torch.testing.assert_close(
        vggish_extractor.log_mel(audio)[0].double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-4
    )


def test_passt_log_mel_equals_its_definition() -> None:
    audio, extractor = noise(1, 32000), Passt(48, 1, 2)
    emphasised = torch.nn.functional.conv1d(audio[:, None], torch.tensor([[[-0.97, 1.0]]]))[:, 0]
    spectrum = torch.stft(
        emphasised, 1024, 320, 800, torch.hann_window(800, periodic=False), center=True, return_complex=True
    )
    banks, _ = get_mel_banks(128, 1024, 32000, 0.0, 15000.0, 100.0, -500.0, 1.0)
    mel = torch.nn.functional.pad(banks, (0, 1)) @ spectrum.abs().square()
    torch.testing.assert_close(extractor.log_mel(audio), ((mel + 1e-5).log() + 4.5) / 5, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_openl3_embeds_199_frames_below_the_loudest_cell() -> None:
    extractor = OpenL3().eval()
    extractor.filters.uniform_()
    levels = extractor.decibel(noise(2, 48000))
    assert levels.shape == (2, 256, 199)
    assert (levels.amax(dim=(1, 2)) == 0).all()
    assert levels.min() >= -80
    assert extractor.embed(noise(1, 48000)).shape == (1, 512)


@torch.inference_mode()
def test_cnn14_gives_features_and_logits() -> None:
    extractor = Cnn14().eval()
    extractor.filters.uniform_()
    output = extractor(noise(2, 32000))
    assert (output.features.shape, output.logits.shape) == ((2, 2048), (2, 527))
    assert output.features.min() >= 0


def protocol_of(preprocessing, extractor) -> EvaluationProtocol:
    return EvaluationProtocol("test", 1, preprocessing, extractor.eval(), "hash", ())


def test_windows_of_clips_of_several_lengths_become_rows(vggish_extractor: Vggish) -> None:
    protocol = protocol_of(VggishPreprocessing(), vggish_extractor)
    clips = [LabelledAudio(noise(16000 * seconds)) for seconds in (1, 3, 1)]
    found = extract_audio(clips, protocol)
    assert found.windows.tolist() == [1, 3, 1]
    assert found.features.shape == (5, 128)
    assert found.logits.shape == (3, 0)
    alone = extract_audio(clips[1:2], protocol)
    assert alone.features.shape == (3, 128)


def test_stereo_embeddings_join_the_channels(monkeypatch) -> None:
    extractor = OpenL3()
    monkeypatch.setattr(extractor, "embed", lambda windows: windows[:, 24000:24512])
    left, right = noise(2, 44100)
    stereo = extract_audio([LabelledAudio(torch.stack([left, right]))], protocol_of(OpenL3Preprocessing(), extractor))
    assert stereo.features.shape == (2, 1024)
    mono = extract_audio([LabelledAudio(left)], protocol_of(OpenL3Preprocessing(), extractor))
    assert torch.equal(mono.features[:, :512], mono.features[:, 512:])


@pytest.mark.parametrize("seconds", [3, 12])
def test_passt_averages_the_logits_of_windows(seconds: int) -> None:
    torch.manual_seed(0)
    extractor = Passt(48, 1, 2)
    found = extract_audio([LabelledAudio(noise(32000 * seconds))], protocol_of(PasstPreprocessing(), extractor))
    windows = PasstPreprocessing()(noise(1, 32000 * seconds), 32000)
    expected = torch.stack([extractor(window[None, None]).logits[0] for window in windows]).mean(dim=0)
    torch.testing.assert_close(found.logits[0], expected, atol=1e-4, rtol=1e-4)
