"""Graphs of a system: equal to PyTorch, told apart by hash, and run in its place."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_system import CONFIGS, STEPS
from torch import Tensor

from foley.accel.caching.fora import Fora
from foley.accel.caching.prediction import PredictionReuse
from foley.accel.combined import Combined, NoAcceleration
from foley.accel.compiling import leaves_layers_alone
from foley.core.components import CheckpointError
from foley.core.hashing import adopt_hash, hash_module
from foley.core.reading import DamagedFileError
from foley.generation.text_to_audio import TextToAudio
from foley.system.exported import (
    GRAPHS_FILE,
    GRAPHS_FORMAT,
    ExportedDenoiser,
    ExportedSystem,
    check_format,
    export_graphs,
    load_graphs,
)
from foley.system.system import System, build_system, load_system, save_system

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def system() -> System:
    torch.manual_seed(0)
    built = build_system(CONFIGS)
    for parameter in built.modules["denoiser"].parameters():
        if not parameter.any():  # nothing may look equal because it starts at zero
            torch.nn.init.normal_(parameter, std=0.1)
    return built


def _inputs(batch: int, frames: int, tokens: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(batch)
    return {
        "noisy": torch.randn(batch, 4, frames, generator=random),
        "timestep": torch.full((batch,), 321),
        "context": torch.randn(batch, tokens, 16, generator=random),
        "context_mask": torch.arange(tokens).expand(batch, -1) < max(1, tokens - 1),
    }


@torch.no_grad()
def _check_equal(directory: Path, system: System) -> None:
    denoiser, codec, text = (system.modules[name] for name in ("denoiser", "codec", "text"))
    exported = load_graphs(directory, denoiser, codec, CPU)
    for sizes in ((1, 50, 1), (3, 130, 16)):
        inputs = _inputs(*sizes)
        torch.testing.assert_close(exported.denoiser(**inputs), denoiser(**inputs), atol=1e-4, rtol=1e-4)
        known = {"visible": inputs["noisy"] + 1, "hidden_mask": torch.arange(sizes[1]).expand(sizes[0], -1) > 9}
        expected = denoiser(**inputs, **known)
        torch.testing.assert_close(exported.denoiser(**inputs, **known), expected, atol=1e-4, rtol=1e-4)
        latent = inputs["noisy"]
        torch.testing.assert_close(exported.decode(codec, latent), codec.decode(latent), atol=1e-4, rtol=1e-4)
    ids, mask = text.tokenise(["a dog barks twice"])
    torch.testing.assert_close(exported.graphs["text"](ids, mask), text.embed(ids, mask), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it traces three networks
def test_onnx_graphs_are_the_system_at_any_size_and_generate_in_its_place(system: System, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    save_system(system, tmp_path)
    export_graphs(load_system(tmp_path), tmp_path / "onnx", "onnx")
    _check_equal(tmp_path / "onnx", system)
    eager, exported = TextToAudio.load(tmp_path), TextToAudio.load(tmp_path)
    exported.use_backend("onnx", tmp_path)
    expected = eager.generate(["a dog barks", "rain"], **STEPS)
    actual = exported.generate(["a dog barks", "rain"], **STEPS)
    torch.testing.assert_close(actual.audio, expected.audio, atol=1e-3, rtol=1e-3)
    exported.generate(["a dog barks"], accelerator=NoAcceleration(), **STEPS)
    with pytest.raises(ValueError, match="backend=onnx: Fora changes layers"):
        exported.generate(["a dog barks"], accelerator=Fora(2), **STEPS)
    (tmp_path / "onnx" / "denoiser.onnx").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"denoiser\.onnx is missing or was altered"):
        load_graphs(tmp_path / "onnx", system.modules["denoiser"], system.modules["codec"], CPU)


WITHOUT_MODEL_CODE = """
import sys, torch
from torch._inductor import aoti_load_package
denoiser = aoti_load_package(sys.argv[1])
noisy, timestep, context = torch.ones(2, 4, 40), torch.full((2,), 500.0), torch.ones(2, 3, 16)
inputs = noisy, timestep, context, torch.ones(2, 3).bool(), torch.zeros(2, 4, 40), torch.ones(2, 40).bool()
torch.save(denoiser(*inputs), sys.argv[2])
assert not any(name.startswith("foley") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)  # it compiles three networks
def test_aoti_packages_are_the_system_and_run_without_its_code(system: System, tmp_path: Path) -> None:
    export_graphs(system, tmp_path / "aoti", "aoti")
    _check_equal(tmp_path / "aoti", system)
    package, output = tmp_path / "aoti" / "denoiser.pt2", tmp_path / "output.pt"
    subprocess.run([sys.executable, "-c", WITHOUT_MODEL_CODE, package, output], check=True)
    with torch.no_grad():
        inputs = torch.ones(2, 4, 40), torch.full((2,), 500.0), torch.ones(2, 3, 16), torch.ones(2, 3).bool()
        torch.testing.assert_close(torch.load(output), system.modules["denoiser"](*inputs), atol=1e-4, rtol=1e-4)


def test_a_system_without_graphs_names_the_command_that_makes_them(system: System, tmp_path: Path) -> None:
    generator = TextToAudio(system)
    with pytest.raises(CheckpointError, match=r"foley export ckpt=.* format=aoti output_dir=FOLDER"):
        generator.use_backend("aoti", tmp_path)
    with pytest.raises(ValueError, match="one of onnx, aoti, got 'tensorrt'"):
        generator.use_backend("tensorrt", tmp_path)
    (tmp_path / "aoti").mkdir()
    about = {"format": GRAPHS_FORMAT, "backend": "aoti", "device": "cpu", "max_frames": 9}
    about |= {"model_hash": hash_module(generator.denoiser), "codec_hash": hash_module(generator.codec)}
    for changed, message in (
        ({"model_hash": "of another"}, "of another denoiser"),
        ({"codec_hash": "of another"}, "of another codec"),
        ({"format": "foley-graphs/9"}, "of format 'foley-graphs/9', this version reads 'foley-graphs/1'"),
        ({"device": "cuda"}, "compiled for cuda, not for cpu"),
        ({"graphs": {}}, "lacks the entry 'denoiser'; export the system again"),
    ):
        graphs = {"denoiser": {"inputs": {}, "file": "denoiser.pt2", "sha256": ""}}
        (tmp_path / "aoti" / GRAPHS_FILE).write_text(json.dumps({**about, "graphs": graphs, **changed}))
        with pytest.raises((CheckpointError, DamagedFileError), match=message):
            generator.use_backend("aoti", tmp_path)
    generator.inference |= {"compile": True, "cuda_graphs": True}
    with pytest.raises(ValueError, match="graphs as they were exported: leave out compile, cuda_graphs"):
        generator.use_backend("aoti", tmp_path)


def test_onnx_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"wants onnxruntime: pip install 'foley\[export\]'"):
        check_format("onnx")


def test_an_exported_denoiser_hides_everything_by_default_and_knows_its_limit() -> None:
    seen: dict[str, Any] = {}

    def graph(*inputs: Tensor) -> Tensor:
        seen.update(zip(names, inputs, strict=True))
        return inputs[0]

    names = ("noisy", "timestep", "context", "context_mask", "visible", "hidden_mask", "guidance_scale")
    denoiser = ExportedDenoiser(graph, names, latent_channels=4, max_frames=50)
    denoiser(**_inputs(2, 50, 3), guidance_scale=torch.ones(1))
    assert seen["hidden_mask"].all()
    assert seen["hidden_mask"].shape == (2, 50)
    assert not seen["visible"].any()
    assert seen["guidance_scale"].shape == (2,)
    assert seen["timestep"].dtype == torch.float32
    with pytest.raises(ValueError, match="51 frames: this export takes 50 at most"):
        denoiser(**_inputs(2, 51, 3))


def test_what_skips_whole_evaluations_goes_with_a_graph_and_what_changes_layers_does_not() -> None:
    assert leaves_layers_alone(Combined([PredictionReuse(2), NoAcceleration()]))
    assert not leaves_layers_alone(Combined([PredictionReuse(2), Fora(2)]))


@pytest.mark.parametrize("options", [{"interval": 2, "at": "branch"}, {"target_speedup": 2}])
def test_prediction_reuse_runs_on_a_graph_and_calibrates_by_it(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    eager, generator = TextToAudio(system), TextToAudio(system)
    calls, names = [], ("noisy", "timestep", "context", "context_mask")

    def graph(*inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        prediction: Tensor = system.modules["denoiser"](**dict(zip(names, inputs, strict=True)))
        return prediction

    exported = ExportedDenoiser(graph, names, latent_channels=4, max_frames=500)
    adopt_hash(exported, hash_module(system.modules["denoiser"]))
    graphs = ExportedSystem(exported, {"decoder": system.modules["codec"].decode})
    monkeypatch.setattr("foley.generation.backends.load_graphs", lambda *_: graphs)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / GRAPHS_FILE).touch()
    generator.use_backend("onnx", tmp_path)
    reuse = [PredictionReuse(**options, calibration_dir=tmp_path / name, calibrate="auto") for name in "ab"]
    request = {"prompts": ["rain"], "duration_seconds": 0.2, "num_steps": 6}
    expected = eager.generate(**request, accelerator=reuse[0]).audio
    calls.clear()
    torch.testing.assert_close(generator.generate(**request, accelerator=reuse[1]).audio, expected)
    assert sum(reuse[1].computed_evaluations) < 6
    assert calls
    for change in (generator.optimise, lambda: generator.set_decoder_precision("float32")):
        with pytest.raises(ValueError, match="backend=onnx runs graphs as they were exported; load the system anew"):
            change()
