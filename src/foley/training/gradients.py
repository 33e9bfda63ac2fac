"""Between the backward pass and the optimizer: one norm of the gradients, by which they are clipped, or dropped."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """The norm `[]` of all gradients that a step of `optimizer` would use, on their device."""
    return total_norm(_parameters(optimizer))


def total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm `[]` of all gradients of `parameters`, of all processes' parts where they are sharded."""
    norm = nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(optimizer: Optimizer, limit: float | None, norm: Tensor | None = None) -> None:
    """Scale the gradients down to a norm of `limit`, given their `norm` where that is known; None clips nothing."""
    if limit is not None:
        norm = gradient_norm(optimizer) if norm is None else norm
        nn.utils.clip_grads_with_norm_(_parameters(optimizer), limit, norm)


def decides_on_device(optimizer: Optimizer) -> bool:
    """Whether a step of `optimizer` can be told on the device not to happen: fused kernels can, for loss scaling."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def drop_unless_finite(optimizer: Optimizer, norm: Tensor) -> None:
    """Keep the next step from moving weights or moments where `norm []` is not finite.

    A fused kernel is told so on its device, and the host need not wait for it. The gradients of others are set to None,
    which asks the device.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    >>> weight.grad = torch.tensor([1.0, float("nan")])
    >>> drop_unless_finite(optimizer, gradient_norm(optimizer))
    >>> optimizer.step()
    >>> weight.tolist()
    [1.0, 1.0]
    """
    if decides_on_device(optimizer):
        # What a gradient scaler would set: the kernel then leaves everything as it was, its count of steps too.
        vars(optimizer).update(grad_scale=None, found_inf=(~norm.isfinite()).float())
    elif not bool(norm.isfinite()):
        optimizer.zero_grad(set_to_none=True)


class OnItsWay:
    """A number that is copied from its device to the host, which goes on meanwhile.

    >>> bool(OnItsWay(torch.tensor(True)).wait())
    True
    """

    def __init__(self, value: Tensor) -> None:
        # Into pinned memory; other devices than CUDA have no event here by which to know that it has arrived.
        self._host = value.detach().to("cpu", non_blocking=value.is_cuda)
        self._arrived = None
        if value.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    def wait(self) -> Tensor:
        """The number on the host: what the device was given to do after it is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
