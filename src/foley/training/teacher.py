"""The system that a student is distilled from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from foley.checkpoint import CheckpointError, build_component
from foley.config import relative_to_checkout
from foley.data.latent_cache import StaleCacheError
from foley.system import System, codec_hashes, load_system


@dataclass(frozen=True)
class Teacher:
    """A trained system without its codec, and the hashes of the codecs whose latents it knows (empty: any)."""

    system: System
    codec_hashes: set[str]

    @classmethod
    def load(cls, path: str) -> "Teacher":
        """From an exported system directory or a training checkpoint; CheckpointError for a student."""
        absolute = Path(path).resolve()
        system = load_system(absolute, with_codec=False)
        if system.consistency is not None:
            raise CheckpointError(f"teacher={path} is a student itself; give the system that it was distilled from")
        return cls(system, codec_hashes(absolute))

    @property
    def student_configs(self) -> dict[str, dict[str, Any]]:
        """How to build each component of a student, and the process; files in the checkout are named relative to it."""
        configs: dict[str, Mapping[str, Any]] = dict(self.system.configs)
        configs["denoiser"] = {**configs["denoiser"], "guidance_embedding": True}
        return {
            name: {key: relative_to_checkout(value) for key, value in configs[name].items()}
            for name in ("denoiser", "text", "normaliser", "process")
        }

    def make_student(self) -> nn.Module:
        """A denoiser with the teacher's weights and a guidance embedding that starts at zero."""
        student: nn.Module = build_component(self.student_configs["denoiser"], "teacher")
        missing, _ = student.load_state_dict(self.system.modules["denoiser"].state_dict(), strict=False)
        if foreign := [key for key in missing if not key.startswith("guidance_embedding.")]:
            raise CheckpointError(f"the teacher's denoiser lacks weights that a student needs: {', '.join(foreign)}")
        return student

    def require_codec(self, codec_hash: str) -> None:
        """Raise StaleCacheError where latents of this codec are not what the teacher was trained on."""
        if self.codec_hashes and codec_hash not in self.codec_hashes:
            known = " or ".join(sorted(digest[:12] for digest in self.codec_hashes))
            raise StaleCacheError(
                f"the latents are of the codec {codec_hash[:12]}, the teacher was trained on those of {known}; "
                "encode them with the teacher's codec"
            )
