"""Pipelines of diffusers that make audio: their folders, what a family says of itself, and the families by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.utils import is_accelerate_available
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from torch import Tensor, nn
from torch.nn.functional import pad

from foley.accel.layers import declare_cacheable_layers
from foley.core.components import CheckpointError
from foley.core.config import PIPELINE_INDEX as INDEX
from foley.core.hub import Hub
from foley.core.numbers import check_choice
from foley.core.reading import read_json, reading
from foley.diffusion.sampler import Progress

_WANTED = [INDEX, "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"]
_UNWANTED = ["*.fp16.*"]
_MADE_BY_ITSELF = {"LongCatAudioDiTPipeline": "scheduler"}
"""A component that a pipeline names in its index, but stores only where it is not the usual one."""


def pipeline_folder(hub: Hub, repository: str) -> Path:
    """The folder of a pipeline, downloaded where necessary; raises CheckpointError where a file cannot be had.

    Args:
        repository: on the hub; or the folder itself.
    """
    if (Path(repository) / INDEX).is_file():
        return _whole(Path(repository), "its pipeline was saved with it")
    folder = hub.file(repository, INDEX).parent
    absent = _absent(folder)
    if absent and hub.directory is None:
        hub.require_network(repository, INDEX, absent)
        try:
            # Not always the folder of the index: the repository may have changed since that was cached.
            folder = Path(snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
        except (HTTPError, OSError) as error:
            raise CheckpointError(f"the download of {repository} broke off: {error}") from error
    return _whole(folder, f"it must be there as on https://huggingface.co/{repository}")


def _whole(folder: Path, mend: str) -> Path:
    if absent := _absent(folder):
        raise CheckpointError(f"{folder / absent} does not exist, but {folder / INDEX} names it: {mend}")
    return folder


def _absent(folder: Path) -> str | None:
    """The first component file that the index asks for and the folder lacks."""
    with reading(folder / INDEX, "the index of a pipeline", "download it again"):
        index = read_json(folder / INDEX, "the index of a pipeline", "download it again")
        components = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}
    components.pop(_MADE_BY_ITSELF.get(index.get("_class_name"), ""), None)
    wanted = [f"{name}/{file}" for name, kind in components.items() for file in _files_of(kind)]
    return next((file for file in wanted if not any(folder.glob(file))), None)


def _files_of(kind: str) -> tuple[str, ...]:
    """Patterns of what a component of this class is stored as."""
    if kind.endswith("Scheduler"):
        return ("scheduler_config.json",)
    # A model of audio tokens (ACE-Step's) is stored as any other.
    if "Token" in kind and not kind.startswith("AceStep"):
        return ("tokenizer_config.json",)
    if kind.endswith("FeatureExtractor"):
        return ("preprocessor_config.json",)
    return ("config.json", "*.safetensors")


class AudioPipeline(ABC):
    """A family of pipelines of diffusers: latents are asked for, and decoded, apart from each other.

    What a class says of itself is known before any of its pipelines is loaded.
    """

    takes_solvers: ClassVar[bool] = False
    """Whether solvers of ours sample it, beside its own."""
    takes_negative_prompt: ClassVar[bool] = True
    takes_lyrics: ClassVar[bool] = False
    edits: ClassVar[bool] = False
    """Whether it has `inpaint`."""
    varies: ClassVar[bool] = False
    """Whether it has `vary`."""
    trains: ClassVar[bool] = False
    """Whether adapters of it are trained here (`foley.system.published.training`)."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> "AudioPipeline":
        """From a folder with a `model_index.json`; `options` are those of `from_pretrained`."""
        import diffusers

        # The pipelines take seconds to import, so only who loads one does.
        kind = read_json(folder / INDEX, "the index of a pipeline", "download it again")["_class_name"]
        return cls(getattr(diffusers, kind).from_pretrained(folder, **options))

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = self.pipeline.transformer
        return module

    @property
    @abstractmethod
    def sample_rate_hz(self) -> int: ...

    @property
    @abstractmethod
    def max_duration_seconds(self) -> float:
        """What the model can make at all."""

    @abstractmethod
    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        """One latent per prompt, of clips as long or longer; `options` are those of the pipeline's call.

        `generator` is a list, one for each prompt.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Audio `[B, channels, T or more]`."""

    def level(self, audio: Tensor) -> Tensor:
        """Decoded audio at the level at which the pipeline gives it; an edit keeps that of its recording instead."""
        return audio

    @property
    def channels(self) -> int:
        """Of the audio."""
        return 1

    @property
    def is_distilled(self) -> bool:
        """Whether it was distilled to few steps."""
        return False

    def inpaint(self, prompts: Sequence[str], recording: Tensor, start: int, end: int, **options: Any) -> Tensor:
        """Latents, one per prompt, of the recording `[channels, T]` with samples `[start, end)` made anew."""
        raise NotImplementedError

    def vary(self, prompts: Sequence[str], recording: Tensor, strength: float, **options: Any) -> Tensor:
        """Latents, one per prompt, of variations of the recording `[channels, T]`."""
        raise NotImplementedError

    def check_guidance(self, scale: float, edits: bool) -> None:  # noqa: B027
        """Raises ValueError for a scale that the loaded pipeline does not guide with; most take any."""

    @contextmanager
    def following(self, progress: Progress) -> Iterator[None]:
        """The pipeline's steps go to `progress` inside, in the place of its own bar; what that raises ends the run."""

        def bar(iterable: Any = None, total: int | None = None) -> Any:
            if iterable is None:
                return _Steps(progress, total or 0)
            return (step for _, step in zip(progress(range(len(iterable))), iterable, strict=False))

        self.pipeline.progress_bar = bar
        try:
            yield
        finally:
            del self.pipeline.progress_bar


class _Steps:
    """What a pipeline of diffusers asks of its bar."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._steps = iter(progress(range(total)))

    def __enter__(self) -> Self:
        next(self._steps, None)
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, count: int = 1) -> None:
        next(self._steps, None)


class OfOobleck(AudioPipeline):
    """Base of the families whose codec, an `AutoencoderOobleck` or like one, says its rate and channels."""

    @property
    def sample_rate_hz(self) -> int:
        return int(self.pipeline.vae.config.sampling_rate)

    @property
    def channels(self) -> int:
        return int(self.pipeline.vae.config.audio_channels)

    @property
    def hop_samples(self) -> int:
        """Samples of a latent frame."""
        return int(self.pipeline.vae.hop_length)

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.vae.config.decoder_input_channels)

    def encode(self, audio: Tensor, generator: torch.Generator | None) -> Tensor:
        """A latent `[B, C, L]` of `[B, channels, T]`: drawn with `generator`, or the mean without one."""
        posterior = self.pipeline.vae.encode(audio).latent_dist
        latent: Tensor = posterior.mean if generator is None else posterior.sample(generator)
        return latent


def each_prompt(
    make: Callable[..., Tensor], prompts: Sequence[str], generator: Sequence[Any], **options: Any
) -> Tensor:
    """`make(prompts, generator=..., **options)` for neighbours of one prompt: of a pipeline that reads the padding.

    Prompts of other lengths in the same batch would change an item.
    """
    rows = []
    for _, group in groupby(zip(prompts, generator, strict=True), key=lambda pair: pair[0]):
        alike = list(group)
        rows.append(make([prompt for prompt, _ in alike], generator=[own for _, own in alike], **options))
    return torch.cat(rows)


def each_length(predict: Callable[..., Tensor], noisy: Tensor, timestep: Tensor, text: Tensor, valid: Tensor) -> Tensor:
    """`predict(noisy, timestep, text)` for items of one length of text at a time, for the same reason.

    Args:
        text, valid: `[B, S, D]`, and which of it is no padding `[B, S]`; padding comes last.
    """
    lengths = valid.sum(dim=1)
    groups = [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]
    parts = [predict(noisy[rows], timestep[rows], text[rows, : int(lengths[rows[0]])]) for rows in groups]
    return torch.cat(parts)[torch.cat(groups).argsort()]


def stacked(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts `[1, S, D]` of several lengths as one `[B, S, D]`, padded at the end, and which is valid `[B, S]`."""
    longest = max(row.shape[1] for row in rows)
    valid = torch.tensor([[True] * row.shape[1] + [False] * (longest - row.shape[1]) for row in rows])
    text = torch.cat([pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])
    return text, valid.to(text.device)


def whole_frames(recording: Tensor, hop_samples: int) -> Tensor:
    """`[channels, T]` with silence behind it, up to a whole number of latent frames."""
    return pad(recording, (0, -recording.shape[-1] % hop_samples))


def decode_each(vae: Any, latents: Tensor) -> Tensor:
    """`[B, channels, T]` of latents `[B, C, L]`, one by one: at full length an item takes gigabytes."""
    return torch.cat([vae.decode(latent[None].to(vae.dtype)).sample for latent in latents])


_FAMILIES = {
    "StableAudioPipeline": "stable_audio.StableAudio",
    "StableAudio3Pipeline": "stable_audio_3.StableAudio3",
    "AceStepPipeline": "ace_step.AceStep",
    "LongCatAudioDiTPipeline": "longcat.LongCat",
    "AudioLDMPipeline": "audioldm.AudioLDM",
    "AudioLDM2Pipeline": "audioldm.AudioLDM2",
    "MusicLDMPipeline": "audioldm.MusicLDM",
    "TangoFluxPipeline": "tangoflux.TangoFlux",
}
"""By the class that `model_index.json` names."""


@dataclass(frozen=True)
class PublishedPipeline:
    """A pipeline on the hub, or in a folder.

    Args:
        repository: on the hub; or a folder with a `model_index.json`.
        pipeline: its class, such as "StableAudioPipeline"; ValueError for one of no family here.
        dtype: of the weights.
        cacheable_layers: as `foley.accel.layers.declare_cacheable_layers` takes them; None for those that are found.
    """

    repository: str
    pipeline: str
    dtype: str = "float32"
    cacheable_layers: Mapping[str, str | None] | None = None

    def __post_init__(self) -> None:
        check_choice("published.pipeline", self.pipeline, _FAMILIES)

    @property
    def family(self) -> type[AudioPipeline]:
        module, _, name = _FAMILIES[self.pipeline].rpartition(".")
        family: type[AudioPipeline] = getattr(import_module(f"foley.system.published.{module}"), name)
        return family

    def load(self, hub: Hub, cache_dir: Path) -> AudioPipeline:
        """In eval mode on the CPU; raises CheckpointError at once where a file is neither here nor to be had."""
        audio = self.open(hub)
        if self.cacheable_layers:
            declare_cacheable_layers(audio.denoiser, self.cacheable_layers)
        return audio

    def open(self, hub: Hub) -> AudioPipeline:
        """As published; `load` declares the layers too."""
        folder = pipeline_folder(hub, self.repository)
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "local_files_only": True}
        if not is_accelerate_available():
            options["low_cpu_mem_usage"] = False
        try:
            return self.family.load(folder, options)
        except OSError as error:
            raise CheckpointError(f"{folder} does not hold a whole {self.repository}: {error}") from error
