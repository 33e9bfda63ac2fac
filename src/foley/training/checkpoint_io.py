"""How training checkpoints reach the disk: whole or not at all, and never through unpickled code."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from foley.checkpoint import CheckpointError, read_training_checkpoint
from foley.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes and renames; reads with `weights_only`.

    A process killed while saving leaves the previous checkpoint, and a hidden file that nothing reads and that the
    next save of the same name removes.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save; raises CheckpointError where the disk refuses, with the old file intact and nothing left behind."""
        target = Path(path)
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

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load onto the CPU whatever `weights_only` says; raises CheckpointError for a file that needs unpickling."""
        return read_training_checkpoint(Path(path))
