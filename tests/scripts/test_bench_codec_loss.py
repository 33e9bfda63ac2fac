"""Where a spectral codec loses: an identity, and which clips are asked."""

import math

import pytest
import torch
from commands import load_command, run_command

from foley.data.dataset import AudioItem
from foley.models.codec.base import GaussianPosterior
from foley.models.codec.spectral_vae import SpectralVAE

LOSS = load_command("bench/codec_loss")


def test_without_a_floor_its_spectra_lose_what_guessed_phases_lose():
    torch.manual_seed(0)
    codec = SpectralVAE(width=8, latent_channels=4, floor=1e-12).eval()
    with torch.no_grad():
        lost = LOSS["lose"](codec, AudioItem(0.1 * torch.randn(4801), "hiss", id="hisses/1"))
    assert lost["its spectra"] == pytest.approx(lost["phases guessed"], rel=1e-3)
    assert 0 < lost["phases guessed"] < lost["its network"]


def test_where_phases_are_learnt_its_spectra_have_guessed_ones():
    torch.manual_seed(0)
    codec = SpectralVAE(width=8, latent_channels=4, floor=1e-12, learns_phases=True).eval()
    with torch.no_grad():
        lost = LOSS["lose"](codec, AudioItem(0.1 * torch.randn(4801), "hiss", id="hisses/1"))
    assert lost["its spectra"] == pytest.approx(lost["phases guessed"], rel=1e-3)
    assert lost["its network"] != lost["its network, no silence"]


def test_what_latents_say_is_counted_by_direction(monkeypatch):
    codec, items = SpectralVAE(width=8, latent_channels=4).eval(), [AudioItem(torch.zeros(4800), "a", id="a/1")] * 3
    means = torch.randn(1, 1, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[[1.0], [2.0], [0], [0]]]
    )
    said = GaussianPosterior(means, torch.full_like(means, 0.1))  # four channels, of which two say the same
    monkeypatch.setattr(codec, "posterior", lambda audio: said)
    latents = LOSS["describe_latents"](codec, items)
    assert (latents["channels"], latents["directions"]) == (4, 1)
    assert latents["kilobits_per_second"] == pytest.approx(math.log2(501) / 2 * 50 / 1000, rel=0.01)


def test_clips_are_chosen_and_summed_up_by_collection():
    class Source:
        names = ("a/1", "a/2", "a/3", "a/4", "b/1")

        def __len__(self):
            return len(self.names)

        def clip_name(self, index):
            return self.names[index]

    assert LOSS["chosen"](Source(), 2) == [0, 2, 4]
    clips = [{"id": "a/1", "loss": 1.0}, {"id": "a/3", "loss": 2.0}, {"id": "b/1", "loss": 5.0}]
    assert LOSS["summarise"](clips) == [{"group": "a", "n": 2, "loss": 1.5}, {"group": "b", "n": 1, "loss": 5.0}]


@pytest.mark.parametrize("script", ["bench/codec_loss", "script/score_codec"])
def test_a_split_of_short_clips_alone_is_said(script, tmp_path):
    data = ["data=procedural", "data.splits.sizes={train: 1, test: 1}", "minimum_seconds=50"]
    with pytest.raises(ValueError, match="split=test has no clip of minimum_seconds=50 or more"):
        run_command(script, "codec_path=data/demo/codec", *data, f"output_dir={tmp_path}")
