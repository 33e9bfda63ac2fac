"""`TextToAudio`: the one object that a user of a trained system needs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from foley.accel.cost import CostMeter
from foley.accel.precision import choose_precision, computing_in
from foley.accel.quantisation import round_system
from foley.core.channels import channels_of
from foley.core.config import shipped
from foley.core.devices import machine_name, resolve_device
from foley.core.hashing import hash_module
from foley.core.locks import sole_user
from foley.core.logs import get_logger
from foley.core.numbers import POSITIVE
from foley.core.rates import clip_size
from foley.diffusion.context import Accelerator
from foley.diffusion.graphs import CudaRecorder, choose_graphs
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.sampler import embed, generate_latents
from foley.diffusion.solver import Solver
from foley.generation.backends import Backend
from foley.generation.calibrating import calibrate_missing, calibration_prompts
from foley.generation.canvas import Canvas, control_canvas, crop, edit_canvas, variation_canvas
from foley.generation.decoding import LatentDecoder, warn_of_blow_up
from foley.generation.editing import Control, Edit, EditMask, EditMasks, Recording, Variation
from foley.generation.novelty import KnownCaptions
from foley.generation.prompts import Clip, as_clips
from foley.generation.result import Generation, Timings
from foley.generation.settings import GenerationSettings
from foley.generation.sharing import SharedSystem
from foley.models.text import TEXT_MULTIPLE, CachedText, FrozenEncoder
from foley.nn.rotary import RotaryExtension
from foley.system.adapters import Adapters, AdapterStack, adapter_choices
from foley.system.system import System, load_system

_DEFAULT_SECONDS = 5.0
_log = get_logger(__name__)


class TextToAudio(SharedSystem):
    """Generates audio from captions with a trained system, or with a student distilled from one.

    A student samples with solver "consistency", by default in two steps, and takes the guidance scales of its training.

    Args:
        system: its modules; they are put in eval mode and moved to `device`. Prompts are encoded once, and latents
            are decoded with the codec's weights as they are now.
        device: where to run; "auto" is a GPU where there is one. ValueError where it is absent.
        max_duration_seconds: longer requests are refused; raise it knowingly, for quality falls off beyond the
            training length and memory grows with the square of the duration.

    >>> generator = TextToAudio.load()  # the small system that ships
    >>> result = generator.generate(["a dog barks", "rain falls"], duration_seconds=0.5, num_steps=2)
    >>> result.audio.shape, result.sample_rate_hz
    (torch.Size([2, 1, 12000]), 24000)
    """

    def __init__(self, system: System, device: str | torch.device = "cpu", max_duration_seconds: float = 60.0) -> None:
        self.system = system
        self.process = system.process
        self.student = system.consistency
        self.device = resolve_device(device)
        self.max_duration_seconds = max_duration_seconds
        modules: dict[str, Any] = {name: module.eval().to(self.device) for name, module in system.modules.items()}
        self.denoiser, self.text = modules["denoiser"], modules["text"]
        self.codec, self.normaliser = modules["codec"], modules["normaliser"]
        self._adapters = AdapterStack(
            {"denoiser": self.denoiser} | ({"text": self.text} if self.text.trainable else {})
        )
        if self.device.type == "cuda":
            self._pad_text()
        self._decode = LatentDecoder(self.codec)
        self.inference: dict[str, Any] = {"decoder_precision": "float32"}  # and what `optimise` and its like choose
        self._cuda_graphs, self._backend = False, Backend(self.denoiser)
        self._said: set[str] = set()
        self._know_weights()

    @classmethod
    def load(
        cls,
        system: str | Path | None = None,
        device: str | torch.device = "cpu",
        max_duration_seconds: float = 60.0,
        adapters: Adapters = (),
    ) -> Self:
        """By a published name, from an exported system directory or a training checkpoint; None is what ships.

        One that is on the hub as OWNER/NAME is fetched, see `from_pretrained`.

        Args:
            adapters: as for `use_adapters`.

        Raises CheckpointError as `load_system` and `use_adapters` do.
        """
        loaded = cls(load_system(shipped("demo") if system is None else system), device, max_duration_seconds)
        loaded.use_adapters(adapters)
        return loaded

    def use_adapters(self, adapters: Adapters) -> None:
        """Merge these into the weights, in the place of those before; none leaves the system as it was loaded.

        Args:
            adapters: folders that `experiment=lora` wrote, or mappings with `path` and `scale`, and with `any_base` for
                one that was trained on other weights (`foley.system.adapters.AdapterChoice`); they add up.

        Raises CheckpointError for one that does not fit, after which there are none, and ValueError for an entry that
        is none, and where weights are rounded or graphs run, which would not follow.
        """
        if not (choices := adapter_choices(adapters)) and not self._adapters.describe():
            return
        self._backend.require_pytorch("adapters")
        self._require_exact("adapters")
        with sole_user(self.denoiser):
            try:
                self._adapters.use(choices)
            finally:
                self._know_weights()

    def _know_weights(self) -> None:
        """What is said of the weights, and known by them, is of those of now."""
        self._encode_text = CachedText(self.text) if self.text.trainable else self.text  # knows no prompt
        self.known_captions = KnownCaptions([*self.system.captions, *self._adapters.captions])
        self.model_hash = hash_module(self.denoiser)
        self.inference.pop("adapters", None)
        self.inference |= {"adapters": used} if (used := self._adapters.describe()) else {}

    def optimise(
        self,
        precision: str = "auto",
        compiled: bool | str = False,
        cuda_graphs: str | bool = "auto",
        quantised: str | None = None,
    ) -> None:
        """Choose the denoiser's precision, whether it is compiled and recorded; the first generation does by default.

        Args:
            precision: "bf16", "fp16", or float32, which is exact, a text encoder of dtype=auto included: with any
                other, what stays in float32 may be multiplied in TF32. "auto" is bf16 on CUDA and float32 elsewhere.
            compiled: true makes one graph of a guided evaluation, and of each block under an accelerator; "blocks"
                compiles block by block always.
            cuda_graphs: replay evaluations as CUDA graphs (`foley.diffusion.graphs`); "auto" does on CUDA.
            quantised: of `foley.accel.quantisation.KINDS`: linear layers of denoiser and text encoder in 8 bits.

        Raises ValueError for an unknown choice, one that the device lacks, and another than rounded weights have.
        """
        self._backend.require_pytorch("optimise")
        precision = choose_precision(precision, self.device)
        self._cuda_graphs = choose_graphs(cuda_graphs, self.device)
        if (precision, quantised) != (self.inference.get("precision"), self.inference.get("quantise")):
            self._require_exact(f"precision={precision}" + (f", quantise={quantised}" if quantised else ""))
            round_system(self.denoiser, self.text, precision, quantised)
            self._encode_text = CachedText(self.text) if self.text.trainable else self.text  # knows no prompt
        self._backend.compile(compiled)
        if compiled:
            self._pad_text()
        self.inference |= {"precision": precision, "compile": compiled} | ({"quantise": quantised} if quantised else {})
        self.inference |= {"cuda_graphs": True} if self._cuda_graphs else {}

    def _require_exact(self, purpose: str) -> None:
        """Rounding weights loses what they were; their hash is that of the exact ones all the same."""
        if (rounded := self.inference.get("quantise", self.inference.get("precision", "float32"))) != "float32":
            raise ValueError(
                f"{purpose}: the denoiser's weights are rounded to {rounded} by now; load the system again, and do "
                'this before the first generation, or call optimise("float32") first'
            )

    def _pad_text(self) -> None:
        """Few lengths of text, so that what is compiled or captured for one serves the next prompt too."""
        self.text.length_multiple = max(self.text.length_multiple, TEXT_MULTIPLE)

    def use_backend(self, name: str, directory: str | Path) -> None:
        """Denoise and decode by the graphs "onnx" or "aoti" of an exported system; raises as `Backend.use` does."""
        if "precision" not in self.inference:
            self.optimise("float32", cuda_graphs=False)  # as the graphs are, and not what the device would do best
        decode = self._backend.use(name, Path(directory), self.codec, self.inference)
        self._decode = LatentDecoder(self.codec, decode=decode)
        self.inference["backend"] = name

    def set_decoder_precision(self, precision: str) -> None:
        """Decode in another precision than float32 (`LatentDecoder`); ValueError for one that the codec cannot take."""
        self._backend.require_pytorch("decoder_precision")
        self._decode = LatentDecoder(self.codec, precision)
        self.inference["decoder_precision"] = precision

    def keep_text_embeddings(self, directory: str | Path) -> None:
        """Keep embeddings of a frozen text encoder in `directory` between runs; ValueError for any other encoder."""
        if not isinstance(self.text, FrozenEncoder):
            raise ValueError(
                f"text_cache_dir={directory}: {type(self.text).__name__} is not a frozen encoder whose embeddings "
                "could be kept; leave it out, prompts are encoded once all the same"
            )
        self.text.cache.directory = Path(directory).expanduser()

    def forget_prompts(self) -> None:
        """Encode every prompt anew, as a fresh process does; what is kept in a directory stays known."""
        self._encode_text.cache.forget()

    def extend_rotary(self, method: str, trained_seconds: float | None = None) -> None:
        """Tell positions beyond `trained_seconds` apart by `foley.nn.rotary.RotaryExtension`, "linear" or "ntk".

        None is the length that the system says it was trained on. Raises ValueError where it does not say, for a
        denoiser without rotary positions, and for an unknown method.
        """
        self._backend.require_pytorch("rotary_extension")
        trained_seconds = trained_seconds or self.system.trained_seconds
        if trained_seconds is None:
            raise ValueError(f"rotary_extension={method}: this system does not say its trained_seconds; give them")
        POSITIVE.check("trained_seconds", trained_seconds)
        rotary = getattr(self.denoiser, "rotary", None)
        if rotary is None:
            raise ValueError(
                f"rotary_extension={method}: {type(self.denoiser).__name__} has no rotary positions to extend; "
                "generate long audio with window_seconds="
            )
        _, num_frames = clip_size(trained_seconds, self.sample_rate_hz, self.codec.hop_samples)
        rotary.extension = RotaryExtension(method, num_frames + self.denoiser.prepends_time_token)
        self.inference |= {"rotary_extension": method, "trained_seconds": trained_seconds}

    @property
    def sample_rate_hz(self) -> int:
        """Of the generated audio."""
        rate: int = self.codec.sample_rate_hz
        return rate

    @property
    def default_duration_seconds(self) -> float:
        """Of clips whose length is not asked for: that of the system's training, or 5 s where it does not say."""
        return min(self.system.trained_seconds or _DEFAULT_SECONDS, self.max_duration_seconds)

    @property
    def frames_per_second(self) -> float:
        """Of the latents."""
        frames: float = self.sample_rate_hz / self.codec.hop_samples
        return frames

    def generate(
        self,
        prompts: Sequence[str | Clip],
        duration_seconds: float | None = None,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Generation:
        """Audio for each prompt. An item depends on its prompt, seed and settings, not on the rest of its batch.

        Args:
            prompts: captions; the empty one asks for an unconditional sample.
            duration_seconds: of each clip, by default `default_duration_seconds`.
            seeds: one per prompt; by default 0, 1, 2, ...
            options: the fields of `GenerationSettings`.

        Raises:
            ValueError: for a request that cannot be met; nothing has been computed then.
            RuntimeError: where the result is not finite.
        """
        return self._generate(prompts, seeds, GenerationSettings(duration_seconds=duration_seconds, **options))

    def edit(
        self,
        prompts: Sequence[str | Clip],
        file: str | Path,
        mask: EditMask | EditMasks,
        seeds: Sequence[int] | None = None,
        downmix: str = "mean",
        **options: Any,
    ) -> Generation:
        """The recording in `file` with the masked part generated anew for each prompt; see `foley.generation.editing`.

        The denoiser sees the codec's mean latent of the kept frames of the window, so it must have been trained with
        masks, as the EzAudio stages are. A mask over everything is plain generation of its length.

        Args:
            downmix: what becomes of channels that the codec does not have, of `foley.core.channels.DOWNMIXES`.

        Other args and raises as for `generate`.
        """
        settings = GenerationSettings(source=Edit(file, mask, downmix), **options)
        return self._generate(prompts, seeds, settings)

    def vary(
        self,
        prompts: Sequence[str | Clip],
        file: str | Path,
        strength: float = 0.5,
        seeds: Sequence[int] | None = None,
        downmix: str = "mean",
        **options: Any,
    ) -> Generation:
        """Variations of the recording in `file`: its latent, noised and denoised again for each prompt (`Variation`).

        Other args and raises as for `edit`.
        """
        settings = GenerationSettings(source=Variation(file, strength, downmix), **options)
        return self._generate(prompts, seeds, settings)

    def follow(
        self,
        prompts: Sequence[str | Clip],
        file: str | Path,
        scale: float = 1.0,
        seeds: Sequence[int] | None = None,
        downmix: str = "mean",
        **options: Any,
    ) -> Generation:
        """Sounds of the prompts that rise and fall as the recording in `file` does, of a system with a ControlNet.

        Other args and raises as for `edit`.
        """
        settings = GenerationSettings(source=Control(file, scale, downmix), **options)
        return self._generate(prompts, seeds, settings)

    def _generate(
        self, prompts: Sequence[str | Clip], seeds: Sequence[int] | None, settings: GenerationSettings
    ) -> Generation:
        settings.warn_without_effect()
        return self.generate_clips(as_clips(prompts, seeds), settings)

    @torch.no_grad()
    def generate_clips(self, clips: Sequence[Clip], settings: GenerationSettings) -> Generation:
        """Every clip in the same way: what `generate`, `edit`, `vary` and the command line come to. Raises as they do.

        An impossible request is refused before anything is computed. Threads may share a system: they take turns.
        """
        with self._computing():
            return self._generate_clips(clips, settings)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Alone with the denoiser, in the precision that was chosen for it."""
        with sole_user(self.denoiser):
            if "precision" not in self.inference:
                self.optimise()
            with computing_in(self.inference["precision"], self.device):
                yield

    def _generate_clips(self, clips: Sequence[Clip], settings: GenerationSettings) -> Generation:
        timings = Timings()
        settings.refuse_lyrics()
        guidance, solver = settings.choose_guidance(self.student), settings.choose_solver(self.process, self.student)
        self._backend.check(settings.accelerator)
        self._calibrate(clips, settings, guidance, solver)
        clips = [replace(clip, notes={**self.known_captions.notes(clip.prompt), **clip.notes}) for clip in clips]
        canvas = self._canvas(settings, solver.num_steps, timings)
        settings = settings.fitting(self.denoiser, canvas.num_frames, self.frames_per_second)
        meter = None if settings.accelerator is None else CostMeter(settings.accelerator)
        rows = []
        for latent in self._latents(clips, settings, (guidance, solver), canvas, meter, timings):
            with timings.measured("decode_seconds", self.device):
                audio = self._decode(self.normaliser.denormalise(latent), settings.chunk_frames(self.frames_per_second))
                rows.append(canvas.finish(audio.cpu()))  # [B, channels, T], [B]
        chosen = settings.describe(guidance, solver.name, solver.num_steps) | (meter.describe() if meter else {})
        description = {**canvas.description, **chosen, **self._describe(), **settings.facts}
        audio, gains = (torch.cat(part) for part in zip(*rows, strict=True))
        audio, rate_hz = settings.finish(audio, self.sample_rate_hz), self.sample_rate_hz
        made = clips, audio, rate_hz, description, timings, canvas.peak_ceiling, gains
        return Generation(*made, machine_name(self.device), min(settings.batch_size, len(clips)))

    @torch.no_grad()
    def denoise_clips(self, clips: Sequence[Clip], settings: GenerationSettings) -> None:
        """Denoise every clip and decode none, for an accelerator that only looks on; raises as `generate_clips`."""
        with self._computing():
            timings = Timings()
            method = settings.choose_guidance(self.student), settings.choose_solver(self.process, self.student)
            canvas = self._canvas(settings, method[1].num_steps, timings)
            settings = settings.fitting(self.denoiser, canvas.num_frames, self.frames_per_second)
            looks_on = getattr(settings.accelerator, "on_latent", lambda latent: None)
            for latent in self._latents(clips, settings, method, canvas, settings.accelerator, timings):
                looks_on(latent)

    def _latents(
        self,
        clips: Sequence[Clip],
        settings: GenerationSettings,
        method: tuple[ClassifierFreeGuidance, Solver],
        canvas: Canvas,
        accelerator: Accelerator | None,
        timings: Timings,
    ) -> Iterator[Tensor]:
        """Normalised latents `[B, C, L]`, batch by batch."""
        guidance, solver = method
        runs = self._backend.of_run(settings.accelerator, accelerator, guidance.is_constant)
        denoiser, accelerator, compiler = runs
        denoise = partial(
            generate_latents,
            denoiser,
            self.process,
            num_frames=canvas.num_frames,
            guidance=guidance,
            solver=solver,
            accelerator=accelerator,
            device=self.device,
            progress=settings.progress,
            known=canvas.known,
            start=canvas.start,
            more=canvas.more,
            compiler=compiler,
            windows=settings.windows(canvas.num_frames, self.frames_per_second),
        )
        with timings.measured("text_seconds", self.device):
            negative = embed(self._encode_text, [settings.negative_prompt]) if guidance.needs_negative else None
        for first in range(0, len(clips), settings.batch_size):
            batch = clips[first : first + settings.batch_size]
            with timings.measured("text_seconds", self.device):
                positive = embed(self._encode_text, [clip.prompt for clip in batch])
            with timings.measured("denoise_seconds", self.device):
                seeds, recorder = [clip.seed for clip in batch], CudaRecorder() if self._cuda_graphs else None
                latent = denoise(positive=positive, negative=negative, seeds=seeds, recorder=recorder)  # [B, C, L]
            warn_of_blow_up(latent, solver.name, solver.num_steps, guidance.scale)
            yield latent

    def _calibrate(
        self, clips: Sequence[Clip], settings: GenerationSettings, guidance: ClassifierFreeGuidance, solver: Solver
    ) -> None:
        """Clips of the system's own length, so that the curves are those of the system and not of the request.

        A system of features knows no captions: those of the request are taken.
        """
        if settings.accelerator is None:
            return
        known = self.system.captions if self.text.prompt_field == "caption" else [clip.prompt for clip in clips]
        same: dict[str, Any] = {"any_guidance_scale": settings.any_guidance_scale, "batch_size": settings.batch_size}
        uncached = GenerationSettings(solver=solver.name, eta=solver.eta, guidance=guidance.constant(), **same)
        run = (hash_module(self.denoiser), solver.label, solver.num_steps, guidance.scale)
        calibrate_missing(settings.accelerator, run, calibration_prompts(known), uncached, self.denoise_clips)

    def _describe(self) -> dict[str, Any]:
        """What the JSON of each clip says of the system."""
        facts = {"prediction": self.process.prediction, "sample_rate_hz": self.sample_rate_hz}
        return {**facts, **self.inference, "model_hash": self.model_hash}

    def _canvas(self, settings: GenerationSettings, num_steps: int, timings: Timings) -> Canvas:
        """Raises ValueError where the recording cannot be read, or the result would be too long."""
        match settings.source:
            case Edit(file, mask, downmix):
                recording = self._read(file, "edit", downmix)
                window = mask.window(recording)
                self._check_duration("the mask and its boundaries", (window.end - window.start) / self.sample_rate_hz)
                hidden = window.hidden_mask(self.codec.hop_samples).to(self.device)  # [1, L]
                return edit_canvas(recording, mask, window, hidden, partial(self._encode, timings=timings))
            case Variation(file, strength, downmix) as variation:
                recording = self._read(file, "init", downmix)
                first_step = variation.first_step(num_steps)
                self._warn_once(variation.rounding(num_steps))
                self._check_duration(f"init={recording.file}", recording.duration_seconds)
                return variation_canvas(recording, strength, first_step, partial(self._encode, timings=timings))
            case Control(file, scale, downmix):
                recording = self._read(file, "control", downmix)
                self._check_duration(f"control={file}", recording.duration_seconds)
                self._warn_beyond_training(recording.duration_seconds)
                length = self.codec.hop_samples, self.system.trained_seconds
                return control_canvas(recording, scale, self.denoiser, *length, self.device)
            case _:
                seconds = settings.duration_seconds or self.default_duration_seconds
                self._check_duration("duration_seconds", seconds)
                self._warn_beyond_training(settings.window_seconds or seconds)
                num_samples, num_frames = clip_size(seconds, self.sample_rate_hz, self.codec.hop_samples)
                return Canvas(num_frames, partial(crop, num_samples=num_samples), {"duration_seconds": seconds})

    def _read(self, file: str | Path, option: str, downmix: str) -> Recording:
        """Mono `[T]` for a mono codec; the codec's channels where it has several."""
        several = None if (channels := channels_of(self.codec)) == 1 else channels
        return Recording.read(Path(file), self.sample_rate_hz, option, downmix, several)

    def _encode(self, samples: Tensor, timings: Timings) -> Tensor:
        """The codec's mean latent, normalised, `[1, C, L]`, of audio `[T]` or `[channels, T]`."""
        with timings.measured("encode_seconds", self.device):
            audio = torch.atleast_2d(samples)[None].to(self.device)
            latent: Tensor = self.normaliser.normalise(self.codec.encode(audio))
            return latent

    def _check_duration(self, name: str, seconds: float) -> None:
        if not 0 < seconds <= self.max_duration_seconds:
            raise ValueError(
                f"{name} must be above 0 and at most {self.max_duration_seconds} (max_duration_seconds), got {seconds}"
            )

    def _warn_beyond_training(self, seconds: float) -> None:
        trained = self.system.trained_seconds or inf
        if seconds > trained:
            self._warn_once(
                f"{seconds:g} s at once are longer than the {trained:g} s that this system was trained on, which "
                f"sounds worse; window_seconds={trained:g} generates longer clips in windows of that length"
            )

    def _warn_once(self, message: str | None) -> None:
        """Of each message once: the clips of a file are generated batch by batch."""
        if message is not None and message not in self._said:
            self._said.add(message)
            _log.warning("%s", message)
