"""All that does not depend on the noisy latent, and how a generation computes it once for all its evaluations.

Time and text reach a block through its modulation and through the keys and values of its cross-attention. A sampler
knows its timesteps beforehand, and the text never changes: `Hoistable.prepare` computes both before the first step,
`RunConditions.at` hands them out, and the blocks are left with what the latent decides. Training does none of this.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foley.nn.adaln import BlockModulation, Modulation
from foley.nn.attention import KeysValues
from foley.nn.rotary import RotaryTable


@dataclass(frozen=True)
class BlockInputs:
    """What a block hears besides the stream `[B, N, D]`.

    Plain, all blocks of an evaluation share one: `time [B, D]` and `shared_modulation [B, 6 D]` come from the diffusion
    time, `context [B, S, D]` is the projected text. Hoisted, each block has its own: `modulation` in the place of the
    first two, and `context` is the keys and values that the block made of the text.

    Masks are those of `foley.nn.attention.key_mask`, `[B, 1, 1, N]` and `[B, 1, 1, S]`.
    """

    time: Tensor | None = None
    shared_modulation: Tensor | None = None
    modulation: BlockModulation | None = None
    rotary: RotaryTable | None = None
    frame_mask: Tensor | None = None
    context: Tensor | KeysValues | None = None
    context_mask: Tensor | None = None


@dataclass(frozen=True)
class Conditions:
    """Of one evaluation: all that does not depend on the noisy latent.

    `static_input`, `[B, L, D]` or broadcastable to it, is what visible latent, mask and positions add to the tokens;
    `time [B, D]` the embedded time; `blocks` the inputs of each block; `output_modulation` that of the last layer.
    """

    static_input: Tensor
    time: Tensor
    blocks: Sequence[BlockInputs]
    output_modulation: Modulation | None


class RunConditions:
    """The conditions of a generation, computed once for all its evaluations.

    Args:
        timesteps: `[E]`, those of the evaluations.
        conditions: hoisted; in all that depends on the time, with R rows for each timestep in turn, where R is 1, or B
            for a guidance scale per item: `[E R, ...]`.
    """

    def __init__(self, timesteps: Tensor, conditions: Conditions) -> None:
        self._timesteps = timesteps
        self._time = conditions.time
        self._rows = torch.arange(len(self._time) // len(timesteps), device=timesteps.device)  # 0 to R - 1
        modulations = [*(block.modulation for block in conditions.blocks), conditions.output_modulation]
        parts = [part for modulation in modulations for part in _parts(modulation)]  # each [E R, 1, D]
        # One table [E R, parts, 1, D] of all blocks' modulations: a step takes its rows in one gather, not in 150.
        self._table = torch.stack(parts, dim=1) if parts else None
        # Views of the table's first rows: each modulation is kept once.
        self._layout = _fill(conditions, None if self._table is None else self._table[: len(self._rows)])

    def at(self, timestep: Tensor) -> Conditions:
        """The conditions of the evaluation at `timestep [B]`: one of the run's timesteps, the same for all items.

        Raises ValueError for another timestep, on the CPU; elsewhere the check would wait for all work queued.
        """
        # By value and on the device: to look a number up on the host would wait too.
        found = self._timesteps == timestep[0]  # [E]
        # A fake tensor, with which costs are counted, has no value, and no graph may depend on one.
        readable = found.device.type == "cpu" and type(found) is Tensor and not torch.compiler.is_compiling()
        if readable and not (bool(found.any()) and bool((timestep == timestep[0]).all())):
            raise ValueError(f"timestep {timestep.tolist()} is not one of the {len(found)} that were prepared for")
        rows = found.to(torch.uint8).argmax(dim=0, keepdim=True) * len(self._rows) + self._rows  # [R]
        filled = _fill(self._layout, None if self._table is None else self._table[rows])
        return replace(filled, time=self._time[rows])  # [R, D]


class HoistableBlock(Protocol):
    """A block that can compute beforehand what it makes of time and text."""

    def hoist(self, inputs: BlockInputs) -> BlockInputs: ...


class Hoistable(nn.Module):
    """What a denoiser gains from `condition` and blocks that `hoist`: `prepare`."""

    def blocks(self) -> Sequence[HoistableBlock]:
        """All blocks, in order of execution."""
        raise NotImplementedError

    def condition(self, *args: Any, **kwargs: Any) -> Conditions:
        """The conditions of one evaluation: of its timesteps, number of frames, and the further inputs of `forward`."""
        raise NotImplementedError

    def prepare(
        self,
        timesteps: Tensor,
        num_frames: int,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        visible: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        guidance_scale: Tensor | None = None,
        **more: Tensor | None,
    ) -> RunConditions:
        """Everything that the evaluations at `timesteps [E]` of one generation share, for `forward(..., run=...)`.

        All modulations, the context's keys and values, rotary tables and the visible latent's share of the tokens are
        computed here, once. The other arguments are those of `forward`. ValueError for a `frame_mask` where the model
        embeds the length of its clips: all clips of a generation are as long as the latent.
        """
        if frame_mask is not None and getattr(self, "length_embedding", None) is not None:
            raise ValueError("frame_mask: a model with length_embedding prepares for clips of `num_frames` alone")
        # Row e R + r is timestep e with scale r: each timestep R times, the scales over and over.
        num_scales = 1 if guidance_scale is None else len(guidance_scale)  # R
        scales = None if guidance_scale is None else guidance_scale.repeat(len(timesteps))
        times = timesteps.repeat_interleave(num_scales)  # [E R]
        inputs = context, context_mask, frame_mask, visible, hidden_mask, scales
        plain = self.condition(times, num_frames, *inputs, **more)
        # Modulations of every timestep, and keys and values of the text, which are the same at all of them.
        hoisted = [block.hoist(inputs) for block, inputs in zip(self.blocks(), plain.blocks, strict=True)]
        return RunConditions(timesteps, replace(plain, blocks=hoisted))


def _fill(conditions: Conditions, table: Tensor | None) -> Conditions:
    """`conditions` with the modulations of `table [R, parts, 1, D]`, of which they are views."""
    parts = iter(() if table is None else table.unbind(dim=1))  # each [R, 1, D]
    blocks = [replace(block, modulation=_take_block(block.modulation, parts)) for block in conditions.blocks]
    return replace(conditions, blocks=blocks, output_modulation=_take(conditions.output_modulation, parts))


def _parts(modulation: BlockModulation | Modulation | None) -> list[Tensor]:
    """All tensors of a modulation, in the order in which `_take` and `_take_block` put them back."""
    if isinstance(modulation, BlockModulation):
        return _parts(modulation.self_attention) + _parts(modulation.feed_forward)
    return [] if modulation is None else [modulation.shift, modulation.factor, modulation.gate]


def _take_block(like: BlockModulation | None, parts: Iterator[Tensor]) -> BlockModulation | None:
    if like is None:
        return None
    return BlockModulation(_take(like.self_attention, parts), _take(like.feed_forward, parts))


def _take(like: Modulation | None, parts: Iterator[Tensor]) -> Modulation | None:
    return None if like is None else Modulation(next(parts), next(parts), next(parts))
