"""A device that is not there: tensors that say they lie on it, live on the CPU, and note each wait for the device.

On CUDA a wait is what `torch.cuda.set_sync_debug_mode("error")` refuses: to read a number, to look for what is not
zero, to copy either way but from pinned memory. Tensors of two devices in one operation are an error, as there, and so
is float64, which MPS does not know.
"""

from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.masked_select.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class DeviceTensor(Tensor):
    """Says that it lies on `device`; `inner` is on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "DeviceTensor":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, inner.shape, device=device, **layout)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended device outside of `PretendDevice`")

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner!r})"


class PretendDevice(TorchDispatchMode):
    """Inside the context there is such a device; `waits` names the operations that waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", 0)
        self.waits: list[str] = []
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        # PyTorch looks for the driver before it dispatches, and pins by the driver.
        if not torch.cuda.is_available():
            torch._C._ensureCUDADeviceGuardSet()  # guards that do nothing, as fake tensors have them
            self._patches.enter_context(mock.patch("torch.cuda._lazy_init"))
        self._patches.enter_context(mock.patch.object(Tensor, "pin_memory", _pinned))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def put(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device."""
        return DeviceTensor(tensor.detach(), self.device)

    def put_module(self, module: nn.Module) -> None:
        """All parameters and buffers on the device; nothing of it trains any more."""
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                tensors.update({name: self.put(tensor) for name, tensor in tensors.items() if tensor is not None})

    def get(self, tensor: Tensor) -> Tensor:
        """`tensor` on the CPU, without a wait that counts."""
        assert isinstance(tensor, DeviceTensor), "this is not on the device"
        return tensor.inner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        target = kwargs.get("device")
        is_copy = func in _COPIES
        if func in _READS and here:
            self.waits.append(str(func))
        if is_copy and (target is not None or len(here) not in (0, len(tensors))):
            self._note_copy(func, args, target, bool(kwargs.get("non_blocking")))
        if here and not is_copy and any(t.ndim and not isinstance(t, DeviceTensor) for t in tensors):
            raise RuntimeError(f"{func} mixes tensors of the CPU and of {self.device}")
        stays = bool(here) if target is None else torch.device(target).type == self.device.type
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        return tree_map(lambda x: self._wrap(x, func), result) if stays else result

    def _note_copy(self, func: Any, args: Any, target: Any, non_blocking: bool) -> None:
        source = args[-1] if target is None else args[0]  # `copy_(to, from)`, or `_to_copy(from, device=to)`
        from_here = isinstance(source, DeviceTensor)
        to_here = isinstance(args[0], DeviceTensor) if target is None else torch.device(target).type == self.device.type
        if from_here != to_here and not (non_blocking and getattr(source, "is_pretended_pinned", False)):
            self.waits.append(f"{func} {'from' if from_here else 'to'} the device")

    def _wrap(self, x: Any, func: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dtype == torch.float64:
            raise TypeError(f"{func}: float64 on the device, which MPS does not know")
        return DeviceTensor(x, self.device)


def _pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.is_pretended_pinned = True  # type: ignore[attr-defined]
    return copy


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, DeviceTensor) else x
