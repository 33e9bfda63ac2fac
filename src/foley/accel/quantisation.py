"""Linear layers in 8 bits: a denoiser or a text encoder of smaller weights, multiplied as whole numbers or float8.

    int8_dynamic   weights [N, K] rounded by output, activations by token as they come; products of int8
    int8_weight    weights rounded by output and widened again at each product: memory, not time
    fp8            as int8_dynamic in float8 (e4m3), on CUDA of capability 8.9 or later, beside bfloat16

`torchao` rounds. It multiplies, too, but for int8_dynamic: outside of `torch.compile` its product of int8 is 35 times
slower than float32 on a CPU, and waits for the device on CUDA (`safe_int_mm` prints its input). `Int8Linear` calls the
kernels of PyTorch instead: FBGEMM's on the CPU, cuBLAS's on CUDA. A scale is a token's, so that an item's result does
not depend on the rest of its batch; `torch.ao.quantization.quantize_dynamic` takes one scale for the whole batch.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from foley.accel.precision import set_precision
from foley.core.hashing import adopt_hash, hash_module
from foley.core.numbers import check_choice

KINDS = ("int8_dynamic", "int8_weight", "fp8")
_FP8_CAPABILITY = (8, 9)
_ALIGNMENT = 16  # of both sides of a weight: what the kernels of float8 take; those of int8 take 8

# What the time makes is a row a timestep, computed once a run, and scales whole tokens: an error there is in all of
# them. T5 multiplies outliers by its `wo`, for which half precision is too coarse already. Adapters are small.
_KEPT = re.compile(r"(.*[._])?(\w*modulation|\w*norm\w*|ada\w*|time\w*|wo|lora_\w*)(\..*)?")


def quantise(model: nn.Module, kind: str) -> list[str]:
    """Hold the linear layers of `model`'s blocks in 8 bits, in place and for good; the names of these layers.

    The rest stays: embeddings, norms, the projections around the blocks, what `_KEPT` names, and layers whose width is
    no multiple of 16. The model keeps its hash, so that calibrations of the exact weights hold. It is to stay on its
    device.

    Raises ValueError for an unknown kind, one that the device lacks, and a model without such layers; ImportError where
    `torchao` is not installed.
    """
    digest = hash_module(model)  # of the exact weights, while they are there
    names = quantise_layers(model, kind)
    if not names:
        raise ValueError(
            f"quantise={kind}: {type(model).__name__} has no linear layer in its blocks whose widths are multiples of "
            f"{_ALIGNMENT}" + (" and whose weight is in bfloat16: give precision=bf16" if kind == "fp8" else "")
        )
    adopt_hash(model, digest)
    return names


def quantise_layers(model: nn.Module, kind: str) -> list[str]:
    """`quantise` for a model whose hash nobody asks for, such as a text encoder; it may have no such layer."""
    layers = quantisable_layers(model)
    device = next((layer.weight.device for layer in layers.values()), torch.device("cpu"))
    check_kind(kind, device)
    if kind == "fp8":  # the kernel that scales rows takes no other type
        layers = {name: layer for name, layer in layers.items() if layer.weight.dtype == torch.bfloat16}
    # By identity, since a layer that is shared has a name for each of its places.
    chosen = set(layers.values())
    _torchao().quantize_(model, _config(kind, device), lambda layer, _: layer in chosen)
    if kind == "int8_dynamic":
        for name, layer in layers.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Int8Linear(layer))
    return list(layers)


def round_system(denoiser: nn.Module, text: Any, precision: str, kind: str | None) -> None:
    """Hold a denoiser in `precision`, and then its and its text conditioner's linear layers in `kind`, if in any.

    Raises as `set_precision` and `quantise` do.
    """
    if kind is not None:  # what cannot be is refused before anything is rounded
        check_kind(kind, next(denoiser.parameters()).device)
        _torchao()
    # First: scales are of the weights as they are then, and float8 is made of bfloat16.
    set_precision(denoiser, precision)
    text.compute_exactly(precision == "float32")
    if kind is not None:
        quantise(denoiser, kind)
        text.change_weights(kind, lambda encoder: quantise_layers(encoder, kind))


def quantise_pipeline(pipeline: Any, denoiser: nn.Module, kind: str) -> None:
    """`quantise` the denoiser of a pipeline of diffusers, and its text encoders with it; raises as that does."""
    quantise(denoiser, kind)
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            quantise_layers(part, kind)


def weight_bytes(model: nn.Module) -> int:
    """Of all that a model holds, scales included.

    >>> weight_bytes(nn.Linear(4, 4, bias=False)), weight_bytes(nn.Linear(4, 4, bias=False).bfloat16())
    (64, 32)
    """
    # FBGEMM's layout is no tensor, and so among neither parameters nor buffers: a byte a weight.
    packed = (layer for layer in model.modules() if isinstance(layer, Int8Linear) and layer.handle is not None)
    return sum(layer.in_features * layer.out_features for layer in packed) + sum(
        map(_bytes, (*model.parameters(), *model.buffers()))
    )


def _bytes(tensor: Tensor) -> int:
    """Of a tensor, or of those that one of `torchao` wraps."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in names)


def check_kind(kind: str, device: torch.device) -> None:
    """Raises ValueError for an unknown kind, and for one that `device` does not compute."""
    check_choice("quantise", kind, KINDS)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"quantise={kind} on {device.type}: 8 bits are for the CPU and CUDA; leave it out")
    if kind == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY):
        raise ValueError(
            "quantise=fp8 needs CUDA of capability 8.9 or later (Ada, Hopper), which multiplies float8; "
            "int8_dynamic and int8_weight compute everywhere"
        )
    if kind == "int8_dynamic" and device.type == "cpu" and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError("quantise=int8_dynamic: PyTorch has no FBGEMM for this processor; int8_weight saves memory")


def quantisable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of the blocks: of what `model.blocks()` lists, and of every list of modules within it."""
    blocks = getattr(model, "blocks", None)
    listed = list(blocks()) if callable(blocks) and not isinstance(blocks, nn.Module) else []
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # Both, since a U-Net of diffusers has lists alone, and a block that stands by itself is in none.
    inside = {layer for block in (*listed, *stacks) for layer in block.modules()}
    return {
        name: layer
        for name, layer in model.named_modules()
        # No subclass: what its `forward` does with the weight is not known.
        if type(layer) is nn.Linear and layer in inside and not _KEPT.fullmatch(name) and _is_aligned(layer)
    }


def _is_aligned(layer: nn.Linear) -> bool:
    return layer.in_features % _ALIGNMENT == 0 and layer.out_features % _ALIGNMENT == 0


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ImportError("quantise= rounds by torchao: install it with `pip install 'foley[quantise]'`") from error
    return torchao.quantization


def _config(kind: str, device: torch.device) -> Any:
    torchao = _torchao()
    if kind == "fp8":
        config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    elif kind == "int8_weight":
        config = torchao.Int8WeightOnlyConfig()
    else:
        config = torchao.Int8DynamicActivationInt8WeightConfig(reduce_range=_adds_in_16_bits(device))
    config.set_inductor_config = False  # which is the whole process's
    return config


def _adds_in_16_bits(device: torch.device) -> bool:
    """Without AVX512-VNNI, FBGEMM adds products in pairs of 16 bits: 255 * 127 twice overflows, 255 * 64 does not.

    Weights have 7 bits there, then. (With 7 bits of the activations instead, the demo's error is an eighth larger.)
    """
    return device.type == "cpu" and not torch.cpu._is_vnni_supported()


# ---------------------------------------------------------------- int8 products


class Int8Linear(nn.Module):
    """`y = s_x s_w (q_x q_w) + b`, with whole numbers q: weights of one scale an output, activations of one a token.

    Args:
        layer: whose weight `torchao` has rounded, by output.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        rounded: Any = layer.weight
        self.dtype = rounded.dtype  # what a reader of `weight` would find without rounding
        self.bias = layer.bias
        self.scale: Tensor
        self.rounded: Tensor
        self.handle: Tensor | None
        self.register_buffer("scale", rounded.scale.detach().flatten().float())  # [N]
        values = rounded.qdata.detach()  # [N, K]
        # Held once: on the CPU in FBGEMM's own layout, which is no tensor.
        self._packed = _Packed(values) if values.device.type == "cpu" else None
        self.register_buffer("rounded", None if self._packed else values)
        # A tensor, since compiled blocks share one graph, in which a number would be a constant.
        self.register_buffer("handle", torch.tensor(self._packed.handle) if self._packed else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`, in the type of `x`."""
        largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))  # one pass each: `abs` is slower
        # A token of zeros has a scale all the same: a normal number, since a subnormal one may be flushed to 0.
        scale = largest.float().clamp_min(127 * torch.finfo(torch.float32).tiny) / 127  # [..., 1]
        levels = x / scale  # [..., K], float32, within 127
        scaled = self.product(levels).mul_(scale).mul_(self.scale)  # [..., N] by [..., 1] and [N]
        return (scaled if self.bias is None else scaled.add_(self.bias)).to(x.dtype)

    def product(self, levels: Tensor) -> Tensor:
        """Levels `[..., K]`, rounded to whole numbers, times those of the weight: `[..., N]` in float32."""
        if self.handle is None:
            return int8_product(levels, self.rounded)
        product: Tensor = torch.ops.foley.int8_product(levels, self.handle, self.out_features)
        return product

    @property
    def weight(self) -> Tensor:
        """`[N, K]` in the layer's type, made anew: for those who read a linear layer's weight, or its type."""
        values = self._packed.unpacked() if self._packed else self.rounded
        return (values * self.scale[:, None]).to(self.dtype)

    def extra_repr(self) -> str:
        """As that of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def int8_product(levels: Tensor, rounded: Tensor) -> Tensor:
    """`[..., K]`, rounded to whole numbers within 127, times `rounded [N, K]`, exactly: `[..., N]` in float32."""
    rows = levels.round().to(torch.int8).flatten(0, -2)  # [M, K]
    missing = max(0, _FEWEST_ROWS - len(rows))
    padded = nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    # Of 8 and 8 bits to 32, in which no sum of a layer's width overflows.
    return torch._int_mm(padded, rounded.t())[: len(rows)].float().unflatten(0, levels.shape[:-1])


_FEWEST_ROWS = 32  # cuBLAS takes more than 16


class _Packed:
    """A weight in the layout of FBGEMM, which is no tensor; layers and their copies hold it, graphs know its handle."""

    def __init__(self, values: Tensor) -> None:
        ones, zeros = torch.ones(len(values), dtype=torch.float64), torch.zeros(len(values), dtype=torch.int64)
        # Scales of one: FBGEMM then gives sums of whole numbers, and the tokens' scales can be multiplied after it.
        weight = torch._make_per_channel_quantized_tensor(values, ones, zeros, 0)
        with _engine("fbgemm"):  # the process may have chosen another, which packs in a layout of its own
            self.weight = torch.ops.quantized.linear_prepack(weight, None)
        self.handle = id(self)
        _packed[self.handle] = self

    def unpacked(self) -> Tensor:
        """`[N, K]`."""
        weight, _ = torch.ops.quantized.linear_unpack(self.weight)
        return weight.int_repr()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Packed":
        return self  # never written to


# Weak, so that a denoiser that is let go takes its weights with it.
_packed: WeakValueDictionary[int, _Packed] = WeakValueDictionary()
_MIDDLE = 128  # of what FBGEMM takes, whole numbers from 0 to 255


@torch.library.custom_op("foley::int8_product", mutates_args=())
def _packed_product(levels: Tensor, handle: Tensor, out_features: int) -> Tensor:
    weight = _packed[int(handle)].weight
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(levels, 1.0, _MIDDLE, weight)


@_packed_product.register_fake
def _(levels: Tensor, handle: Tensor, out_features: int) -> Tensor:
    return levels.new_empty(*levels.shape[:-1], out_features)


@register_flop_formula(torch.ops.foley.int8_product)
def _packed_flops(levels: Any, handle: Any, out_features: int, *_: Any, **__: Any) -> int:
    return 2 * torch.Size(levels).numel() * out_features


@contextmanager
def _engine(name: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
