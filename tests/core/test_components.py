"""Components on disk: what is refused before anything is built."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from foley.core.components import (
    MOVED_MODULES,
    WEIGHTS_FILE,
    CheckpointError,
    build_component,
    check_targets,
    current_config,
    describe_pickle,
    filled,
    load_component,
    read_config,
    read_pickle,
    save_component,
)
from foley.core.config import PROJECT_ROOT
from foley.core.files import DiskFullError, atomic_write
from foley.system.sharing import count_parameters

STRANGERS = [
    "os.system",
    "foley.core.components.write_json",
    "foley.core.components.Path",
    "foley.core.components.os.system",
    "foley.models.text.base.get_logger",
    "foley.models.codec.normaliser.nn.Module",
    "foley.models.absent.Module",
]


@pytest.mark.parametrize("target", STRANGERS)
def test_only_component_classes_are_built(target: str) -> None:
    with pytest.raises(CheckpointError, match="refusing to build"):
        check_targets({"nested": [{"_target_": target}]}, "a stranger's config")


def test_interpolations_are_refused() -> None:
    config = {"_target_": "foley.models.codec.normaliser.LatentNormaliser", "channels": "${oc.env:HOME}"}
    with pytest.raises(CheckpointError, match="interpolation"):
        build_component(config)


def test_a_component_is_built() -> None:
    module = build_component({"_target_": "foley.models.codec.normaliser.LatentNormaliser", "channels": 3})
    assert module.mean.shape == (3,)


def test_a_byte_a_weight_is_half_a_step_of_its_row_off(tmp_path: Path) -> None:
    config = {"_target_": "foley.nn.feedforward.GegluFeedForward", "width": 8, "hidden": 12}
    module = build_component(config)
    with torch.no_grad():
        module.output.weight[0] = 0
        module.output.weight[1] *= 1e-6  # rows of any size are as exact
    save_component(module, config, tmp_path, torch.int8)
    loaded = load_component(tmp_path)
    for name, tensor in module.state_dict().items():
        off = (loaded.state_dict()[name] - tensor).abs()
        if tensor.ndim > 1:
            assert (off <= tensor.abs().amax(1, keepdim=True) / 127 * 0.501).all()
        else:
            torch.testing.assert_close(off, torch.zeros_like(off), atol=1e-3, rtol=0)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert stored["output.weight"].dtype == torch.int8
    assert count_parameters(tmp_path / WEIGHTS_FILE) == sum(tensor.numel() for tensor in module.state_dict().values())


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        atomic_write(file, fail)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left on device"), SafetensorError("Io(Os { code: 28, message: No space left on device })")],
)
def test_a_full_disk_is_said_with_the_folder_and_what_is_free(tmp_path: Path, failure: Exception) -> None:
    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise failure

    with pytest.raises(
        DiskFullError, match=rf"No space left on the disk of {tmp_path} for weights: [\d,.]+ MB are free"
    ):
        atomic_write(tmp_path / "weights", fail)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_component_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(PROJECT_ROOT / "data")
    monkeypatch.chdir(tmp_path)
    assert Path(read_config(Path("data/demo/text"))["tokenizer_file"]) == tmp_path / "data/demo/text/audiocaps.json"


def test_configs_of_older_weights_name_classes_where_they_are_now() -> None:
    # What ships was saved by version 0.1.
    saved = json.loads((PROJECT_ROOT / "data/demo/denoiser/config.json").read_text(encoding="utf-8"))
    assert saved["_target_"] == "foley.models.dit.backbone.DiffusionTransformer"
    current = current_config({"components": {"denoiser": saved, "rates": [1, 2]}})
    assert current["components"]["denoiser"]["_target_"] == "foley.models.dit.model.DiffusionTransformer"
    assert current["components"]["denoiser"]["modulation"] == saved["modulation"]
    assert current["components"]["rates"] == [1, 2]


@pytest.mark.parametrize(("old", "new"), MOVED_MODULES.items())
def test_every_moved_module_is_where_it_is_said_to_be(old: str, new: str) -> None:
    assert importlib.util.find_spec(new) is not None, f"{old} has moved on from {new}"


def test_of_a_checkpoint_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    state = {"turned": weight.T, "part": weight[1:3], "half": torch.ones(2).bfloat16(), "none": torch.empty(0, 2)}
    torch.save({"state_dict": state, "optimizer_states": [{"step": torch.tensor(7.0)}], "epoch": 3}, tmp_path / "run")
    described = describe_pickle(tmp_path / "run")
    assert described["epoch"] == 3
    assert [described["state_dict"][name].shape for name in state] == [value.shape for value in state.values()]
    read = filled(described["state_dict"], tmp_path / "run")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in state.items())
    read["turned"][0, 1] = 5
    assert read["part"][0, 0] == 5  # what shared memory goes on sharing it
    assert filled({"own": weight}, tmp_path / "run")["own"] is weight
    assert filled(described["optimizer_states"], tmp_path / "run") == [{"step": torch.tensor(7.0)}]


def test_a_checkpoint_that_becomes_shorter_is_an_error_and_no_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "run"
    torch.save({"weight": torch.randn(1000)}, path)
    described = describe_pickle(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="run ends early"):
        filled(described, path)


def test_a_file_of_the_old_format_is_read_whole(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert torch.equal(describe_pickle(tmp_path / "old")["weight"], torch.ones(3))
    assert torch.equal(read_pickle(tmp_path / "old")["weight"], torch.ones(3))
