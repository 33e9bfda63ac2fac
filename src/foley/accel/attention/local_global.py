"""A local window and random global keys: LiteFocus adapted to latents without a frequency axis."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foley.accel.attention.litefocus import compensation_indices
from foley.accel.attention.seeded import SeededAccelerator
from foley.accel.attention.sparse import flex_union, takes_flex
from foley.accel.layers import find_cacheable_layers
from foley.core.numbers import SHARE, NumberRange
from foley.nn.attention import Attention, dense_core

_SMALLEST_BLOCK = 64  # queries: at least so many share one copy of the keys


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
    length = q.shape[2]
    if window < 0:
        raise ValueError(f"window is the number of tokens on each side, 0 or more, got {window}")
    if window >= length - 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # every window holds every key
    if mask is not None and mask.shape[1:3] != (1, 1):
        raise ValueError(f"the mask must be one of the keys, [B, 1, 1, N], got {tuple(mask.shape)}")
    indices = global_indices.to(q.device)  # [M]
    if takes_flex(q):
        return flex_attention_of(q, k, v, window, indices, mask)
    shared = k.index_select(2, indices), v.index_select(2, indices)  # each [B, H, M, D]
    attended = []
    # Block by block: what one copies is still in the cache where it is read.
    for start, end, first, last in _spans(length, window):
        keys, values = (torch.cat([x[:, :, first:last], y], dim=2) for x, y in zip((k, v), shared, strict=True))
        allowed = _allowed(torch.arange(start, end, device=q.device), first, last, window, indices, mask)
        attended.append(F.scaled_dot_product_attention(q[:, :, start:end], keys, values, attn_mask=allowed))
    return torch.cat(attended, dim=2)


def _spans(length: int, window: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each block of queries: its start and end, and those of the keys around it.

    A larger block copies the global keys less often; a smaller one computes fewer scores beyond the window.
    """
    block = max(window // 2, _SMALLEST_BLOCK)  # half a window: of 2.5 windows of keys, two are within each query's
    for start in range(0, length, block):
        end = min(start + block, length)
        yield start, end, max(0, start - window), min(end + window, length)


def keys_per_query(length: int, window: int, num_global: int) -> float:
    """How many keys a query is compared with on average, those beyond its window that its block meets included.

    >>> keys_per_query(128, window=10, num_global=6)  # two blocks of 64, each with ten keys of the other
    80.0
    """
    scores = sum((end - start) * (last - first) for start, end, first, last in _spans(length, window))
    return scores / length + num_global


def _allowed(queries: Tensor, first: int, last: int, window: int, indices: Tensor, valid: Tensor | None) -> Tensor:
    """The mask `[1 or B, 1, block, last - first + M]` of the positions `queries [block]`; `valid [B, 1, 1, N]`."""
    local = torch.arange(first, last, device=queries.device)
    near = (local - queries[:, None]).abs() <= window
    # A global key within the window is counted there.
    distant = (indices - queries[:, None]).abs() > window
    if valid is None:
        return torch.cat([near, distant], dim=-1)[None, None]
    # Each query may attend to itself, so that a padded one, which is ignored, is not a softmax of nothing.
    own = local == queries[:, None]
    return torch.cat([near & valid[..., first:last] | own, distant & valid[..., indices]], dim=-1)


def flex_attention_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    indices: Tensor,
    mask: Tensor | None = None,
    attend: Callable[..., Any] | None = None,
) -> Tensor:
    """`local_global_attention` by FlexAttention, or by what stands in its place, `attend`."""
    valid = None if mask is None else mask[:, 0, 0].expand(len(q), -1)
    places, reach = torch.arange(q.shape[2], device=q.device), (1, window)
    return flex_union(q, k, v, indices, places, partial(_within, window), reach, valid, attend=attend)


def _within(window: int, query: Tensor, key: Tensor) -> Tensor:
    return (query - key).abs() <= window


class LocalGlobal(SeededAccelerator):
    """Local windows and random global frames in the self-attention of a transformer over waveform latents.

    An adaptation of LiteFocus, not published: such latents have no frequency axis, and with one frequency its own
    rule is full attention. A time token before the frames stays visible to all.

    Args:
        window_frames: attended to on each side; a latent that is not longer is computed densely.
        ratio: the share of all frames that every query attends to, drawn anew for each layer and evaluation.
        seed: of the global frames.
        fallback: attend densely wherever that is faster by `foley.accel.attention.sparse.pays`; the configs do.

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

    def __init__(self, window_frames: int, ratio: float = 0.1, seed: int = 0, fallback: bool = False) -> None:
        super().__init__(seed, fallback)
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
        length, num_global = noisy.shape[-1] + num_leading, math.floor(self._ratio * noisy.shape[-1]) + num_leading
        keys = keys_per_query(length, self._window_frames, num_global)
        is_sparse = self.chooses_sparse(length, keys, noisy.device)
        for name, core in cores.items():
            # Drawn only where it is looked at.
            drawn = self.drawn(name, _visible_to_all, *size, device=noisy.device) if is_sparse else None
            core.global_indices = drawn


def _visible_to_all(num_frames: int, ratio: float, num_leading: int, generator: torch.Generator) -> Tensor:
    """The leading tokens, and the drawn ones among the frames after them."""
    frames = compensation_indices(num_frames, ratio, generator)  # [floor(ratio L)]
    return torch.cat([torch.arange(num_leading), frames + num_leading])  # [num_leading + floor(ratio L)], as tokens


class _WindowCore:
    """The attention core of one layer. It draws nothing itself, so that compiled blocks of all layers are one graph."""

    def __init__(self, window_frames: int) -> None:
        self.window_frames = window_frames
        self.global_indices: Tensor | None = None  # [M], set before each evaluation; None attends densely

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.global_indices is None:
            return dense_core(q, k, v, mask)
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
