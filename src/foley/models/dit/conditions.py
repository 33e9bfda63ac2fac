"""What a denoiser makes of all but the noisy latent: for one evaluation, or hoisted out of a whole generation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foley.models.dit.block import BlockInputs, HoistedBlock
from foley.nn.adaln import BlockModulation, Modulation


@dataclass(frozen=True)
class Conditions:
    """Of one evaluation.

    `static_input`, `[B, L, D]` or broadcastable to it, is what visible latent, mask and positions add to the tokens;
    `output_modulation` is that of the last layer. Where `hoisted` is not empty, it has one entry per block, and the
    blocks compute nothing from time and context.
    """

    static_input: Tensor
    block_inputs: BlockInputs
    output_modulation: Modulation | None
    hoisted: Sequence[HoistedBlock] = ()


class RunConditions:
    """The conditions of a generation, computed once for all its evaluations.

    Args:
        timesteps: `[E]`, those of the evaluations.
        conditions: in all that depends on the time, with one row, or one row per item, for each timestep in turn.
    """

    def __init__(self, timesteps: Tensor, conditions: Conditions) -> None:
        self._timesteps = timesteps
        self._time = conditions.block_inputs.time
        self._rows = torch.arange(len(self._time) // len(timesteps), device=timesteps.device)
        modulations = [_parts(block.modulation) for block in conditions.hoisted]
        parts = [part for modulation in (*modulations, _parts(conditions.output_modulation)) for part in modulation]
        self._table = torch.stack(parts, dim=1) if parts else None
        # Views of the table's first rows: each modulation is kept once.
        self._layout = _fill(conditions, None if self._table is None else self._table[: len(self._rows)])

    def at(self, timestep: Tensor) -> Conditions:
        """The conditions of the evaluation at `timestep [B]`: one of the run's timesteps, the same for all items.

        Raises ValueError for another timestep, on the CPU; elsewhere the check would wait for all work queued.
        """
        # By value and on the device: to look a number up on the host would wait too.
        found = self._timesteps == timestep[0]
        # A fake tensor, with which costs are counted, has no value.
        readable = found.device.type == "cpu" and type(found) is Tensor
        if readable and not (bool(found.any()) and bool((timestep == timestep[0]).all())):
            raise ValueError(f"timestep {timestep.tolist()} is not one of the {len(found)} that were prepared for")
        rows = found.to(torch.uint8).argmax(dim=0, keepdim=True) * len(self._rows) + self._rows
        filled = _fill(self._layout, None if self._table is None else self._table[rows])
        return replace(filled, block_inputs=replace(filled.block_inputs, time=self._time[rows]))


def _fill(layout: Conditions, table: Tensor | None) -> Conditions:
    """`layout` with the modulations of `table [rows, parts, 1, D]`, of which they are views."""
    parts = iter(() if table is None else table.unbind(dim=1))
    hoisted = [HoistedBlock(_take_block(block.modulation, parts), block.keys_values) for block in layout.hoisted]
    return replace(layout, output_modulation=_take(layout.output_modulation, parts), hoisted=hoisted)


def _parts(modulation: BlockModulation | Modulation | None) -> list[Tensor]:
    """All tensors of a modulation, in the order in which `_take` and `_take_block` put them back."""
    if isinstance(modulation, BlockModulation):
        return _parts(modulation.self_attention) + _parts(modulation.feed_forward)
    return [] if modulation is None else [modulation.shift, modulation.factor, modulation.gate]


def _take_block(like: BlockModulation, parts: Iterator[Tensor]) -> BlockModulation:
    return BlockModulation(_take(like.self_attention, parts), _take(like.feed_forward, parts))


def _take(like: Modulation | None, parts: Iterator[Tensor]) -> Modulation | None:
    return None if like is None else Modulation(next(parts), next(parts), next(parts))
