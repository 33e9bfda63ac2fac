"""What a generator does with its system beside generating: save it, share it on the Hugging Face hub, open it there."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch

from foley.generation.novelty import KnownCaptions
from foley.system.adapters import Adapters
from foley.system.sharing import pull_system, push_system
from foley.system.system import System, save_system, student_of


class SharedSystem:
    """The part of `TextToAudio` that knows folders and the hub."""

    system: System
    known_captions: KnownCaptions

    @classmethod
    def load(
        cls,
        system: str | Path,
        device: str | torch.device = "cpu",
        max_duration_seconds: float = 60.0,
        adapters: Adapters = (),
    ) -> Self:
        """See the class that generates."""
        raise NotImplementedError

    def _require_exact(self, purpose: str) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        revision: str | None = None,
        student: bool = False,
        device: str | torch.device = "cpu",
        max_duration_seconds: float = 60.0,
        sha256: str | None = None,
        adapters: Adapters = (),
        hub_dir: str | Path | None = None,
    ) -> Self:
        """A system from the hub by OWNER/NAME, as it is there now or was fetched last; or from its folder.

        Args:
            revision: branch, tag or commit on the hub.
            student: take the student inside it.
            sha256: of the system, as its card says it; any other one is refused.
            adapters: merged into its weights, as for `load`.
            hub_dir: a folder laid out as the hub is, instead of the network.

        Raises CheckpointError where it cannot be had, was altered, or has no student, and as `load` does.

        >>> from foley import TextToAudio
        >>> from foley.core.config import shipped
        >>> TextToAudio.from_pretrained(shipped("demo"), student=True).student is None
        False
        """
        folder = pull_system(name_or_folder, revision, sha256=sha256, hub_dir=hub_dir)
        return cls.load(student_of(folder) if student else folder, device, max_duration_seconds, adapters)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Export as a system directory, floating weights as `dtype` (None keeps float32); adapters are in them.

        Raises ValueError where `optimise` has rounded the denoiser's weights, as the first generation on CUDA does.
        """
        self._require_exact("save")
        save_system(replace(self.system, captions=self.known_captions.captions), Path(directory), dtype)

    def push_to_hub(
        self, repository: str, licence: str, private: bool = False, dtype: torch.dtype | None = None
    ) -> str:
        """Save the system, and put it on the hub as OWNER/NAME with a card; returns the commit's address.

        What else lies in the folder that it came from, such as a student and `training.json`, `foley push` sends too.

        Args:
            licence: of the weights, as the hub names it.
            private: of a repository that is made by this.
            dtype: as for `save`.

        Raises ValueError as `save` does, and HubError where the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, dtype)
            return push_system(folder, repository, licence, private)
