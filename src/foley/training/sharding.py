"""Sharded training (FSDP2): each process holds a part of every weight, of its moments and of its average.

A block is gathered while it computes, forwards and backwards, and let go; gradients come back as parts, averaged over
the processes. Optimizers, clipping and averages work on the parts. Checkpoints are those of any trainer: whole tensors
in one file, which a run on another number of processes, or on one, goes on from.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from foley.models.dit.hoisting import Hoistable


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes of all nodes; modules call `shard` in `configure_model`.

    Args:
        options: as of the parent, such as `process_group_backend` or `timeout`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # the parent's "auto" shards among nodes alone
        super().setup_environment()

    def shard(self, module: nn.Module) -> None:
        """Let each process hold its part of `module`; blocks are gathered in bfloat16 where training computes in it."""
        half = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        shard(module, self.device_mesh["data_parallel"], half)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: `load_optimizer_state_dict` below takes what any trainer has saved."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All that checkpoints keep of the module, whole, on the first process; all must ask."""
        module: Any = self.lightning_module
        return dict(whole(module.saved_state(module.state_dict())))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same of an optimizer."""
        return dict(whole(super(ModelParallelStrategy, self).optimizer_state(optimizer)))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read whole, in memory that the processes of a node share."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of every weight."""
        module: Any = self.lightning_module
        own, saved = module.state_dict(), checkpoint["state_dict"]
        state = {name: held_like(own[name], tensor) if name in own else tensor for name, tensor in saved.items()}
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of every moment."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict({**saved, "state": _parts(optimizer, saved["state"])})


def shard(module: nn.Module, mesh: DeviceMesh, block_dtype: torch.dtype | None = None) -> None:
    """Shard `module` over `mesh`, each transformer block by itself; a module that is sharded already is left as it is.

    Args:
        block_dtype: of gathered blocks; None: their own. What is around them, as the last layer, keeps its precision:
            what is rounded there, no later layer makes good. Gradients are summed in float32.
    """
    if isinstance(module, FSDPModule):
        return
    # Let go after every use, the outermost too: what validation gathered would be used after averages are swapped out.
    policy = MixedPrecisionPolicy(param_dtype=block_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    around = MixedPrecisionPolicy(cast_forward_inputs=False)
    blocks = cast(Sequence[nn.Module], module.blocks() if isinstance(module, Hoistable) else ())
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        register_fsdp_forward_method(block, "hoist")
    fully_shard(module, mesh=mesh, mp_policy=around, reshard_after_forward=True)
    if isinstance(module, Hoistable):
        register_fsdp_forward_method(module, "prepare")


def whole(state: Any) -> Any:
    """`state`, of dicts and lists, with whole tensors on the host in the place of parts; all processes must ask.

    None in their place on other processes than the first: one tensor at a time is held twice.
    """
    if isinstance(state, DTensor):
        gathered = state.full_tensor().detach()
        return gathered.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def held_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A `value` that every process has whole, as `parameter` is held: its part of it, on its device, in its type."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter)
    placed = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parts(optimizer: Optimizer, state: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Moments, numbered by their parameters as in any optimizer's state, as these are held."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        number: {
            name: held_like(parameters[number], value) if torch.is_tensor(value) and value.ndim else value
            for name, value in entries.items()
        }
        for number, entries in state.items()
    }
