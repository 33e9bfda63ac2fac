"""Sharded training: that of data-parallel training at a part of its memory; noise levels and outputs stay exact."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_parts
import torch
from commands import compose_command
from distillation_parts import distillation, tiny_teacher
from hydra.utils import instantiate
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from training_parts import CHANNELS, FRAMES, build_module

from foley.diffusion.process import DiffusionProcess
from foley.system.checkpoint import load_trained, read_training_checkpoint
from foley.training.base import FoleyModule
from foley.training.callbacks.monitoring import activation_bytes
from foley.training.gradients import clip_gradients, gradient_norm
from foley.training.sharding import ShardedStrategy, held_like, local, shard, whole


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def inputs(size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "noisy": torch.randn(size, CHANNELS, FRAMES, generator=generator),
        "timestep": torch.full((size,), 990),
        "context": torch.randn(size, 3, rank_parts.SHAPE["context_dim"], generator=generator),
    }


def test_levels_in_bfloat16_would_be_pure_noise_long_before_the_end() -> None:
    _, sigma = DiffusionProcess().levels(torch.arange(1000))
    assert int((sigma == 1).sum()) == 1
    assert int((sigma.bfloat16() == 1).sum()) == 111


def test_blocks_alone_are_gathered_in_bfloat16(mesh: DeviceMesh) -> None:
    denoiser = rank_parts.transformer_module().denoiser
    shard(denoiser, mesh, torch.bfloat16)
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name in ("mid_block.feed_forward.layer.input", "output_layer.linear"):
        layer = denoiser.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: seen.update({name: (args[0].dtype, layer.weight.dtype)})
        )
    with torch.autocast("cpu", torch.bfloat16):
        prediction = denoiser(**inputs())
    prediction.square().mean().backward()
    exact = torch.float32, torch.float32
    assert seen["output_layer.linear"] == exact
    assert seen["mid_block.feed_forward.layer.input"][1] == torch.bfloat16
    assert prediction.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in denoiser.parameters()} == {torch.float32}


def test_a_sharded_network_computes_clips_and_samples_as_a_whole_one(mesh: DeviceMesh) -> None:
    plain, sharded = (rank_parts.transformer_module().denoiser for _ in range(2))
    shard(sharded, mesh)
    shard(sharded, mesh)  # once is enough
    optimizers = [torch.optim.SGD(denoiser.parameters()) for denoiser in (plain, sharded)]
    for denoiser in (plain, sharded):
        denoiser(**inputs()).square().mean().backward()
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    norms = [gradient_norm(optimizer) for optimizer in optimizers]
    torch.testing.assert_close(norms[1], norms[0])
    for optimizer in optimizers:
        clip_gradients(optimizer, 1e-3)
    torch.testing.assert_close(gradient_norm(optimizers[1]), torch.tensor(1e-3), rtol=1e-3, atol=0)
    for expected, parameter in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(local(parameter.grad), expected.grad)
    given = inputs()
    with torch.no_grad():
        runs = [denoiser.prepare(given["timestep"][:1], FRAMES, given["context"]) for denoiser in (plain, sharded)]
        expected, prediction = (
            denoiser(given["noisy"], given["timestep"], run=run)
            for denoiser, run in zip((plain, sharded), runs, strict=True)
        )
    torch.testing.assert_close(prediction, expected)


def test_gathered_weights_are_no_activations(mesh: DeviceMesh) -> None:
    plain, sharded = (rank_parts.transformer_module().denoiser for _ in range(2))
    shard(sharded, mesh)
    kept = [activation_bytes(denoiser, lambda one=denoiser: one(**inputs()).sum()) for denoiser in (plain, sharded)]
    assert kept[0] == kept[1] > 0


def test_whole_and_held_like_undo_each_other(mesh: DeviceMesh) -> None:
    linear = nn.Linear(3, 5)
    weight = linear.weight.detach().clone()
    shard(linear, mesh)
    gathered = whole({"state": [linear.weight, 1]})
    assert torch.equal(gathered["state"][0], weight)
    assert gathered["state"][1] == 1
    again = held_like(linear.weight, gathered["state"][0])
    assert isinstance(again, DTensor)
    assert torch.equal(local(again), local(linear.weight))


def test_the_trainer_shards_over_all_processes() -> None:
    cfg = compose_command("train", "name=test", "experiment=ezaudio_xl", "trainer=fsdp")
    strategy = instantiate(cfg.trainer.strategy)
    assert isinstance(strategy, ModelParallelStrategy)
    assert cfg.callbacks.ema is not None
    assert cfg.callbacks.non_finite is not None


def of_sharded_trainer(module: FoleyModule) -> FoleyModule:
    module._trainer = SimpleNamespace(strategy=ShardedStrategy())  # type: ignore[assignment]
    return module


def test_what_cannot_be_sharded_says_so() -> None:
    with pytest.raises(ValueError, match=r"trainer=fsdp shards denoisers.*trainer=ddp"):
        of_sharded_trainer(FoleyModule()).configure_model()
    with pytest.raises(ValueError, match=r"compile=true is not for trainer=fsdp"):
        of_sharded_trainer(build_module(compile=True)).configure_model()
    adapted = distillation(tiny_teacher())
    adapted.denoiser.output_layer.requires_grad_(False)  # as adapters leave all of it
    with pytest.raises(ValueError, match=r"task\.lora with trainer=fsdp"):
        of_sharded_trainer(adapted).configure_model()


# ---------------------------------------------------------------- two processes over gloo, started by torchrun


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs of `rank_parts`, and what each process saw."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, rank_parts.__file__, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def at_end(folder: Path) -> dict[str, Any]:
    return read_training_checkpoint(folder / f"checkpoints/step_{rank_parts.STEPS:06d}.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "ddp"), [("sharded", "ddp"), ("accumulated", "accumulated_ddp"), ("distilled", "distilled_ddp")]
)
def test_losses_are_those_of_ddp(trained, sharded: str, ddp: str) -> None:
    """With clipping, averages, a trained text encoder; accumulated and recomputed; and with a target network."""
    for rank in trained[1]:
        assert rank[sharded]["losses"] == pytest.approx(rank[ddp]["losses"], abs=1e-5)
    assert trained[1][0][ddp]["losses"] != trained[1][1][ddp]["losses"]  # each has its own clips and draws


@pytest.mark.slow
def test_a_process_holds_half(trained) -> None:
    """Of weights, moments and averages; buffers are whole, and parts of uneven size are padded."""
    for rank in trained[1]:
        for sharded, ddp in (("sharded", "ddp"), ("distilled", "distilled_ddp")):
            assert 0.5 <= rank[sharded]["held"] / rank[ddp]["held"] < 0.52


@pytest.mark.slow
def test_a_sharded_run_goes_on_exactly_and_elsewhere(trained) -> None:
    folder, ranks = trained
    for rank in ranks:
        assert rank["resumed"]["losses"] == rank["sharded"]["losses"][rank_parts.HALF :]
        assert rank["resumed_ddp"]["losses"] == pytest.approx(rank["sharded"]["losses"][rank_parts.HALF :], abs=1e-5)
    whole_run, resumed = at_end(folder / "sharded"), at_end(folder / "resumed")
    for key in ("state_dict", "current_weights", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[key], whole_run[key], rtol=0, atol=0)


@pytest.mark.slow
def test_checkpoints_are_those_of_ddp(trained) -> None:
    """So that all that reads a checkpoint reads a sharded run's: export, sample.py, ckpt=."""
    folder, _ = trained
    sharded, ddp = at_end(folder / "sharded"), at_end(folder / "ddp")
    assert sharded.keys() == ddp.keys()
    for key in ("state_dict", "current_weights", "optimizer_states"):
        torch.testing.assert_close(sharded[key], ddp[key], rtol=0, atol=1e-4)
    assert type(load_trained(folder / "sharded/checkpoints/last.ckpt", "denoiser")).__name__ == "DiffusionTransformer"


@pytest.mark.slow
def test_samples_while_it_trains_are_those_of_ddp(trained) -> None:
    import soundfile

    files = {kind: sorted((trained[0] / kind / "samples").rglob("*.wav")) for kind in ("ddp", "sharded")}
    assert [file.name for file in files["sharded"]] == [file.name for file in files["ddp"]]
    assert len(files["ddp"]) == 3
    for ddp, sharded in zip(*files.values(), strict=True):
        left, right = (torch.from_numpy(soundfile.read(file)[0]) for file in (ddp, sharded))
        torch.testing.assert_close(left, right, rtol=0, atol=1e-3)
