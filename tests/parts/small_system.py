"""A whole system of a few thousand untrained weights, its training checkpoint, and an accelerator that counts."""

from contextlib import contextmanager

import torch

from foley.core.components import save_component
from foley.core.config import PROJECT_ROOT

TOKENIZER = PROJECT_ROOT / "data" / "tokenizer" / "audiocaps.json"
CONFIGS = {
    "denoiser": {
        "_target_": "foley.models.dit.model.DiffusionTransformer",
        **{"latent_channels": 4, "width": 32, "depth": 2, "num_heads": 2, "context_dim": 16},
        "modulation": {"_target_": "foley.nn.adaln.AdaLNSola", "rank": 2, "alpha": 2},
    },
    "text": {
        "_target_": "foley.models.text.SmallTextEncoder",
        **{"tokenizer_file": str(TOKENIZER), "dim": 16, "depth": 1, "num_heads": 2, "max_length": 32},
    },
    "codec": {
        "_target_": "foley.models.codec.waveform_vae.WaveformVAE",
        **{"channels": 4, "multipliers": [1, 2], "strides": [4, 10], "latent_channels": 4, "num_units": [1, 1]},
        "sample_rate_hz": 2000,
    },
    "normaliser": {"_target_": "foley.models.codec.normaliser.LatentNormaliser", "channels": 4},
    "process": {"_target_": "foley.diffusion.process.DiffusionProcess"},
}
STEPS = {"num_steps": 4, "duration_seconds": 0.5}


class CountingAccelerator:
    """Stands for an accelerator: counts, and can fail inside a run."""

    def __init__(self, fail=False):
        self.fail, self.attached, self.evaluations, self.ended = fail, [], 0, 0

    @contextmanager
    def attach(self, denoiser):
        self.attached.append(denoiser)
        try:
            yield
        finally:
            self.attached.remove(denoiser)

    def on_run_start(self, run):
        assert self.attached

    def on_evaluation_start(self, context):
        self.evaluations += 1

    def on_evaluation_end(self, context, prediction):
        if self.fail:
            raise RuntimeError("inside a cached generation")

    def on_run_end(self):
        self.ended += 1


def training_checkpoint(system, tmp_path, codec_hash):
    """A checkpoint of `system` in `tmp_path`, as training writes them, and its codec beside it."""
    save_component(system.modules["codec"], CONFIGS["codec"], tmp_path / "codec")
    state = {
        f"{name}.{key}": tensor
        for name in ("denoiser", "text", "normaliser")
        for key, tensor in system.modules[name].state_dict().items()
    }
    components = {name: CONFIGS[name] for name in ("denoiser", "text", "normaliser", "process")}
    foley = {"components": components, "codec_dir": str(tmp_path / "codec"), "codec_hash": codec_hash}
    torch.save({"foley": foley, "state_dict": state}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"
