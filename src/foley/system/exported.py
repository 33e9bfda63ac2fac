"""The networks of a system as graphs that run without their code: ONNX, or packages of AOTInductor.

Beside the components of a system's folder, `onnx/` or `aoti/` holds a graph of the denoiser, of the codec's decoder and
of a text encoder of ours, and `system.json` says what each takes and gives, of which weights they are, and their
hashes. Sizes of batch, frames and tokens are free. What is left to Python is small: the solver, the tokenizer, and the
phases of a codec of magnitudes.

Conditions are not computed beforehand (`foley.models.dit.hoisting`): a graph takes what an evaluation takes.
"""

import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foley.core.components import CheckpointError
from foley.core.files import replacing, write_json
from foley.core.hashing import adopt_hash, hash_file, hash_module
from foley.core.reading import read_json, reading
from foley.models.codec.spectral_vae import SpectralVAE
from foley.models.text import SmallTextEncoder
from foley.nn.conv import folded_copy
from foley.system.system import System

SUFFIXES = {"onnx": ".onnx", "aoti": ".pt2"}
"""The formats, and what their files end in."""
NETWORKS = ("denoiser", "decoder", "text")
GRAPHS_FILE = "system.json"
GRAPHS_FORMAT = "foley-graphs/1"
_WHAT, _MEND = "a system's graphs", "export the system again"
_EXAMPLE = {"batch": 2, "frames": 96, "tokens": 16}  # sizes that are traced with; none of them stays in the graph
_OPTIONAL = {"context", "context_mask", "frame_mask", "visible", "hidden_mask", "guidance_scale"}
Graph = Callable[..., Tensor]


@dataclass(frozen=True)
class _Traced:
    """A network, and its inputs by name with the free axes of each."""

    network: nn.Module
    inputs: Mapping[str, Tensor]
    free: Mapping[str, Mapping[int, str]]
    output: str


# ---------------------------------------------------------------- writing


def export_graphs(
    system: System, directory: Path, file_format: str, max_frames: int = 4096, only: Collection[str] = NETWORKS
) -> None:
    """Write the graphs of `system` to `directory`, `system.json` last.

    Args:
        file_format: "onnx" or "aoti"; AOTInductor compiles for the device where the system is.
        max_frames: longest latent that the denoiser's graph takes.
        only: which networks, a text encoder where it is ours.

    Raises:
        ValueError: for another format, or a denoiser that takes more than text and a known latent.
        ModuleNotFoundError: for "onnx" without the extra `export`.
    """
    check_format(file_format)
    described = {}
    with torch.no_grad():
        for name, make in _networks(system, max_frames).items():
            if name not in only:
                continue
            traced = make()
            file = directory / f"{name}{SUFFIXES[file_format]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(traced, file, file_format)
            free = {key: {str(axis): size for axis, size in axes.items()} for key, axes in traced.free.items()}
            described[name] = {"file": file.name, "sha256": hash_file(file), "inputs": free, "output": traced.output}
    device = next(system.modules["denoiser"].parameters()).device.type
    denoiser_hash, codec_hash = (hash_module(system.modules[name]) for name in ("denoiser", "codec"))
    about = {"format": GRAPHS_FORMAT, "backend": file_format, "device": device, "max_frames": max_frames}
    write_json(
        directory / GRAPHS_FILE, {**about, "model_hash": denoiser_hash, "codec_hash": codec_hash, "graphs": described}
    )


def check_format(file_format: str) -> None:
    """Raises ValueError for a format that is none, and ModuleNotFoundError where its package is missing.

    >>> check_format("aoti")
    """
    if file_format not in SUFFIXES:
        raise ValueError(f"a backend is one of {', '.join(SUFFIXES)}, got {file_format!r}")
    if file_format == "onnx":
        _onnxruntime()


def _onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what writes the files; both come with one extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"backend=onnx wants {error.name}: pip install 'foley[export]'") from error
    return onnxruntime


def _networks(system: System, max_frames: int) -> dict[str, Callable[[], _Traced]]:
    text, codec = system.modules["text"], system.modules["codec"]
    networks: dict[str, Callable[[], _Traced]] = {
        "denoiser": partial(_denoiser, system.modules["denoiser"], text, max_frames),
        "decoder": partial(_decoder, codec),
    }
    if isinstance(text, SmallTextEncoder):
        networks["text"] = partial(_text, text)
    return networks


def _denoiser(denoiser: Any, text: Any, max_frames: int) -> _Traced:
    parameters = inspect.signature(denoiser.condition).parameters.keys() - {"timestep", "num_frames", "kwargs"}
    if parameters != _OPTIONAL or denoiser.context_embedding is None:
        raise ValueError(f"{type(denoiser).__name__} takes more than text and a known latent: it has no export")
    device, channels = denoiser.input_projection.weight.device, denoiser.latent_channels
    batch, frames, tokens = _EXAMPLE.values()
    if denoiser.positions is not None:
        frames = min(frames, denoiser.positions.max_length)
    if denoiser.rotary is not None:  # so long that a graph only cuts it
        denoiser.rotary(max_frames + int(denoiser.prepends_time_token), device, torch.float32)
    inputs = {
        "noisy": torch.randn(batch, channels, frames, device=device),
        "timestep": torch.full((batch,), 500.0, device=device),
        "context": torch.randn(batch, tokens, text.dim, device=device),
        "context_mask": torch.ones(batch, tokens, dtype=torch.bool, device=device),
        "visible": torch.zeros(batch, channels, frames, device=device),
        "hidden_mask": torch.ones(batch, frames, dtype=torch.bool, device=device),
    }
    if denoiser.guidance_embedding is not None:
        inputs["guidance_scale"] = torch.full((batch,), 3.0, device=device)
    last = {"noisy": 2, "context": 1, "context_mask": 1, "visible": 2, "hidden_mask": 1}
    free = {
        name: {0: "batch", **({last[name]: "tokens" if "context" in name else "frames"} if name in last else {})}
        for name in inputs
    }
    return _Traced(_ByPosition(denoiser, tuple(inputs)), inputs, free, "prediction [batch, channels, frames]")


class _ByPosition(nn.Module):
    """A denoiser that takes its inputs in order."""

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *inputs: Tensor) -> Tensor:
        prediction: Tensor = self.denoiser(**dict(zip(self.names, inputs, strict=True)))
        return prediction


def _decoder(codec: Any) -> _Traced:
    device = next(codec.parameters()).device
    latent = torch.randn(_EXAMPLE["batch"], codec.latent_channels, _EXAMPLE["frames"], device=device)
    is_spectral = isinstance(codec, SpectralVAE)
    output = "log_magnitudes [batch, frames * pool, bins]" if is_spectral else "audio [batch, 1, samples]"
    network = _Called(codec if is_spectral else folded_copy(codec), "decode_spectra" if is_spectral else "decode")
    return _Traced(network, {"latent": latent}, {"latent": {0: "batch", 2: "frames"}}, output)


def _text(text: SmallTextEncoder) -> _Traced:
    ids, mask = text.tokenise(["a dog barks", "rain falls"])
    device = text.norm.weight.device
    inputs = {"ids": ids.to(device), "mask": mask.to(device)}
    free = {name: {0: "batch", 1: "tokens"} for name in inputs}
    return _Traced(_Called(text, "embed"), inputs, free, "embeddings [batch, tokens, channels]")


class _Called(nn.Module):
    """One method of a module as its forward."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = getattr(self.module, self.method)(*inputs)
        return output


def _write(traced: _Traced, file: Path, file_format: str) -> None:
    with _sizes_without_exceptions():
        shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in traced.free.values())
        arguments = tuple(traced.inputs.values())
        # `*inputs` is one argument, a tuple of them.
        program = torch.export.export(traced.network.eval(), arguments, dynamic_shapes=(shapes,))
        if file_format == "aoti":
            import torch._inductor as inductor

            # Itself not atomic: it insists on the end of the name. Graphs count once `system.json` names them.
            inductor.aoti_compile_and_package(program, package_path=str(file))
            return
        for name in ("onnx_ir", "onnxscript"):  # which tell of every node
            logging.getLogger(name).setLevel(logging.WARNING)
        names = {"input_names": list(traced.inputs), "output_names": [traced.output.partition(" ")[0]]}
        options: dict[str, Any] = {**names, "dynamo": True, "external_data": False, "verbose": False}
        with replacing(file) as part:
            torch.onnx.export(program, f=part, **options)


@contextmanager
def _sizes_without_exceptions() -> Iterator[None]:
    """Trace for all sizes, 0 and 1 included, which PyTorch would else make graphs of their own."""
    import torch.fx.experimental._config as symbolic

    with symbolic.patch(  # type: ignore[attr-defined]  # made by its module
        backed_size_oblivious=True
    ):
        yield


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class ExportedSystem:
    """Graphs of a system, ready to run: the denoiser as a module, the others by name."""

    denoiser: "ExportedDenoiser"
    graphs: Mapping[str, Graph]

    def decode(self, codec: Any, latent: Tensor) -> Tensor:
        """`[B, C, L]` to audio `[B, 1, L * hop]`; the phases of a codec of magnitudes are its own."""
        decoded = self.graphs["decoder"](latent)
        return codec.phase(decoded) if isinstance(codec, SpectralVAE) else decoded


class ExportedDenoiser(nn.Module):
    """Called as the denoiser that it was exported from, without accelerators' way into its layers.

    Args:
        graph: takes `names` in order.
        latent_channels: C.
    """

    is_exported = True

    def __init__(self, graph: Graph, names: Sequence[str], latent_channels: int, max_frames: int) -> None:
        super().__init__()
        self.latent_channels, self.max_frames = latent_channels, max_frames
        self._graph, self._names = graph, names

    def forward(
        self,
        noisy: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_mask: Tensor,
        visible: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """As `LatentTransformer.forward`; raises ValueError for a latent that is longer than the graph takes."""
        batch, _, frames = noisy.shape
        if frames > self.max_frames:
            raise ValueError(f"{frames} frames: this export takes {self.max_frames} at most (max_frames of its export)")
        if visible is None or hidden_mask is None:  # everything is hidden
            visible, hidden_mask = torch.zeros_like(noisy), noisy.new_ones(batch, frames, dtype=torch.bool)
        scale = None if guidance_scale is None else guidance_scale.expand(batch)
        given: dict[str, Any] = dict(noisy=noisy, timestep=timestep.float(), context=context, context_mask=context_mask)
        given |= dict(visible=visible, hidden_mask=hidden_mask, guidance_scale=scale)
        return self._graph(*(given[name] for name in self._names))


def load_graphs(directory: Path, denoiser: Any, codec: nn.Module, device: torch.device) -> ExportedSystem:
    """The graphs in `directory` of the system that `denoiser` and `codec` are of.

    Raises CheckpointError where they are of other weights or another device, or were altered, and DamagedFileError for
    a `system.json` that is none.
    """
    file = directory / GRAPHS_FILE
    info = read_json(file, _WHAT, _MEND)
    with reading(file, _WHAT, _MEND):
        made_by, names = (info["format"], info["backend"], info["device"]), tuple(info["graphs"]["denoiser"]["inputs"])
        hashes, max_frames = {"denoiser": info["model_hash"], "codec": info["codec_hash"]}, int(info["max_frames"])
    _check_origin(file, made_by, device)
    for name, module in (("denoiser", denoiser), ("codec", codec)):
        if hashes[name] != hash_module(module):
            raise CheckpointError(f"{file} is of another {name} than its system; {_MEND}")
    graphs = {name: _load(directory, entry, info["backend"], device) for name, entry in info["graphs"].items()}
    exported = ExportedDenoiser(graphs["denoiser"], names, denoiser.latent_channels, max_frames)
    adopt_hash(exported, hashes["denoiser"])  # calibrations of these weights hold for their graph
    return ExportedSystem(exported, graphs)


def _check_origin(file: Path, made_by: tuple[str, str, str], device: torch.device) -> None:
    file_format, backend, compiled_for = made_by
    if file_format != GRAPHS_FORMAT:
        raise CheckpointError(f"{file} is of format {file_format!r}, this version reads {GRAPHS_FORMAT!r}; {_MEND}")
    if backend == "aoti" and compiled_for != device.type:  # ONNX is compiled where it is loaded
        raise CheckpointError(f"{file} was compiled for {compiled_for}, not for {device.type}; export it there")


def _load(directory: Path, entry: Mapping[str, Any], backend: str, device: torch.device) -> Graph:
    file = directory / entry["file"]
    if not file.is_file() or hash_file(file) != entry["sha256"]:
        raise CheckpointError(f"{file} is missing or was altered after its export; {_MEND}")
    return _onnx_graph(file, device) if backend == "onnx" else _aoti_graph(file)


def _aoti_graph(file: Path) -> Graph:
    import torch._inductor as inductor

    package = inductor.aoti_load_package(str(file))

    def call(*inputs: Tensor) -> Tensor:
        output: Tensor = package(*(tensor.contiguous() for tensor in inputs))
        return output

    return call


def _onnx_graph(file: Path, device: torch.device) -> Graph:
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = (["CUDAExecutionProvider"] if device.type == "cuda" else []) + ["CPUExecutionProvider"]
    providers = [provider for provider in wanted if provider in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    names = [entry.name for entry in session.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        arrays = {name: tensor.numpy(force=True) for name, tensor in zip(names, inputs, strict=True)}
        (output,) = session.run(None, arrays)
        return torch.from_numpy(output).to(inputs[0].device)

    return call
