"""Pipelines of diffusers that make audio: their folders, and what each family says of itself."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.utils import is_accelerate_available
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from torch import Tensor, nn
from torch.nn.functional import pad

from foley.accel.layers import declare_cacheable_layers
from foley.core.components import CheckpointError
from foley.core.hub import Hub
from foley.core.reading import read_json, reading
from foley.core.seeding import torch_generator
from foley.diffusion.context import Accelerator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import CosineProcess
from foley.diffusion.sampler import Progress, sample
from foley.diffusion.schedulers import draw_noise
from foley.diffusion.solver import Solver

INDEX = "model_index.json"
_WANTED = [INDEX, "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"]
_UNWANTED = ["*.fp16.*"]


def pipeline_folder(hub: Hub, repository: str) -> Path:
    """The folder of a pipeline, downloaded where necessary; raises CheckpointError where a file cannot be had."""
    folder = hub.file(repository, INDEX).parent
    absent = _absent(folder)
    if absent and hub.directory is None:
        hub.require_network(repository, INDEX, absent)
        try:
            # Not always the folder of the index: the repository may have changed since that was cached.
            folder = Path(snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
        except (HTTPError, OSError) as error:
            raise CheckpointError(f"the download of {repository} broke off: {error}") from error
        absent = _absent(folder)
    if absent:
        raise CheckpointError(
            f"{folder / absent} does not exist, but {folder / INDEX} names it: "
            f"it must be there as on https://huggingface.co/{repository}"
        )
    return folder


def _absent(folder: Path) -> str | None:
    """The first component file that the index asks for and the folder lacks."""
    with reading(folder / INDEX, "the index of a pipeline", "download it again"):
        index = read_json(folder / INDEX, "the index of a pipeline", "download it again")
        components = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}
    wanted = [f"{name}/{file}" for name, kind in components.items() for file in _files_of(kind)]
    return next((file for file in wanted if not any(folder.glob(file))), None)


def _files_of(kind: str) -> tuple[str, ...]:
    """Patterns of what a component of this class is stored as."""
    if kind.endswith("Scheduler"):
        return ("scheduler_config.json",)
    if "Token" in kind:
        return ("tokenizer_config.json",)
    if kind.endswith("FeatureExtractor"):
        return ("preprocessor_config.json",)
    return ("config.json", "*.safetensors")


class AudioPipeline(Protocol):
    """A pipeline of diffusers whose latents are asked for, and decoded, apart from each other."""

    pipeline: Any

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def sample_rate_hz(self) -> int: ...

    @property
    def max_duration_seconds(self) -> float:
        """What the model can make at all."""

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        """One latent per prompt, of clips as long or longer; `options` are those of the pipeline's call."""

    def decode(self, latents: Tensor) -> Tensor:
        """Audio `[B, channels, T or more]`."""


class StableAudio:
    """`StableAudioPipeline` (Evans et al. 2024): stereo; every clip takes the model's full length, and is cut."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = self.pipeline.transformer
        return module

    @property
    def sample_rate_hz(self) -> int:
        return int(self.pipeline.vae.config.sampling_rate)

    @property
    def max_duration_seconds(self) -> float:
        num_frames: int = self.pipeline.transformer.config.sample_size
        return float(num_frames * self.pipeline.vae.hop_length / self.sample_rate_hz)

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        latents: Tensor = self.pipeline(
            list(prompts),
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
            audio_end_in_s=duration_seconds,
            output_type="latent",
            **options,
        ).audios
        return latents

    @property
    def process(self) -> CosineProcess:
        """By which our solvers sample it; raises ValueError for a model that predicts something else."""
        config = self.pipeline.scheduler.config
        if config.get("prediction_type") != "v_prediction" or config.get("sigma_data") != 1:
            raise ValueError(
                f"solver=: {config.get('_class_name')} with prediction_type={config.get('prediction_type')} and "
                f"sigma_data={config.get('sigma_data')} is not Stable Audio's schedule, v_prediction and 1.0; "
                "leave the solver out"
            )
        return CosineProcess(config.sigma_max, config.sigma_min)

    @torch.no_grad()
    def solve(
        self,
        prompts: Sequence[str],
        negative_prompt: str | None,
        duration_seconds: float,
        seeds: Sequence[int],
        solver: Solver,
        guidance: ClassifierFreeGuidance,
        accelerator: Accelerator | None = None,
        progress: Progress = iter,
    ) -> Tensor:
        """Latents as those of `latents`, by a solver of ours; the first noise of a seed is that of the pipeline.

        The noise of stochastic solvers comes from streams of the seeds' own, so that an item ignores its batch.
        """
        text, silence, durations = self._conditions(prompts, negative_prompt, duration_seconds)
        scheduler = solver.build(self.process)
        config = self.pipeline.transformer.config
        shape = (len(seeds), config.in_channels, config.sample_size)
        first = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = draw_noise(torch.empty(shape, device=self.pipeline._execution_device), first)
        denoise = guidance.wrap(partial(self._predict, durations, self._rotary()), text, silence)
        run = solver.run_context(scheduler, guidance, len(seeds), self.process)
        generators = [torch_generator("solver noise", seed) for seed in seeds]
        callbacks = [] if accelerator is None else [accelerator]
        with nullcontext() if accelerator is None else accelerator.attach(self.denoiser):
            return sample(denoise, noise, scheduler, run, callbacks, generators, progress)

    def _conditions(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float
    ) -> tuple[Conditioning, Conditioning, Tensor]:
        """Tokens of the prompts, `[B, S, D]`, and of the negative one, `[1, S, D]`; and the duration's, `[1, 1, 2 D]`.

        Without a negative prompt its tokens are zero, those of the duration too, as in training.
        """
        pipeline, device = self.pipeline, self.pipeline._execution_device
        start, end = pipeline.encode_duration(0.0, duration_seconds, device, False, 1)  # each [1, 1, D]

        def tokens(texts: Sequence[str]) -> Tensor:
            rows = pipeline.encode_prompt(list(texts), device, False)
            return torch.cat([rows, *(part.expand(len(rows), -1, -1) for part in (start, end))], dim=1)

        positive = tokens(prompts)
        negative = torch.zeros_like(positive[:1]) if negative_prompt is None else tokens([negative_prompt])
        valid = torch.ones(positive.shape[:2], dtype=torch.bool, device=device)  # padding is zero, and seen
        return Conditioning(positive, valid), Conditioning(negative, valid[:1]), torch.cat([start, end], dim=2)

    def _rotary(self) -> tuple[Tensor, ...]:
        """Cosines and sines of all frames, and of the token that durations and time are in."""
        length: int = self.pipeline.transformer.config.sample_size + 1
        angles = get_1d_rotary_pos_embed(
            self.pipeline.rotary_embed_dim, length, use_real=True, repeat_interleave_real=False
        )
        return tuple(part.to(self.pipeline._execution_device) for part in angles)

    def _predict(
        self,
        durations: Tensor,
        rotary: tuple[Tensor, ...],
        noisy: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_mask: Tensor,
    ) -> Tensor:
        """The transformer as our guidance calls a denoiser; `context_mask` is all true."""
        prediction: Tensor = self.denoiser(
            noisy.to(context.dtype),
            timestep,
            encoder_hidden_states=context,
            global_hidden_states=durations.expand(len(noisy), -1, -1),
            rotary_embedding=rotary,
            return_dict=False,
        )[0]
        return prediction.to(noisy.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        # One by one: at full length an item takes gigabytes.
        vae = self.pipeline.vae
        return torch.cat([vae.decode(latent[None].to(vae.dtype)).sample for latent in latents])


class AudioLDM2:
    """`AudioLDM2Pipeline` (Liu et al. 2023): mono, through a mel spectrogram and a vocoder; of any length."""

    max_duration_seconds = math.inf

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = self.pipeline.unet
        return module

    @property
    def sample_rate_hz(self) -> int:
        return int(self.pipeline.vocoder.config.sampling_rate)

    def latents(
        self, prompts: Sequence[str], negative_prompt: str | None, duration_seconds: float, **options: Any
    ) -> Tensor:
        frame_samples = math.prod(self.pipeline.vocoder.config.upsample_rates)
        multiple = self.pipeline.vae_scale_factor
        num_frames = math.ceil(round(duration_seconds * self.sample_rate_hz) / frame_samples / multiple) * multiple
        guided = options["guidance_scale"] > 1
        latents: Tensor = self.pipeline(
            # Half a frame more, so that no rounding makes it one fewer.
            audio_length_in_s=(num_frames + 0.5) * frame_samples / self.sample_rate_hz,
            output_type="latent",
            **self._text(prompts, negative_prompt, guided),
            **options,
        ).audios
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        mel = self.pipeline.vae.decode(1 / self.pipeline.vae.config.scaling_factor * latents).sample
        audio: Tensor = self.pipeline.mel_spectrogram_to_waveform(mel)
        return audio[:, None]

    @torch.no_grad()
    def _text(self, prompts: Sequence[str], negative_prompt: str | None, guided: bool) -> dict[str, Tensor]:
        """Embedded one by one: the language model reads the padding of a batch, and an item must ignore its batch."""
        device = self.pipeline._execution_device
        rows = [
            self.pipeline.encode_prompt(text, device, 1, guided, negative_prompt=negative_prompt) for text in prompts
        ]
        tokens = max(mask.shape[1] for _, mask, _ in rows)
        text = [pad(embeds, (0, 0, 0, tokens - embeds.shape[1])) for embeds, _, _ in rows]
        masks = [pad(mask, (0, tokens - mask.shape[1])) for _, mask, _ in rows]
        generated = [embeds for _, _, embeds in rows]
        columns = {"prompt_embeds": text, "attention_mask": masks, "generated_prompt_embeds": generated}
        named = {name: torch.cat([row[-1:] for row in column]) for name, column in columns.items()}
        if guided:  # the negative prompt comes first
            named |= {f"negative_{name}": torch.cat([row[:1] for row in column]) for name, column in columns.items()}
        return named


@dataclass(frozen=True)
class PublishedPipeline:
    """A pipeline on the hub.

    Args:
        repository: on the hub.
        family: "stable_audio" or "audioldm2"; ValueError for any other.
        dtype: of the weights.
        cacheable_layers: as `foley.accel.layers.declare_cacheable_layers` takes them; None for those of diffusers'
            own transformer blocks.
    """

    repository: str
    family: str
    dtype: str = "float32"
    cacheable_layers: Mapping[str, str | None] | None = None

    def __post_init__(self) -> None:
        if self.family not in _LOADERS:
            raise ValueError(f"published.family must be one of {', '.join(_LOADERS)}, got {self.family!r}")

    @property
    def takes_solvers(self) -> bool:
        """Whether solvers of ours sample it, beside its own."""
        return self.family == "stable_audio"

    def load(self, hub: Hub, cache_dir: Path) -> AudioPipeline:
        """In eval mode on the CPU; raises CheckpointError at once where a file is neither here nor to be had."""
        folder = pipeline_folder(hub, self.repository)
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "local_files_only": True}
        if not is_accelerate_available():
            options["low_cpu_mem_usage"] = False
        try:
            pipeline = _LOADERS[self.family](folder, options)
        except OSError as error:
            raise CheckpointError(f"{folder} does not hold a whole {self.repository}: {error}") from error
        if self.cacheable_layers:
            declare_cacheable_layers(pipeline.denoiser, self.cacheable_layers)
        return pipeline


# The pipelines take seconds to import, so only who loads one does.
def _load_stable_audio(folder: Path, options: Mapping[str, Any]) -> AudioPipeline:
    from diffusers import StableAudioPipeline

    return StableAudio(StableAudioPipeline.from_pretrained(folder, **options))


def _load_audioldm2(folder: Path, options: Mapping[str, Any]) -> AudioPipeline:
    from diffusers import AudioLDM2Pipeline
    from transformers import GPT2LMHeadModel

    # The index names GPT2Model, which transformers has taken the pipeline's generation methods from.
    language_model = GPT2LMHeadModel.from_pretrained(folder / "language_model", dtype=options["dtype"])
    return AudioLDM2(AudioLDM2Pipeline.from_pretrained(folder, language_model=language_model, **options))


_LOADERS = {"stable_audio": _load_stable_audio, "audioldm2": _load_audioldm2}
