"""Components on disk: `model.safetensors` beside a `config.json` that says how to build the module.

A component's config is a plain mapping with Hydra's `_target_`. Configs may come from strangers, so only classes
of this package are built, and weights are only ever read as safetensors or with `weights_only`.
"""

import importlib
import pickle
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from foley.core.files import read_tensors, rounded_rows, write_json, write_tensors
from foley.core.ranges import RangeReader
from foley.core.reading import read_json, reading

ALLOWED_PACKAGES = (
    *("foley.models.", "foley.nn.", "foley.diffusion.", "foley.losses."),
    *("foley.metrics.extractors.", "foley.metrics.embedded."),
)
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
ROW_SCALES = ".row_scales"
"""Behind the name of a tensor that is stored as bytes: what one of them is worth, by the row."""

MOVED_MODULES = {
    "foley.diffusion.generate": "foley.diffusion.sampler",
    "foley.diffusion.types": "foley.diffusion.context",
    "foley.metrics.extractors.embedded": "foley.metrics.embedded.network",
    "foley.models.dit.backbone": "foley.models.dit.model",
    "foley.models.dit.block": "foley.models.dit.model",
    "foley.models.dit.conditions": "foley.models.dit.model",
    "foley.models.dit.output": "foley.models.dit.model",
    "foley.models.dit.transformer": "foley.models.dit.model",
    "foley.models.mel_codec.autoencoder": "foley.models.codec.mel_vae",
    "foley.models.mel_codec.codec": "foley.models.codec.mel_codec",
    "foley.models.mel_codec.discriminator": "foley.models.codec.discriminators",
    "foley.models.mel_codec.mel_vae": "foley.models.codec.mel_vae",
    "foley.models.mel_codec.spectrogram": "foley.models.codec.mel_vae",
    "foley.models.normaliser": "foley.models.codec.normaliser",
    "foley.models.text.cache": "foley.models.text.frozen_t5",
    "foley.models.text.tokenizer": "foley.models.text.small",
    "foley.models.vae.base": "foley.models.codec.base",
    "foley.models.vae.bottleneck": "foley.models.codec.base",
    "foley.models.vae.decoder": "foley.models.codec.waveform_vae",
    "foley.models.vae.discriminator": "foley.models.codec.discriminators",
    "foley.models.vae.encoder": "foley.models.codec.waveform_vae",
    "foley.models.vae.fast_decoder": "foley.models.codec.fast_decoder",
    "foley.models.vae.spectral_vae": "foley.models.codec.spectral_vae",
    "foley.models.vae.waveform_vae": "foley.models.codec.waveform_vae",
    "foley.models.vocoder.anti_aliased": "foley.models.codec.vocoder",
    "foley.models.vocoder.bigvgan": "foley.models.codec.vocoder",
    "foley.models.vocoder.discriminator": "foley.models.codec.discriminators",
    "foley.nn.convnext": "foley.nn.conv",
    "foley.nn.linear": "foley.nn.feedforward",
    "foley.nn.norm": "foley.nn.adaln",
    "foley.nn.winograd": "foley.models.codec.fast_decoder",
}
"""Modules of version 0.1 to where their classes are now: configs saved with older weights name them."""

_ASSET = "asset:"
_A_CONFIG = "the config of a component"
_PLAIN = (bool, int, float, str, tuple, list, type(None))
# What the unpickler raises, depending on the bytes, on a file that is cut short or no pickle at all.
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, LookupError, TypeError, AttributeError, struct.error),
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, trusted or matched with its config."""


def current_config(config: Any) -> Any:
    """A saved config whose targets are named as they are today; everything else is as it was."""
    if isinstance(config, Mapping):
        return {
            key: _current_target(value) if key == "_target_" else current_config(value) for key, value in config.items()
        }
    return [current_config(value) for value in config] if isinstance(config, list | tuple) else config


def _current_target(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    return f"{MOVED_MODULES[module]}.{name}" if module in MOVED_MODULES else target


def check_targets(config: Any, source: str) -> None:
    """Refuse a config that could build or resolve anything but this package's component classes.

    Raises CheckpointError. Interpolations are refused too: they would be resolved after this check.
    """
    if isinstance(config, Mapping):
        if "_target_" in config:
            _require_component_class(str(config["_target_"]), source)
        for value in config.values():
            check_targets(value, source)
    elif isinstance(config, list | tuple):
        for value in config:
            check_targets(value, source)
    elif isinstance(config, str) and "${" in config:
        raise CheckpointError(
            f"{source}: refusing the interpolation {config!r}; a checkpoint's config holds plain values"
        )


def _require_component_class(target: str, source: str) -> None:
    """Functions and re-exported modules are no components: the target must be a class that this package defines."""
    if component_class(target) is None:
        raise CheckpointError(
            f"{source}: refusing to build `_target_: {target}`; a checkpoint's config may only name classes under "
            f"{', '.join(ALLOWED_PACKAGES)}"
        )


def component_class(target: str) -> type | None:
    """The class that a config's `_target_` names, by whichever module; None where it is none of our components'."""
    module_name, _, name = target.rpartition(".")
    if not f"{module_name}.".startswith(ALLOWED_PACKAGES):
        return None
    try:
        found = vars(importlib.import_module(module_name)).get(name)
    except ModuleNotFoundError:
        return None
    return found if isinstance(found, type) and f"{found.__module__}.".startswith(ALLOWED_PACKAGES) else None


def written_out(config: Any) -> Any:
    """A component's config with the plain options that it leaves to its class: the two build the same component.

    >>> written_out({"_target_": "foley.models.dit.masking.SpanMask", "partial_probability": 0.5})["ratio"]
    [0.25, 1.0]
    """
    if not isinstance(config, Mapping):
        return list(config) if isinstance(config, tuple) else config
    component = component_class(str(config.get("_target_", "")))
    defaults = signature(component).parameters.values() if component else ()
    plain = {option.name: option.default for option in defaults if isinstance(option.default, _PLAIN)}
    return {key: written_out(value) for key, value in {**plain, **config}.items()}


def build_component(config: Mapping[str, Any], source: str = "config") -> Any:
    """Instantiate a component from its plain config after checking every target in it."""
    check_targets(config, source)
    return instantiate(dict(config), _convert_="all")


def rebuild_component(config: Mapping[str, Any], source: str) -> Any:
    """The component of a config that was read from `source`, untrained; raises CheckpointError, which names it."""
    try:
        with reading(source, _A_CONFIG):
            target = str(config["_target_"])
            built = build_component(config, source)
    except InstantiationException as error:
        raise CheckpointError(f"{source} does not describe a component that can be built: {error.__cause__}") from error
    if not isinstance(built, component_class(target) or ()):
        raise CheckpointError(f"{source} describes no component but {type(built).__name__}")
    return built


@dataclass(frozen=True)
class StateComparison:
    """A saved state dict beside a module's own: the keys that both have, and a line for each of unequal shape."""

    common: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    @property
    def complaints(self) -> list[str]:
        """A line for each key on which the two disagree; empty where the save fits exactly."""
        lines = [f"missing in the checkpoint: {key}" for key in self.missing]
        return lines + [f"unexpected in the checkpoint: {key}" for key in self.unexpected] + self.reshaped


def compare_states(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> StateComparison:
    """Compare the names and shapes of a saved state dict with a module's `own`."""
    common = sorted(set(own) & set(saved))
    reshaped = [
        f"shape of {key}: {tuple(saved[key].shape)} in the checkpoint, {tuple(own[key].shape)} in the model"
        for key in common
        if own[key].shape != saved[key].shape
    ]
    return StateComparison(common, sorted(set(own) - set(saved)), sorted(set(saved) - set(own)), reshaped)


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Load `state` into `module`, strictly; the error lists the keys and shapes that disagree.

    Args:
        assign: adopt the tensors themselves instead of copying their values.
    """
    if complaints := compare_states(state, module.state_dict()).complaints:
        raise CheckpointError(
            "\n  ".join([f"{source} does not fit {type(module).__name__}:", *complaints])
            + "\nUse the config saved with the weights."
        )
    module.load_state_dict(state, assign=assign)


def save_component(
    module: nn.Module,
    config: Mapping[str, Any],
    directory: Path,
    dtype: torch.dtype | None = None,
    assets: Mapping[str, Path] | None = None,
) -> None:
    """Write `module` and its plain `config` into `directory`.

    Args:
        dtype: store floating tensors in this type (half precision for shipping); None keeps them. int8 is a byte for
            each weight of a matrix or kernel, by the row, and half precision for all else.
        assets: config key to file; each file is copied along and the key then points into the directory.
    """
    check_targets(config, "config")
    directory.mkdir(parents=True, exist_ok=True)
    portable = dict(config)
    for key, file in (assets or {}).items():
        if file.resolve() != (directory / file.name).resolve():
            shutil.copyfile(file, directory / file.name)
        portable[key] = _ASSET + file.name
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        state |= _stored(name, tensor.detach().cpu(), dtype)
    write_tensors(directory / WEIGHTS_FILE, state)
    write_json(directory / CONFIG_FILE, portable)


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A tensor by the names and in the types of `save_component`'s file."""
    if dtype is None or not tensor.is_floating_point():
        return {name: tensor}
    if dtype != torch.int8:
        return {name: tensor.to(dtype)}
    if tensor.ndim < 2:
        return {name: tensor.half()}
    levels, scales = rounded_rows(tensor)
    return {name: levels, name + ROW_SCALES: scales}


def _widened_rows(tensor: Tensor, scales: Tensor | None) -> Tensor:
    """What `rounded_rows` has made bytes of; other tensors as they are."""
    return tensor if scales is None else tensor.float() * scales.view(-1, *[1] * (tensor.ndim - 1))


def read_config(directory: Path) -> dict[str, Any]:
    """The config in `directory`, with `asset:` values turned into paths inside it.

    Raises CheckpointError where there is none, and DamagedFileError.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {directory} is not a component directory")
    with reading(path, _A_CONFIG):
        config: dict[str, Any] = dict(current_config(read_json(path, _A_CONFIG)))
    for key, value in config.items():
        if isinstance(value, str) and value.startswith(_ASSET):
            # Absolute, for a module takes a relative path from the checkout; this one is from the current folder.
            config[key] = str(directory.absolute() / Path(value.removeprefix(_ASSET)).name)
    return config


def load_component(directory: Path) -> Any:
    """Build the module described in `directory`, load its weights as float32, and put it in eval mode.

    Raises CheckpointError where the two do not fit, DamagedFileError, and FileNotFoundError.
    """
    module = rebuild_component(read_config(directory), str(directory / CONFIG_FILE))
    stored = read_tensors(directory / WEIGHTS_FILE, "the weights of a component")
    state = {
        name: tensor.float() if tensor.is_floating_point() else _widened_rows(tensor, stored.get(name + ROW_SCALES))
        for name, tensor in stored.items()
        if not name.endswith(ROW_SCALES)
    }
    load_state(module, state, str(directory / WEIGHTS_FILE))
    return module.eval()


def read_pickle(path: Path, mmap: bool = False) -> Any:
    """What `torch.save` wrote, read without unpickling code; raises CheckpointError where that is not possible.

    Args:
        mmap: leave tensors on disk until they are used, where the format allows it. For files that nobody writes to:
            one that is overwritten in place ends the process that has it mapped.
    """
    return _load(path, mmap=mmap and zipfile.is_zipfile(path))


def describe_pickle(path: Path) -> Any:
    """As `read_pickle`, with tensors that have shapes and types but no values: `filled` reads those that are wanted.

    A training checkpoint is several times the weights that most of its readers want. One of an old format, which says
    nothing of where a tensor lies, is read whole.
    """
    if not zipfile.is_zipfile(path):
        return read_pickle(path)
    with FakeTensorMode():
        return _load(path)


def filled(value: Any, path: Path | None) -> Any:
    """`value`, of what `describe_pickle` gave of `path`, with the values of its tensors; what has values keeps them.

    Raises CheckpointError where the file has become shorter.
    """
    if path is None:
        return value
    return _filled(value, _Storages(path))


class _Storages(dict[int, torch.UntypedStorage]):
    """What tensors keep their values in, by where it begins in the file; tensors that share one go on sharing it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._reader = path, RangeReader(str(path.parent))

    def read(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        offset = int(storage._checkpoint_offset or 0)  # known to PyTorch alone
        if offset not in self:
            try:
                content = self._reader.read(self._path.name, offset, storage.nbytes())
            except EOFError as error:
                raise CheckpointError(f"{error}: it has become shorter while it was read; read it again") from error
            self[offset] = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
        return self[offset]


def _filled(value: Any, storages: _Storages) -> Any:
    if isinstance(value, FakeTensor):
        place = value.storage_offset(), value.shape, value.stride()
        storage = storages.read(value.untyped_storage()) if value.numel() else torch.UntypedStorage(0)
        return torch.empty(0, dtype=value.dtype).set_(storage, *place)  # type: ignore[call-overload]
    if isinstance(value, Mapping):
        return {name: _filled(entry, storages) for name, entry in value.items()}
    return type(value)(_filled(entry, storages) for entry in value) if type(value) in (list, tuple) else value


def _load(path: Path, **options: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} cannot be read safely (weights_only), it is damaged or of another kind: {reason}"
        ) from error
