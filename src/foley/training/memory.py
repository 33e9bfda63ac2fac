"""How much memory a training step keeps for its backward pass."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class ActivationCounter:
    """Counts the bytes that autograd saves inside its `hooks`; memory that several tensors share counts once.

    Args:
        parameters: what is kept anyway, and so left out.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._ignored = {_storage(parameter) for parameter in parameters}
        self._bytes: dict[int, int] = {}
        # Storages are told apart by address, so none may be freed and its address given away while they are counted.
        self._alive: list[Tensor] = []

    @property
    def total_bytes(self) -> int:
        """Saved so far."""
        return sum(self._bytes.values())

    def hooks(self) -> saved_tensors_hooks:
        """A context in which to run a forward pass."""
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in self._ignored and key not in self._bytes:
            self._bytes[key] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor.detach())
        # A saved output that is packed as itself would keep its own graph alive.
        return tensor.detach()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def activation_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward()` saves for its backward pass, without the parameters of `module`; also on "meta"."""
    counter = ActivationCounter(module.parameters())
    with counter.hooks():
        forward()
    return counter.total_bytes
