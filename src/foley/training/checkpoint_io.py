"""Training checkpoints on disk: written behind training's back, whole or not at all; read once for all ranks of a node.

A checkpoint of EzAudio-XL holds 14 GB. Written while training waits, it would cost a step as much as a hundred others;
read by each of 8 ranks it would want 112 GB of a node's memory.
"""

import copy
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor, distributed

from foley.core.components import CheckpointError, read_pickle
from foley.core.files import atomic_write, replacing
from foley.system.checkpoint import read_training_checkpoint
from foley.training.callbacks.ema import CURRENT_WEIGHTS


class AtomicCheckpointIO(TorchCheckpointIO):
    """Takes a snapshot and lets training go on; a thread writes it beside the target, flushes and renames.

    What else is to happen to files (`later`) happens in the order in which it was asked for, and not after a failure:
    `last.ckpt` points to what is on disk, and an older checkpoint goes only after the new one has come. A process
    killed while saving leaves the previous checkpoint, and a hidden file that nothing reads and that the next save of
    the same name removes. Reads with `weights_only`.

    Args:
        background: False writes before training goes on, for loggers that read each checkpoint at once.
    """

    def __init__(self, background: bool = True) -> None:
        self.background = background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last = _done()
        self._snapshot = Snapshot()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save; raises as `wait` does what an earlier save has met."""
        self.wait()  # there is one snapshot
        self.later(partial(_write, self._snapshot.of(checkpoint), Path(path)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove, once what was saved before is on disk."""
        self.later(partial(super().remove_checkpoint, path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load onto the CPU whatever `weights_only` says; raises CheckpointError for a file that needs unpickling.

        Ranks of one node share the memory that it takes.
        """
        self.wait()
        with _once_a_node(Path(path)) as copied:
            return read_training_checkpoint(Path(path), lambda own: read_pickle(copied or own, mmap=bool(copied)))

    def later(self, work: Callable[[], object]) -> None:
        """Do `work` after all that was asked for before; not at all where that has failed."""
        self._last = self._thread.submit(_after, self._last, work)
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until all is on disk; raises CheckpointError where the disk has refused, with the old files intact."""
        last, self._last = self._last, _done()
        last.result()

    def teardown(self) -> None:
        self.wait()


def _done() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done


def _after(previous: Future[None], work: Callable[[], object]) -> None:
    previous.result()  # raises what it has met, so that all that comes after it is left undone
    work()


class Snapshot:
    """A copy of a checkpoint in the host's memory, pinned where it comes from a GPU; each takes the place of the last.

    Tensors that are one go on being one, so that files grow no larger by it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}  # by the tensor's place in the checkpoint: to pin memory takes time

    def of(self, checkpoint: Mapping[str, Any]) -> Any:
        """The copy, which holds until the next one."""
        copied: dict[Any, Tensor] = {}
        taken = self._of(checkpoint, "", copied)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies from GPUs run beside each other until here
        return taken

    def _of(self, value: Any, place: str, copied: dict[Any, Tensor]) -> Any:
        if type(value) in (Tensor, torch.nn.Parameter):
            return self._copy(value.detach(), place, copied)
        if isinstance(value, dict):
            same = copy.copy(value)  # of its own type, and with what is attached to it
            same.update((name, self._of(entry, f"{place}/{name}", copied)) for name, entry in value.items())
            return same
        if type(value) in (list, tuple):
            return type(value)(self._of(entry, f"{place}/{index}", copied) for index, entry in enumerate(value))
        return copy.deepcopy(value)

    def _copy(self, tensor: Tensor, place: str, copied: dict[Any, Tensor]) -> Tensor:
        identity = tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
        if identity not in copied:
            buffer = self._buffers.get(place)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[place] = buffer
            # CUDA's alone are waited for, in `of`.
            copied[identity] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        return copied[identity]


def _write(checkpoint: Any, target: Path) -> None:
    for stale in target.parent.glob(f".{target.name}.*"):
        stale.unlink(missing_ok=True)
    try:
        atomic_write(target, lambda temporary: torch.save(checkpoint, temporary))
    except (OSError, RuntimeError) as error:
        free_mib = shutil.disk_usage(target.parent).free >> 20
        raise CheckpointError(
            f"could not write the checkpoint {target}: {error} ({free_mib} MiB free there). "
            "The previous checkpoint is intact; free some space and resume with ckpt_path=auto."
        ) from error


def point_to(link: Path, target: Path) -> None:
    """Let `link` become the file `target` beside it, at once: by a symbolic link, or a copy where there are none."""
    _name_too(link, target, lambda temporary: os.symlink(target.name, temporary))


def stand_for(twin: Path, target: Path) -> None:
    """Let `twin` become a file of its own with the content of `target` beside it, at once.

    A hard link, which costs no room and outlives `target`; a copy where there are none, which the file system may
    share (copy on write).
    """
    _name_too(twin, target, lambda temporary: os.link(target, temporary))


def _name_too(name: Path, target: Path, link: Callable[[Path], None]) -> None:
    temporary = name.with_name(f".{name.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        link(temporary)
    except (OSError, NotImplementedError):  # exFAT, some network file systems, Windows without the right
        with replacing(name) as copied:
            shutil.copyfile(target, copied)
    else:
        temporary.replace(name)


def make_lean(path: Path) -> None:
    """Leave of a checkpoint two bytes a parameter: the averages in float16, without moments and weights in training.

    It serves whatever wants weights, and a run goes on from it, but not exactly: weights in training begin as their
    averages, and moments anew. Raises CheckpointError where it is none of ours.
    """
    file = path.resolve()  # `last.ckpt` goes on pointing there
    checkpoint = read_training_checkpoint(file)
    state = checkpoint["state_dict"]
    for name in checkpoint.pop(CURRENT_WEIGHTS, ()):
        state[name] = state[name].half()
    for optimizer in checkpoint.get("optimizer_states", ()):
        optimizer["state"] = {}
    _write(checkpoint, file)


@contextmanager
def _once_a_node(path: Path) -> Iterator[Path | None]:
    """The content of `path` in memory that all ranks of this node share, under a name to open it by.

    None where there is one rank, or no such memory, or one that cannot read it. It is no mapping of the file itself:
    one that is overwritten in place would end all ranks.
    """
    if not (distributed.is_initialized() and distributed.get_world_size() > 1 and hasattr(os, "memfd_create")):
        yield None
        return
    nodes = _gathered(socket.gethostname())
    first = nodes.index(socket.gethostname())
    handle = _held(path) if distributed.get_rank() == first else None
    try:
        held = _gathered(None if handle is None else f"/proc/{os.getpid()}/fd/{handle}")[first]
        # Processes that do not see each other's in /proc each read the file.
        seen = _gathered(held is not None and os.access(held, os.R_OK))
        yield Path(held) if all(seen) else None
        distributed.barrier()  # all have opened it
    finally:
        if handle is not None:
            os.close(handle)


def _held(path: Path) -> int | None:
    """Memory with the content of `path`; None where it cannot be had or read, which each rank finds out by itself."""
    handle = None
    try:
        handle = os.memfd_create(path.name)
        with path.open("rb") as source, os.fdopen(os.dup(handle), "wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return cast(list[Any], values)
