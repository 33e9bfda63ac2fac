"""A local window and random global keys: LiteFocus adapted to latents without a frequency axis."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foley.accel.attention.litefocus import compensation_indices
from foley.accel.attention.seeded import SeededAccelerator
from foley.accel.layers import find_cacheable_layers
from foley.core.numbers import SHARE, NumberRange
from foley.nn.attention import Attention, dense_core

_SMALLEST_BLOCK = 64  # queries: at least so many share one gathering of keys


def local_global_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, global_indices: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Query i attends to each key j with `|i - j| <= window` and to the global ones, each once, in one softmax.

    Queries are taken in blocks, each with the keys around it and the global ones: O(N (window + M)) scores.

    Args:
        q, k, v: `[B, H, N, D]`, positions applied.
        window: tokens on each side; from N - 1 on, this is dense attention.
        global_indices: `[M]`, all different.
        mask: of the keys, `[B, 1, 1, N]`, true = attend, or None. A query attends to itself whatever the mask says.

    Raises:
        ValueError: the window is negative, or the mask differs between heads or queries.

    Example:
        With every key a global one it is dense attention, since each counts once.

        >>> q, k, v = torch.randn(3, 1, 2, 12, 8)
        >>> attended = local_global_attention(q, k, v, window=2, global_indices=torch.arange(12))
        >>> torch.allclose(attended, F.scaled_dot_product_attention(q, k, v), atol=1e-5)
        True
    """
    batch, _, length, _ = q.shape
    if window < 0:
        raise ValueError(f"window is the number of tokens on each side, 0 or more, got {window}")
    if window >= length - 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # every window holds every key
    if mask is not None and mask.shape[1:3] != (1, 1):
        raise ValueError(f"the mask must be one of the keys, [B, 1, 1, N], got {tuple(mask.shape)}")
    indices = global_indices.to(q.device)  # [M]
    # A larger block copies the global keys less often; a smaller one computes fewer scores beyond the window.
    block = max(window, len(indices) // 2, _SMALLEST_BLOCK)
    num_blocks = -(-length // block)  # rounded up
    # Blocks take the place of items: keys [B blocks, H, block + 2 window + M, D].
    keys, values = (
        torch.cat([_blocks(x, block, window), x.index_select(2, indices).repeat_interleave(num_blocks, 0)], dim=2)
        for x in (k, v)
    )
    # [1 or B, 1, N, 1]: along the frames, as `_blocks` cuts them.
    valid = q.new_ones(1, 1, length, 1, dtype=torch.bool) if mask is None else mask.mT
    allowed = _allowed(valid.expand(batch, -1, -1, -1), window, block, indices)
    # Queries [B blocks, H, block, D]; what the last block has too much is cut away.
    attended = F.scaled_dot_product_attention(_blocks(q, block, 0), keys, values, attn_mask=allowed)
    # Blocks back in their places: [B, blocks, H, block, D] to [B, H, blocks * block, D].
    return attended.unflatten(0, (batch, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _blocks(x: Tensor, block: int, margin: int) -> Tensor:
    """`[B, H, N, D]` to `[B blocks, H, block + 2 margin, D]`: neighbouring blocks overlap by their margins.

    Beyond both ends there are zeros.
    """
    padded = F.pad(x, (0, 0, margin, margin + -x.shape[2] % block))  # -N % block fills up the last block
    # [B, H, blocks, D, size] to [B, blocks, H, size, D].
    return padded.unfold(2, block + 2 * margin, block).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _allowed(valid: Tensor, window: int, block: int, indices: Tensor) -> Tensor:
    """The mask `[B blocks, 1, block, block + 2 window + M]`, from the validity of the keys `[B, 1, N, 1]`."""
    length = valid.shape[2]
    position = torch.arange(length + -length % block, device=valid.device)  # of the queries, [blocks * block]
    # Key minus query, [block, block + 2 window]: the same in each block.
    distance = torch.arange(-window, block + window, device=valid.device) - position[:block, None]
    # Each query may attend to itself, so that a padded one, which is cut away or ignored, is not a softmax of nothing.
    local = (distance.abs() <= window) & _blocks(valid, block, window).mT | (distance == 0)
    # A global key within the window is counted there; [blocks * block, M].
    beyond_window = (indices - position[:, None]).abs() > window
    # [B, 1, 1, M] and [blocks, 1, 1, block, M] to [blocks, B, 1, block, M].
    distant = valid[:, :, indices].mT & beyond_window.unflatten(0, (-1, 1, block)).unsqueeze(1)
    return torch.cat([local, distant.transpose(0, 1).flatten(0, 1)], dim=-1)


class LocalGlobal(SeededAccelerator):
    """Local windows and random global frames in the self-attention of a transformer over waveform latents.

    An adaptation of LiteFocus, not published: such latents have no frequency axis, and with one frequency its own
    rule is full attention. A time token before the frames stays visible to all.

    Args:
        window_frames: attended to on each side; a latent that is not longer is computed densely.
        ratio: the share of all frames that every query attends to, drawn anew for each layer and evaluation.
        seed: of the global frames.

    Example:
        >>> from foley.accel import LocalGlobal
        >>> from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
        >>> from foley.diffusion.process import DiffusionProcess
        >>> from foley.diffusion.sampler import generate_latents
        >>> from foley.diffusion.solver import Solver
        >>> from foley.models.dit.model import DiffusionTransformer
        >>> from foley.nn.adaln import AdaLNSola
        >>> denoiser = DiffusionTransformer(4, 16, 2, 2, 8, AdaLNSola(rank=2, alpha=2)).eval()
        >>> text = Conditioning(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
        >>> guidance, solver = ClassifierFreeGuidance(3.0), Solver("ddim", 4)
        >>> process, sparse = DiffusionProcess("v"), LocalGlobal(window_frames=8, ratio=0.1)
        >>> latent = generate_latents(denoiser, process, text, text, [0], 100, guidance, solver, accelerator=sparse)
        >>> latent.shape
        torch.Size([1, 4, 100])
    """

    def __init__(self, window_frames: int, ratio: float = 0.1, seed: int = 0) -> None:
        super().__init__(seed)
        NumberRange(least=0, whole=True).check("window_frames", window_frames)
        SHARE.check("ratio", ratio)
        self._window_frames = window_frames
        self._ratio = ratio

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Replace the cores of the denoiser's self-attention layers inside the context, and restore them on any exit.

        Raises:
            ValueError: the denoiser has no self-attention layer with a swappable core.
            RuntimeError: a core is replaced already.
        """
        layers = _self_attention_layers(denoiser)
        taken = [name for name, attention in layers.items() if attention.core is not dense_core]
        if taken:
            raise RuntimeError(
                f"the attention core of {taken[0]!r} ({len(taken)} of {len(layers)} layers) is replaced already: "
                "leave that accelerator's `attach` context first"
            )
        num_leading = int(getattr(denoiser, "prepends_time_token", False))  # the time token, if any
        # One for each layer, whose global frames are its own.
        cores = {name: _WindowCore(self._window_frames) for name in layers}
        with ExitStack() as stack:
            for name, attention in layers.items():
                stack.callback(setattr, attention, "core", attention.core)
                attention.core = cores[name]
            choose = partial(self._choose_global_frames, cores, num_leading)
            stack.callback(denoiser.register_forward_pre_hook(choose, with_kwargs=True).remove)
            yield

    def _choose_global_frames(
        self,
        cores: Mapping[str, "_WindowCore"],
        num_leading: int,
        denoiser: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        noisy: Tensor = args[0] if args else kwargs["noisy"]
        size = (noisy.shape[-1], self._ratio, num_leading)
        for name, core in cores.items():
            core.global_indices = self.drawn(name, _visible_to_all, *size, device=noisy.device)


def _visible_to_all(num_frames: int, ratio: float, num_leading: int, generator: torch.Generator) -> Tensor:
    """The leading tokens, and the drawn ones among the frames after them."""
    frames = compensation_indices(num_frames, ratio, generator)  # [floor(ratio L)]
    return torch.cat([torch.arange(num_leading), frames + num_leading])  # [num_leading + floor(ratio L)], as tokens


class _WindowCore:
    """The attention core of one layer. It draws nothing itself, so that compiled blocks of all layers are one graph."""

    def __init__(self, window_frames: int) -> None:
        self.window_frames = window_frames
        self.global_indices = torch.empty(0, dtype=torch.long)  # [M], set before each evaluation

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        valid = None if mask is None else mask == 0  # the others are minus infinity
        return local_global_attention(q, k, v, self.window_frames, self.global_indices, valid)


def _self_attention_layers(denoiser: nn.Module) -> dict[str, Attention]:
    """By dotted name."""
    layers = {
        name: module
        for layer in find_cacheable_layers(denoiser)
        if layer.kind == "self_attention"
        for name, module in layer.module.named_modules(prefix=layer.name)
        if isinstance(module, Attention)
    }
    if not layers:
        raise ValueError(
            f"{type(denoiser).__name__} has no self-attention layer whose core can be replaced: accel=local_global is "
            "for this project's transformers; for AudioLDM2 take accel=litefocus"
        )
    return layers
