"""Adapters on disk, and on the modules of a system: loaded, scaled, stacked, merged, unmerged and removed.

A folder of adapters holds one in `peft`'s own format for each component that it adapts, `denoiser/` and perhaps
`text/`, each an `adapter_config.json` beside its `adapter_model.safetensors`, which `peft` loads by itself; and
`adapter.json`: the hashes of the weights that they were trained on, the captions, and the hashes of the files.

At a scale s the product B A counts s times; of a DoRA the magnitude m goes that far, too, from the norms of W, so that
0 is the weight as it was. LoRAs on one weight add up; a DoRA stretches the rows of what those before it have made.
Merged or not, the result is the same.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from foley.core.components import CheckpointError
from foley.core.files import read_tensors, write_json, write_tensors
from foley.core.hashing import hash_file, hash_module
from foley.core.numbers import NumberRange
from foley.core.reading import read_json, reading
from foley.models.lora import adapted_layers, put_layers
from foley.system.system import System

ADAPTER_FILE, ADAPTER_FORMAT = "adapter.json", "foley-adapter/1"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as `peft` names them
ADAPTED = ("denoiser", "text")
_PREFIX = "base_model.model."  # which `peft` puts before the names of what it saves
_AN_ADAPTER, _AGAIN = "an adapter", "give another one, or train it again (foley train experiment=lora)"
_SCALE = NumberRange()
_READ = ("r", "lora_alpha", "use_dora", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter to take, and how.

    Args:
        path: its folder.
        scale: how much of it; 1 is as trained, 0 is nothing, and what is negative leads away from it.
        any_base: take it although it was trained on other weights than these.
    """

    path: str
    scale: float = 1.0
    any_base: bool = False

    @classmethod
    def of(cls, given: "AdapterChoice | Mapping[str, Any] | str | Path", name: str = "adapters") -> Self:
        """From an entry of `adapters=`, a path or a mapping; raises ValueError, which says what it takes.

        >>> AdapterChoice.of({"path": "zorble", "scale": 0.8})
        AdapterChoice(path='zorble', scale=0.8, any_base=False)
        """
        if isinstance(given, cls):
            return given
        options = {"path": str(given)} if isinstance(given, str | Path) else given
        if not isinstance(options, Mapping) or "path" not in options or set(options) - {"path", "scale", "any_base"}:
            raise ValueError(f"{name}={given}: give {{path: FOLDER, scale: 0.8}}, and any_base: true to insist")
        scale, any_base = options.get("scale", 1.0), options.get("any_base", False)
        _SCALE.check(f"{name}.scale", scale)
        return cls(str(options["path"]), float(scale), bool(any_base))


Adapters = Sequence[AdapterChoice | Mapping[str, Any] | str | Path]
"""As `adapters=` takes them."""


def adapter_choices(given: Adapters) -> list[AdapterChoice]:
    """Raises ValueError, which names the entry, for one that is none."""
    if isinstance(given, str | Path | Mapping):
        raise ValueError(f"adapters={given}: give a list, as adapters=[{{path: FOLDER, scale: 0.8}}]")
    return [AdapterChoice.of(entry, f"adapters[{index}]") for index, entry in enumerate(given)]


@dataclass(frozen=True)
class AdapterFiles:
    """What a folder of adapters holds: of each component the options of its `LoraConfig` and its tensors, and the rest.

    `base` has the hash of each component that was trained on, empty for a folder that only `peft` has written.
    """

    parts: Mapping[str, tuple[dict[str, Any], dict[str, Tensor]]]
    base: Mapping[str, str] = field(default_factory=dict)
    captions: Sequence[str] = ()
    sha256: str = ""

    @classmethod
    def read(cls, path: str | Path) -> "AdapterFiles":
        """Raises CheckpointError where there is none, or one that was altered; one of `peft` alone is a denoiser's."""
        folder = Path(path).expanduser()
        if (folder / PEFT_CONFIG).is_file():
            return cls({"denoiser": _read_part(folder)}, sha256=hash_file(folder / PEFT_WEIGHTS))
        file = folder / ADAPTER_FILE
        if not file.is_file():
            raise CheckpointError(f"adapters={path}: neither {ADAPTER_FILE} nor {PEFT_CONFIG} is there; {_AGAIN}")
        with reading(file, _AN_ADAPTER, _AGAIN):
            info = read_json(file, _AN_ADAPTER, _AGAIN)
            if info["format"] != ADAPTER_FORMAT:
                raise CheckpointError(f"{file}: format {info['format']!r} is not {ADAPTER_FORMAT!r}; {_AGAIN}")
            for name, expected in dict(info["files_sha256"]).items():
                if not (folder / name).is_file() or hash_file(folder / name) != expected:
                    raise CheckpointError(
                        f"{folder / name} is missing, or not the file that {file} describes; {_AGAIN}"
                    )
            base, captions = dict(info["base"]), [str(caption) for caption in info["captions"]]
        if foreign := set(base) - set(ADAPTED):
            raise CheckpointError(f"{file} adapts {', '.join(sorted(foreign))}: adapters are of {', '.join(ADAPTED)}")
        return cls({name: _read_part(folder / name) for name in base}, base, captions, hash_file(file))


def _read_part(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = folder / PEFT_CONFIG
    with reading(file, _AN_ADAPTER, _AGAIN):
        stored = dict(read_json(file, _AN_ADAPTER, _AGAIN))
        if stored["peft_type"] != "LORA" or stored.get("bias", "none") != "none" or stored.get("modules_to_save"):
            raise CheckpointError(f"{file} is of another kind than LoRA and DoRA of weights alone; give one of these")
        options = {name: stored[name] for name in _READ if stored.get(name) is not None}
    tensors = read_tensors(folder / PEFT_WEIGHTS, _AN_ADAPTER, _AGAIN)
    return options, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def save_adapters(
    folder: Path,
    modules: Mapping[str, nn.Module],
    base: Mapping[str, str],
    captions: Sequence[str] = (),
    states: Mapping[str, Mapping[str, Tensor]] | None = None,
    **facts: Any,
) -> None:
    """Write the adapters of `modules`, by component, as a folder; `adapter.json` comes last.

    Args:
        base: the hash of each component before it was adapted.
        captions: by which what they have learnt is asked for.
        states: other values of the modules' tensors, such as averages.
        facts: what else `adapter.json` is to say.
    """
    from peft import get_peft_model_state_dict

    names = []
    for part, module in modules.items():
        state = None if states is None else dict(states[part])
        tensors = get_peft_model_state_dict(module, state, save_embedding_layers=False)
        plain = {f"{_PREFIX}{name}": tensor.detach().float().cpu() for name, tensor in tensors.items()}
        write_tensors(folder / part / PEFT_WEIGHTS, plain, {"format": "pt"})
        config: Any = module.peft_config
        write_json(folder / part / PEFT_CONFIG, _plain(config["default"].to_dict()))
        names += [f"{part}/{PEFT_CONFIG}", f"{part}/{PEFT_WEIGHTS}"]
    hashes = {name: hash_file(folder / name) for name in names}
    info = {"format": ADAPTER_FORMAT, "base": dict(base), "captions": list(captions), **facts, "files_sha256": hashes}
    write_json(folder / ADAPTER_FILE, info)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | list | tuple):
        return sorted(map(str, value)) if isinstance(value, set) else [_plain(entry) for entry in value]
    return value if isinstance(value, bool | int | float | type(None)) else str(getattr(value, "value", value))


class AdapterStack:
    """Adapters on the modules of a system, in place.

    Loaded ones are layers around layers, which every call runs. Merged, they are in the weights, and the modules are
    what they were but for their values: so accelerators, 8 bits, compiling, counting and export know nothing of them.
    What the weights were is kept meanwhile, so that `unmerge` and `remove` bring back each bit of them.

    Args:
        modules: by component, "denoiser" and, where it can be adapted, "text".
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._base: dict[str, str] = {}  # hashes of the modules as they were
        self._trains: list[tuple[nn.Parameter, bool]] = []  # which of their parameters did
        self._loaded: list[tuple[AdapterChoice, AdapterFiles]] = []
        # While merged: the layers that were taken out, what the weights below them were, and what `peft` notes.
        self._taken: dict[str, dict[str, Any]] = {}
        self._weights: list[tuple[Tensor, Tensor]] = []
        self._notes: dict[str, Any] = {}

    @property
    def captions(self) -> list[str]:
        """By which what the loaded ones have learnt is asked for."""
        return [caption for _, files in self._loaded for caption in files.captions]

    def describe(self) -> list[dict[str, Any]]:
        """What the JSON of each clip says of the loaded ones."""
        return [{"path": choice.path, "scale": choice.scale, "sha256": files.sha256} for choice, files in self._loaded]

    def use(self, choices: Sequence[AdapterChoice]) -> None:
        """Have just these, merged, in the place of any before; on an error none. Raises as `load` does."""
        self.remove()
        try:
            for choice in choices:
                self.load(choice)
            self.merge()
        except BaseException:
            self.remove()
            raise

    @torch.no_grad()
    def load(self, choice: AdapterChoice) -> None:
        """Put one more around the layers, with all loaded before it; what was merged is unmerged.

        Raises CheckpointError where it cannot be read, adapts what is not there, or was trained on other weights.
        """
        files = AdapterFiles.read(choice.path)
        self.unmerge()
        if not self._loaded:
            self._base = {name: hash_module(module) for name, module in self._modules.items()}
            self._trains = [(p, p.requires_grad) for module in self._modules.values() for p in module.parameters()]
        self._check(choice, files)
        name = f"adapter_{len(self._loaded)}"
        self._loaded.append((choice, files))  # first, so that one that fails half-way is removed with the others
        for part, (options, tensors) in files.parts.items():
            _inject(self._modules[part], name, options, tensors, choice)

    def _check(self, choice: AdapterChoice, files: AdapterFiles) -> None:
        if absent := set(files.parts) - set(self._modules):
            raise CheckpointError(f"adapters={choice.path} adapts {', '.join(absent)}, which this system has none of")
        differing = [part for part in files.parts if files.base.get(part) != self._base[part]]
        if differing and not choice.any_base:
            part = differing[0]
            trained = f"the {part} {files.base[part][:12]}" if part in files.base else f"a {part} that it does not name"
            raise CheckpointError(
                f"adapters={choice.path} was trained on {trained}, and this system's is {self._base[part][:12]}; give "
                "the system that it was trained on, or any_base: true beside its path, to take it all the same"
            )

    @torch.no_grad()
    def merge(self) -> None:
        """Add the loaded ones to the weights, and take their layers out."""
        if self._taken:
            return
        for part, module in self._modules.items():
            layers = adapted_layers(module)
            for layer in layers.values():
                weight = layer.get_base_layer().weight
                self._weights.append((weight, weight.detach().clone()))
                weight.copy_(_merged(layer))  # counted by PyTorch, unlike a write to `.data`
            if layers:
                self._taken[part], self._notes[part] = layers, module.peft_config
                put_layers(module, {name: layer.get_base_layer() for name, layer in layers.items()})
                del module.peft_config

    @torch.no_grad()
    def unmerge(self) -> None:
        """Bring back each bit of the weights, and the layers around them."""
        for weight, before in self._weights:
            weight.copy_(before)
        for part, layers in self._taken.items():
            put_layers(self._modules[part], layers)
            self._modules[part].peft_config = self._notes[part]
        self._weights, self._taken, self._notes = [], {}, {}

    def remove(self) -> None:
        """Bring the modules back to what they were: weights, layers, and which of their parameters train."""
        self.unmerge()
        for module in self._modules.values():
            layers = adapted_layers(module)
            put_layers(module, {name: layer.get_base_layer() for name, layer in layers.items()})
            vars(module).pop("peft_config", None)
        for parameter, trains in self._trains:
            parameter.requires_grad_(trains)
        self._loaded, self._trains = [], []


def adapted(system: System, choices: Sequence[AdapterChoice]) -> System:
    """`system` with adapters in its weights, for good, and their captions among those that it knows.

    Raises as `AdapterStack.load` does.
    """
    parts = [name for name in ADAPTED if getattr(system.modules[name], "trainable", True)]
    stack = AdapterStack({name: system.modules[name] for name in parts})
    stack.use(choices)
    return replace(system, captions=[*system.captions, *stack.captions])


def _inject(
    module: nn.Module, name: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], choice: AdapterChoice
) -> None:
    """Put an adapter around the layers of `module`, beside those that are there, at its scale."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Already found a `peft_config` attribute.*")  # of those before it
            inject_adapter_in_model(LoraConfig(**options), module, name)
        result: Any = set_peft_model_state_dict(module, dict(tensors), name)
    except (ValueError, RuntimeError) as error:  # no such layer, or of another shape
        raise CheckpointError(f"adapters={choice.path} does not fit {type(module).__name__}: {error}") from error
    own = [key for key in result.missing_keys if f".{name}" in key]
    if own or result.unexpected_keys:
        wrong = ", ".join([*own, *result.unexpected_keys][:3])
        raise CheckpointError(f"adapters={choice.path} does not fit {type(module).__name__}: {wrong}, ...")
    for layer in adapted_layers(module).values():
        layer.set_adapter([one for one in layer.lora_A])
        layer.set_scale(name, choice.scale)
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name].weight
            norms = layer.get_base_layer().weight.norm(dim=1).to(magnitude)
            magnitude.copy_(norms + choice.scale * (magnitude - norms))
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def _merged(layer: Any) -> Tensor:
    """The weight of a layer with its adapters in it, as `peft` merges them, one upon the other."""
    weight, before = layer.get_base_layer().weight, layer.get_base_layer().weight.data
    layer.merge(safe_merge=True)  # into a copy, which takes the place of the weight's values
    merged: Tensor = weight.data
    weight.data = before
    layer.merged_adapters.clear()
    return merged
