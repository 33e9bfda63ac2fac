"""What the sparse attentions share: when they pay, and one FlexAttention for both on CUDA.

Both let a query attend to neighbours and to keys shared by all, each once. FlexAttention skips blocks of scores, so the
shared keys come first, then all keys in an order that keeps neighbours together:

    columns   0 ... M - 1            M ... M + N - 1
              shared keys            all keys
    allowed   not a neighbour        a neighbour

Which blocks hold anything follows from sizes alone, and is known for all layers and evaluations; the drawn keys reach
the kernel as a tensor. So it is compiled once for a length, and no mask is built between evaluations.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

LEAST_SAVING = {"cpu": 1.4, "cuda": 2.0}
"""How many times fewer scores than dense attention there must be for sparse attention to be faster.

Measured by `foley bench attention attention.num_tokens=[] step.durations_seconds=[]`: on a CPU a saving of 1.24 is
slower (x0.87) and one of 1.56 faster (x1.19). That of CUDA is not measured; the command says with `device=cuda
dtype=bfloat16`."""
FLEX_BLOCK = 128  # rows and columns of a block of scores, FlexAttention's own default
_SMALLEST_HEAD = 16  # numbers: below, its kernel has no matrix product
_LEAST_CAPABILITY = (8, 0)  # of its Triton kernels: Ampere

Neighbours = Callable[[Tensor, Tensor], Tensor]
"""Whether key at place `k` is a neighbour of the query in row `q`."""


def pays(num_keys: int, keys_per_query: float, device: torch.device) -> bool:
    """Whether attention to `keys_per_query` of `num_keys` is faster than to all of them.

    >>> pays(250, 230.0, torch.device("cpu")), pays(2000, 520.0, torch.device("cpu"))
    (False, True)
    """
    return num_keys >= LEAST_SAVING.get(device.type, LEAST_SAVING["cuda"]) * keys_per_query


def takes_flex(query: Tensor) -> bool:
    """Whether FlexAttention has a kernel for queries `[B, H, N, head_dim]` of this device and size."""
    if query.device.type != "cuda" or query.shape[-1] < _SMALLEST_HEAD:
        return False
    return torch.cuda.get_device_capability(query.device) >= _LEAST_CAPABILITY


def flex_union(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared: Tensor,
    places: Tensor,
    neighbours: Neighbours,
    reach: tuple[int, int],
    valid: Tensor | None = None,
    double_count: bool = False,
    attend: Callable[..., Any] | None = None,
) -> Tensor:
    """Softmax attention to neighbours and shared keys, `[B, H, N, D]` to `[B, H, N, D]`.

    Args:
        shared: rows of k and v that all queries attend to, `[M]`.
        places: where each of the N keys is, `[N]`, as `neighbours` reads it.
        reach: a query in row i has neighbours in rows `i // group * group - margin` to `... + group + margin` alone,
            of `(group, margin)`.
        valid: `[B, N]`, keys that count; a query's own row always does. None is all.
        double_count: a shared neighbour counts twice.
        attend: `flex_attention`, or by default its compiled form.
    """
    count, device = len(shared), q.device
    places = torch.cat([places[shared], places])  # [M + N]
    rows = torch.cat([shared, torch.arange(q.shape[2], device=device)])  # [M + N]

    def allowed(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        own_part, near = column >= count, neighbours(row, places[column])
        keep = near | ~own_part if double_count else near == own_part
        return keep if valid is None else keep & valid[batch, rows[column]] | (column - count == row)

    # Made here and not by `create_block_mask`, which evaluates the rule at all N x (M + N) pairs.
    numbers, indices = _filled_blocks(q.shape[2], count, *reach, device)
    sizes: dict[str, Any] = {"BLOCK_SIZE": FLEX_BLOCK, "seq_lengths": (q.shape[2], count + q.shape[2])}
    mask = BlockMask.from_kv_blocks(numbers, indices, mask_mod=allowed, **sizes)
    keys, values = (torch.cat([x.index_select(2, shared), x], dim=2) for x in (k, v))
    attended: Tensor = (attend or _compiled_flex())(q, keys, values, block_mask=mask)
    return attended


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    # A generation has one length, so that sizes may as well be constants of the kernel.
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept beyond the run, and a tensor of inference mode could not be used in training
def _filled_blocks(
    length: int, num_shared: int, group: int, margin: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """How many blocks of columns each block of rows meets `[1, 1, rows]`, and which `[1, 1, rows, columns]`."""
    filled = filled_blocks(length, num_shared, group, margin)
    numbers = filled.sum(dim=1, dtype=torch.int32)
    # FlexAttention reads the first `numbers` of a row; stable, so that blocks are met in the order of memory.
    indices = filled.int().argsort(dim=1, descending=True, stable=True).int()
    return numbers[None, None].to(device), indices[None, None].to(device)


def filled_blocks(length: int, num_shared: int, group: int = 1, margin: int = 0) -> Tensor:
    """The blocks of scores, `[rows, columns]`, that hold a pair which may be allowed; arguments as for `flex_union`.

    >>> filled_blocks(512, num_shared=0, margin=100).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """
    starts = partial(torch.arange, step=FLEX_BLOCK)
    rows, columns = starts(0, length), starts(0, num_shared + length)
    first = rows // group * group - margin + num_shared  # the first column of a neighbour of the block's first row
    last = ((rows + FLEX_BLOCK - 1).clamp(max=length - 1) // group + 1) * group - 1 + margin + num_shared
    near = (columns + FLEX_BLOCK > first[:, None].clamp(min=num_shared)) & (columns <= last[:, None])
    return near | (columns < num_shared)
