"""What runs a system's networks: PyTorch, as they are or compiled, or the graphs of an export."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foley.accel.compiling import (
    Denoise,
    check_choice,
    compile_evaluation,
    leaves_evaluations_whole,
    leaves_layers_alone,
)
from foley.accel.precision import compile_blocks
from foley.core.components import CheckpointError
from foley.diffusion.context import Accelerator
from foley.system.exported import GRAPHS_FILE, ExportedSystem, check_format, load_graphs

EAGER = "eager"
"""The backend that is PyTorch itself."""
Compiler = Callable[[Denoise], Denoise]


class Backend:
    """Says for each run what its evaluations call.

    Args:
        denoiser: the system's own, in PyTorch.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._compiled: bool | str = False
        self._exported: ExportedSystem | None = None
        self._name = EAGER

    def compile(self, compiled: bool | str) -> None:
        """By `compile=`: whole evaluations at their first use, or blocks. Raises ValueError for an unknown choice."""
        check_choice(compiled)
        self._compiled = compiled
        if compiled == "blocks":
            compile_blocks(self._denoiser)

    def use(self, name: str, directory: Path, codec: Any, inference: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
        """Run the graphs in `directory/name` from now on; returns what decodes.

        Args:
            inference: what was chosen for the networks in PyTorch, which no graph follows.

        Raises:
            ValueError: for a backend that is none, or where the denoiser is rounded, compiled or extended.
            CheckpointError: where there are no such graphs, or those of another system.
            ModuleNotFoundError: for "onnx" without the extra `export`.
        """
        check_format(name)
        folder = directory / name
        if not (folder / GRAPHS_FILE).is_file():
            raise CheckpointError(
                f"backend={name}: {folder} does not exist; make it, and sample from there: "
                f"foley export ckpt={directory} format={name} output_dir=FOLDER, then system=FOLDER"
            )
        options = ("compile", "cuda_graphs", "quantise", "rotary_extension")
        changed = [option for option in options if inference.get(option)]
        exact = inference.get("precision", "float32"), inference["decoder_precision"]
        changed += ["another precision than float32"] if exact != ("float32", "float32") else []
        if changed:
            raise ValueError(f"backend={name} runs graphs as they were exported: leave out {', '.join(changed)}")
        self._exported = load_graphs(folder, self._denoiser, codec, next(self._denoiser.parameters()).device)
        self._name = name
        return partial(self._exported.decode, codec)

    def require_pytorch(self, purpose: str) -> None:
        """Raises ValueError where graphs run: they would go on as they are, and the record would say otherwise."""
        if self._exported is not None:
            raise ValueError(f"{purpose}: backend={self._name} runs graphs as they were exported; load the system anew")

    def check(self, accelerator: Accelerator | None) -> None:
        """Raises ValueError for an accelerator that changes layers, where they are inside a graph."""
        if self._exported is not None and not leaves_layers_alone(accelerator):
            raise ValueError(
                f"backend={self._name}: {type(accelerator).__name__} changes layers of the denoiser, and a graph has "
                "none; take accel=prediction or accel=none, or leave the backend out"
            )

    def of_run(
        self, accelerator: Accelerator | None, metered: Accelerator | None, alike: bool = True
    ) -> tuple[nn.Module, Accelerator | None, Compiler | None]:
        """The denoiser, what to attach to it, and what makes one graph of an evaluation.

        Args:
            accelerator: of the request; `metered` counts it too, which cannot look into a graph.
            alike: whether guidance is the same at all evaluations; where not, blocks are compiled, as under caches.
        """
        self.check(accelerator)
        if self._exported is not None:
            return self._exported.denoiser, metered, None
        if self._compiled is True:
            if alike and leaves_evaluations_whole(accelerator):
                return self._denoiser, None, compile_evaluation
            compile_blocks(self._denoiser)
        return self._denoiser, metered, None
