"""FSDP's precision: weights are gathered in bfloat16, and what says how noisy a latent is stays exact."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

from foley.core.config import CONFIG_DIR
from foley.diffusion.process import DiffusionProcess
from foley.models.codec.normaliser import LatentNormaliser


@pytest.fixture
def policy() -> MixedPrecision:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", ["name=test", "experiment=ezaudio_xl", "trainer=fsdp"])
    policy: MixedPrecision = instantiate(cfg.trainer.strategy, _convert_="all").mixed_precision_config
    return policy


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_levels_in_bfloat16_would_be_pure_noise_long_before_the_end() -> None:
    _, sigma = DiffusionProcess().levels(torch.arange(1000))
    assert int((sigma == 1).sum()) == 1
    assert int((sigma.bfloat16() == 1).sum()) == 111


def test_weights_alone_are_cast(policy: MixedPrecision) -> None:
    assert (policy.param_dtype, policy.reduce_dtype, policy.buffer_dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert not policy.cast_forward_inputs
    assert not policy.cast_root_forward_inputs


class Denoising(nn.Module):
    """A step's way from latent to prediction, noting the types that it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.normaliser, self.linear = LatentNormaliser(4), nn.Linear(4, 4)
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, latent: Tensor) -> Tensor:
        clean = self.normaliser.normalise(latent)
        noisy = DiffusionProcess().add_noise(clean, torch.ones_like(clean), torch.full((2,), 990))
        self.seen = {"latent": latent.dtype, "weight": self.linear.weight.dtype, "noisy": noisy.dtype}
        self.seen["statistics"] = self.normaliser.std.dtype
        with torch.autocast("cpu", torch.bfloat16):
            prediction: Tensor = self.linear(noisy.mT)
        return prediction.float()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of one process there is nothing to shard
def test_a_sharded_step_sees_exact_latents_levels_and_statistics(policy: MixedPrecision, one_process: None) -> None:
    module = Denoising()
    sharded = FullyShardedDataParallel(
        module, mixed_precision=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    sharded(torch.randn(2, 4, 5)).square().mean().backward()
    exact = dict.fromkeys(("latent", "noisy", "statistics"), torch.float32)
    assert module.seen == {**exact, "weight": torch.bfloat16}
    assert {parameter.grad.dtype for parameter in sharded.parameters()} == {torch.float32}
    sharded.clip_grad_norm_(0.5)
    assert torch.nn.utils.get_total_norm([p.grad for p in sharded.parameters()]).item() == pytest.approx(0.5, rel=1e-4)
