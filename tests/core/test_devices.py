"""Devices by name. There is no Apple GPU here: what PyTorch says of one is mocked, and a device without float64."""

import logging
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foley.core import devices
from foley.core.devices import MPS_FALLBACK, machine_name, processor_name, resolve_device, synchronise
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import SOLVERS, Solver
from foley.generation.result import Timings
from foley.metrics.latency import measure_latency
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola


class Machine:
    """Says what a machine with these GPUs would say."""

    def __init__(self, monkeypatch, cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        self.waits = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.waits.append("cuda"))
        monkeypatch.setattr(torch.mps, "synchronize", lambda: self.waits.append("mps"))


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (2, True, "cuda")]
)
def test_auto_is_the_gpu_that_there_is(monkeypatch, cuda, mps, device):
    Machine(monkeypatch, cuda, mps)
    assert resolve_device("auto") == torch.device(device)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "cuda:1"])
def test_an_absent_device_is_refused_with_what_there_is(monkeypatch, name):
    Machine(monkeypatch, cuda=int(name == "cuda:1"))
    there = "cuda" if name == "cuda:1" else "cpu"
    with pytest.raises(ValueError, match=f"device={name}: there is none here; device=auto takes {there}"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "null", None])
def test_an_unknown_name_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=f"device={name}: give auto, cpu, cuda"):
        resolve_device(name)


def test_what_mps_lacks_falls_back_or_is_warned_of(monkeypatch, caplog):
    Machine(monkeypatch, mps=True)
    monkeypatch.setenv(MPS_FALLBACK, "1")
    resolve_device("auto")
    assert not caplog.records
    monkeypatch.delenv(MPS_FALLBACK)
    with caplog.at_level(logging.WARNING):
        resolve_device("mps")
    assert f"set the variable {MPS_FALLBACK}=1" in caplog.text


@pytest.mark.parametrize(("first", "value"), [("foley", "1"), ("torch", "None")])
def test_the_fallback_is_asked_for_while_it_can_be(first, value):
    code = f"import {first}, foley, os; print(os.environ.get({MPS_FALLBACK!r}))"
    environment = {name: text for name, text in devices.os.environ.items() if name != MPS_FALLBACK}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == value


@pytest.mark.parametrize(("cuda", "mps", "kind"), [(1, False, "cuda"), (0, True, "mps")])
def test_clocks_are_read_when_the_gpu_is_done(monkeypatch, cuda, mps, kind):
    machine = Machine(monkeypatch, cuda, mps)
    synchronise(torch.device(kind))
    with Timings().measured("denoise_seconds", torch.device(kind)):
        pass
    measure_latency(lambda: None, repeats=1, warmup=0)
    assert machine.waits == [kind] * 4
    synchronise(torch.device("cpu"))
    assert len(machine.waits) == 4


class NoFloat64(TorchDispatchMode):
    """Stands for MPS on "meta", whose tensors have shapes and types: a double there is an error, as it is on MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            assert result.dtype != torch.float64, f"{func} makes float64 on a device that has none"
        return result


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_training_takes_no_float64_to_the_device(prediction):
    process, clean = DiffusionProcess(prediction), torch.zeros(3, 4, 8, device="meta")
    with NoFloat64():
        timestep = torch.tensor([1, 500, 999]).to("meta")
        process.add_noise(clean, clean, timestep)
        process.target(clean, clean, timestep)
        process.min_snr_weight(timestep)
        process.to_clean(clean, clean, timestep)


@pytest.mark.parametrize("solver", SOLVERS)
def test_generation_takes_no_float64_to_the_device(solver):
    process = DiffusionProcess("flow" if "flow" in solver else "v")
    denoiser = DiffusionTransformer(4, 16, 2, 2, 8, AdaLNSola(rank=2, alpha=2)).eval().to("meta")
    text = Conditioning(torch.zeros(1, 3, 8, device="meta"), torch.ones(1, 3, dtype=torch.bool, device="meta"))
    with NoFloat64():
        latent = generate_latents(
            denoiser,
            process,
            positive=text,
            negative=text,
            seeds=[0],
            num_frames=20,
            guidance=ClassifierFreeGuidance(3.0),
            solver=Solver(solver, 3),
            device="meta",
        )
    assert latent.shape == (1, 4, 20)
    assert latent.dtype == torch.float32


def test_a_machine_is_named_by_what_computes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H200 at {device}")
    assert machine_name(torch.device("cuda:1")) == "NVIDIA H200 at cuda:1"
    assert machine_name(torch.device("mps")) == f"{processor_name()}, MPS"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert machine_name(torch.device("cpu")) == f"{processor_name()}, 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert machine_name(torch.device("cpu")).endswith(", 4 threads")
