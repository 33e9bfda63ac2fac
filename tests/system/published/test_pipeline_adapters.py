"""Adapters of the transformers and U-Nets of diffusers, merged into published pipelines and taken out again."""

from pathlib import Path

import pytest
import tiny_families
import tiny_pipelines
import torch
from adapter_parts import write_adapters

from foley.core.hashing import hash_module
from foley.generation.pipeline_to_audio import PipelineToAudio
from foley.models.lora import Lora, adapted_layers
from foley.system.adapters import AdapterChoice, AdapterStack
from foley.system.published.stable_audio import StableAudio

FAMILIES = {
    "stable_audio": tiny_pipelines.stable_audio,
    "audioldm2": tiny_pipelines.audioldm2,
    **{
        name: getattr(tiny_families, name)
        for name in ("stable_audio_3", "ace_step", "longcat", "audioldm", "tangoflux")
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_adapted(name: str, tmp_path: Path) -> None:
    pipeline = FAMILIES[name]()
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    digest, names = hash_module(denoiser), [name for name, _ in denoiser.named_parameters()]
    stack = AdapterStack({"denoiser": denoiser})
    stack.use([AdapterChoice(write_adapters(tmp_path, {"denoiser": denoiser}))])
    assert hash_module(denoiser) != digest
    stack.remove()
    assert (hash_module(denoiser), [name for name, _ in denoiser.named_parameters()]) == (digest, names)
    Lora(rank=2).inject(denoiser)
    blocks = {layer.partition(".")[0] for layer in adapted_layers(denoiser)}
    assert blocks
    assert any("to_q" in layer for layer in adapted_layers(denoiser))


def test_a_pipeline_generates_with_them_and_then_as_before(tmp_path: Path) -> None:
    generator = PipelineToAudio(StableAudio(tiny_pipelines.stable_audio()))
    folder = write_adapters(tmp_path, {"denoiser": generator.audio.denoiser})
    plain = generator.generate(["rain"], 0.1, [3], num_steps=2)
    generator.use_adapters([{"path": folder, "scale": 0.5}])
    adapted = generator.generate(["rain"], 0.1, [3], num_steps=2)
    assert adapted.settings["adapters"][0]["scale"] == 0.5
    assert adapted.settings["model_hash"] != plain.settings["model_hash"]
    assert not torch.equal(adapted.audio, plain.audio)
    generator.use_adapters([])
    assert torch.equal(generator.generate(["rain"], 0.1, [3], num_steps=2).audio, plain.audio)
    generator.optimise(quantised="int8_weight")
    with pytest.raises(ValueError, match="adapters: the weights are rounded"):
        generator.use_adapters([folder])
