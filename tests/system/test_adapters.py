"""Adapters on disk and on modules: what `peft` makes of them, and that nothing is left of them once removed."""

import json
from pathlib import Path

import pytest
import torch
from adapter_parts import small_system, write_adapters
from peft import PeftModel

from foley.core.components import CheckpointError
from foley.core.hashing import hash_module
from foley.system.adapters import AdapterChoice, AdapterStack, adapter_choices


def untrained_no_more():
    """Denoiser and text encoder of which no matrix is zero: of such a one DoRA has no direction."""
    system = small_system()
    modules = {name: system.modules[name] for name in ("denoiser", "text")}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return modules


@pytest.fixture
def modules():
    return untrained_no_more()


@pytest.fixture(scope="module", params=["lora", "dora"])
def folders(request, tmp_path_factory) -> list[str]:
    modules, folder = untrained_no_more(), tmp_path_factory.mktemp(request.param)
    return [write_adapters(folder / str(seed), modules, seed, request.param == "dora") for seed in (1, 2)]


def output(modules) -> torch.Tensor:
    text = modules["text"](["a zorble", "rain"])
    noisy = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(3))
    return modules["denoiser"](noisy, torch.tensor([500, 20]), text.embeddings, context_mask=text.mask).detach()


def state_of(modules):
    """All that removal is to bring back."""
    return {
        name: (
            hash_module(module),
            [*vars(module)],
            [(n, id(p), p.requires_grad) for n, p in module.named_parameters()],
        )
        for name, module in modules.items()
    }


def test_removal_leaves_no_trace(modules, folders):
    before, plain, stack = state_of(modules), output(modules), AdapterStack(modules)
    for _ in range(2):
        for number, folder in enumerate(folders):
            stack.load(AdapterChoice(folder, 0.8 - number))
        loaded = output(modules)
        assert not torch.allclose(loaded, plain, atol=1e-3)
        stack.merge()
        merged = output(modules)
        torch.testing.assert_close(merged, loaded, atol=2e-5, rtol=1e-4)
        assert [name for name, _ in modules["denoiser"].named_parameters()] == [
            name for name, *_ in before["denoiser"][2]
        ]
        assert hash_module(modules["denoiser"]) != before["denoiser"][0]  # so calibrations of the base are not taken
        stack.unmerge()
        assert torch.equal(output(modules), loaded)
        stack.remove()
        assert state_of(modules) == before
        assert torch.equal(output(modules), plain)


def test_a_scale_of_nothing_changes_nothing_and_loras_add_up(modules, folders):
    plain, stack = output(modules), AdapterStack(modules)
    stack.use([AdapterChoice(folder, 0.0) for folder in folders])
    torch.testing.assert_close(output(modules), plain, atol=1e-6, rtol=1e-5)
    weight = dict(modules["denoiser"].named_parameters())["mid_block.feed_forward.layer.input.weight"]
    changes = []
    for choices in ([(0, 1.0)], [(1, -0.5)], [(0, 1.0), (1, -0.5)], [(1, -0.5), (0, 1.0)]):
        stack.remove()
        base = weight.detach().clone()
        stack.use([AdapterChoice(folders[number], scale) for number, scale in choices])
        changes.append(weight.detach() - base)
    if "lora_magnitude_vector" not in "".join(_keys(folders[0])):  # of DoRAs the order counts
        torch.testing.assert_close(changes[0] + changes[1], changes[2], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(changes[2], changes[3], atol=1e-6, rtol=1e-5)


def _keys(folder: str) -> list[str]:
    from safetensors.torch import load_file

    return sorted(load_file(Path(folder) / "denoiser/adapter_model.safetensors"))


def test_peft_loads_the_same_folder(modules, folders):
    stack = AdapterStack(modules)
    stack.load(AdapterChoice(folders[0]))
    expected = output(modules)
    stack.remove()
    by_peft = {name: PeftModel.from_pretrained(module, f"{folders[0]}/{name}") for name, module in modules.items()}
    torch.testing.assert_close(output(by_peft), expected, atol=1e-6, rtol=1e-5)


def test_an_adapter_of_peft_alone_is_a_denoisers(modules, folders):
    stack, lone = AdapterStack(modules), f"{folders[0]}/denoiser"
    with pytest.raises(CheckpointError, match=r"a denoiser that it does not name.*any_base"):
        stack.load(AdapterChoice(lone))
    stack.use([AdapterChoice(lone, any_base=True)])
    assert stack.captions == []
    assert stack.describe()[0]["path"] == lone


def test_other_weights_are_refused_unless_one_insists(modules, folders):
    with torch.no_grad():
        modules["denoiser"].output_layer.conv.weight.add_(1.0)
    plain, before, stack = output(modules), state_of(modules), AdapterStack(modules)
    with pytest.raises(CheckpointError, match=r"was trained on the denoiser .*any_base: true"):
        stack.use([AdapterChoice(folders[0])])
    assert state_of(modules) == before
    stack.use([AdapterChoice(folders[0], any_base=True)])
    assert not torch.allclose(output(modules), plain, atol=1e-3)


def test_one_that_does_not_fit_takes_the_others_with_it(modules, folders, tmp_path):
    before, stack = state_of(modules), AdapterStack(modules)
    other = write_adapters(tmp_path / "other", {"denoiser": torch.nn.ModuleDict({"to_q": torch.nn.Linear(7, 7)})})
    stack.use([AdapterChoice(folders[0])])
    with pytest.raises(CheckpointError, match="does not fit DiffusionTransformer"):
        stack.use([AdapterChoice(folders[1]), AdapterChoice(other, any_base=True)])
    assert state_of(modules) == before
    with pytest.raises(CheckpointError, match="adapts text, which this system has none of"):
        AdapterStack({"denoiser": modules["denoiser"]}).load(AdapterChoice(folders[0]))


def test_what_was_altered_is_refused(modules, tmp_path):
    folder = Path(write_adapters(tmp_path / "adapter", modules))
    stack = AdapterStack(modules)
    info = json.loads((folder / "adapter.json").read_text())
    assert (info["captions"], info["steps"], sorted(info["base"])) == (["a zorble"], 3, ["denoiser", "text"])
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 1e6
    weights = folder / "text/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"text/adapter_model.safetensors is missing, or not the file"):
        stack.load(AdapterChoice(str(folder)))
    weights.write_bytes(content)
    (folder / "adapter.json").write_text(json.dumps({**info, "base": {"codec": "0"}, "files_sha256": {}}))
    with pytest.raises(CheckpointError, match="adapts codec"):
        stack.load(AdapterChoice(str(folder)))
    config = json.loads((folder / "denoiser/adapter_config.json").read_text())
    (folder / "denoiser/adapter_config.json").write_text(json.dumps({**config, "peft_type": "BOFT"}))
    with pytest.raises(CheckpointError, match="another kind than LoRA"):
        stack.load(AdapterChoice(str(folder / "denoiser"), any_base=True))
    with pytest.raises(CheckpointError, match=r"neither adapter.json nor adapter_config.json"):
        stack.load(AdapterChoice(str(tmp_path)))


@pytest.mark.parametrize("entry", [{"scale": 1}, {"path": "x", "weight": 1}, 7, {"path": "x", "scale": "loud"}])
def test_entries_that_are_none_are_refused_by_place(entry):
    with pytest.raises(ValueError, match=r"adapters\[1\]"):
        adapter_choices(["zorble", entry])
    with pytest.raises(ValueError, match="give a list"):
        adapter_choices({"path": "x"})
