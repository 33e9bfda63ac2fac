"""Adapters at sampling: merged before all else, said in the JSON, and gone without a trace."""

import pytest
import torch
from adapter_parts import small_system, write_adapters
from commands import compose_command, run_command
from small_system import STEPS

from foley.accel.caching.fora import Fora
from foley.cli.sampling import chosen_adapters, open_requested, requested_settings
from foley.core.components import CheckpointError
from foley.core.hashing import hash_module
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import load_system, save_system


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A system's folder, and two adapters of it beside it."""
    folder = tmp_path_factory.mktemp("adapted")
    save_system(small_system(), folder / "system")
    system = load_system(folder / "system")
    modules = {name: system.modules[name] for name in ("denoiser", "text")}
    for seed in (1, 2):
        write_adapters(folder / str(seed), modules, seed, dora=seed == 2, caption=f"a zorble {seed}")
    return folder


def audio(generator, **options):
    return generator.generate(["a zorble 1"], seeds=[3], **{**STEPS, **options}).audio


def test_they_are_merged_said_and_removed_bit_by_bit(folder):
    generator = TextToAudio.load(folder / "system")
    plain, digest = audio(generator), generator.model_hash
    generator.use_adapters([{"path": folder / "1", "scale": 0.5}, folder / "2"])
    result = generator.generate(["a zorble 1"], seeds=[3], **STEPS)
    assert [(one["path"], one["scale"]) for one in result.settings["adapters"]] == [
        (str(folder / "1"), 0.5),
        (str(folder / "2"), 1.0),
    ]
    assert result.settings["model_hash"] == hash_module(generator.denoiser) != digest
    assert not torch.allclose(result.audio, plain, atol=1e-4)
    assert torch.equal(
        audio(
            TextToAudio.load(folder / "system", adapters=[{"path": folder / "1", "scale": 0.5}, {"path": folder / "2"}])
        ),
        result.audio,
    )
    given = [{"path": folder / "1", "scale": 0.5}, folder / "2"]
    assert TextToAudio.from_pretrained(folder / "system", adapters=given).model_hash == generator.model_hash
    assert not torch.equal(audio(generator, accelerator=Fora(interval=2)), result.audio)
    generator.use_adapters([])
    again = generator.generate(["a zorble 1"], seeds=[3], **STEPS)
    assert torch.equal(again.audio, plain)
    assert "adapters" not in again.settings
    assert again.settings["model_hash"] == digest


def test_their_captions_are_known_and_saved_with_their_weights(folder, tmp_path, caplog):
    generator = TextToAudio.load(folder / "system", adapters=[folder / "1"])
    generator.save(tmp_path / "merged")
    merged = TextToAudio.load(tmp_path / "merged")
    assert merged.known_captions.captions == ("a zorble 1",)
    assert merged.known_captions.judge("a zorble 1") is None
    assert torch.equal(audio(merged), audio(generator))


def test_an_export_has_them_in_its_weights(folder, tmp_path):
    adapters = f"adapters=[{{path: {folder / '1'}, scale: 0.5}}]"
    run_command("script/export_system", f"ckpt={folder / 'system'}", adapters, f"output_dir={tmp_path / 'out'}")
    direct = TextToAudio.load(folder / "system", adapters=[{"path": folder / "1", "scale": 0.5}])
    assert torch.equal(audio(TextToAudio.load(tmp_path / "out")), audio(direct))


def test_rounded_weights_take_none(folder):
    generator = TextToAudio.load(folder / "system", adapters=[folder / "1"])
    generator.optimise(quantised="int8_weight")
    assert audio(generator).isfinite().all()  # rounded with the adapters in them
    with pytest.raises(ValueError, match="adapters: the denoiser's weights are rounded"):
        generator.use_adapters([folder / "2"])


def test_graphs_take_none(folder):
    generator = TextToAudio.load(folder / "system")
    generator._backend._exported, generator._backend._name = object(), "onnx"
    with pytest.raises(ValueError, match="adapters: backend=onnx runs graphs"):
        generator.use_adapters([folder / "1"])


def test_the_command_takes_a_list(folder):
    cfg = compose_command("sample", f"system={folder / 'system'}", f"adapters=[{{path: {folder / '1'}, scale: 0.5}}]")
    generator = open_requested(cfg, requested_settings(cfg))
    assert generator.inference["adapters"][0]["scale"] == 0.5
    assert not chosen_adapters(compose_command("sample"))
    with pytest.raises(ValueError, match=r"adapters\[0\]"):
        chosen_adapters(compose_command("sample", "adapters=[{scale: 0.5}]"))
    with pytest.raises(CheckpointError, match=r"neither adapter.json"):
        chosen_adapters(compose_command("sample", f"adapters=[{{path: {folder}}}]"))


@pytest.mark.parametrize("rule", ["interval", "apg"])
def test_the_command_guides_by_another_rule(rule):
    cfg = compose_command("sample", f"guidance={rule}", "guidance_scale=4", "guidance.start=0.5")
    guidance = requested_settings(cfg).guidance
    assert (guidance.rule, guidance.scale, guidance.start) == (rule, 4, 0.5)
