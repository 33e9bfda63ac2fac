"""Text-to-audio research: train, distil, accelerate, evaluate and serve latent diffusion models for sound.

>>> from foley import TextToAudio
>>> TextToAudio.load().generate(["a dog barks"], duration_seconds=0.5, num_steps=2).audio.shape
torch.Size([1, 1, 12000])
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foley.generation.editing import EditMask, EditMasks
    from foley.generation.prompts import Clip
    from foley.generation.result import Generation
    from foley.generation.settings import GenerationSettings
    from foley.generation.text_to_audio import TextToAudio

# What Apple's GPUs lack runs on the CPU, with a warning. PyTorch reads this once, as it is loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__version__ = "0.2.0"
__all__ = ["Clip", "EditMask", "EditMasks", "Generation", "GenerationSettings", "TextToAudio", "__version__"]

_HOMES = {
    "Clip": "foley.generation.prompts",
    "EditMask": "foley.generation.editing",
    "EditMasks": "foley.generation.editing",
    "Generation": "foley.generation.result",
    "GenerationSettings": "foley.generation.settings",
    "TextToAudio": "foley.generation.text_to_audio",
}


def __getattr__(name: str) -> Any:
    """Imported at the first use, for torch takes its seconds: `import foley` alone is free."""
    if name not in _HOMES:
        raise AttributeError(f"module 'foley' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
