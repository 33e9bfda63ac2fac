"""`StableAudioPipeline`: Stable Audio Open, by its own scheduler or by a solver of ours."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from foley.core.seeding import torch_generator
from foley.diffusion.context import Accelerator, followers
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import CosineProcess
from foley.diffusion.sampler import Progress, sample
from foley.diffusion.schedulers import draw_noise
from foley.diffusion.solver import Solver
from foley.system.published.audio_pipelines import OfOobleck, decode_each


class StableAudio(OfOobleck):
    """`StableAudioPipeline` (Evans et al. 2024): stereo; every clip takes the model's full length, and is cut."""

    takes_solvers = True
    trains = True

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
        callbacks = followers(denoise, accelerator)
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

    def tokens(self, prompts: list[str], duration_seconds: float) -> tuple[Tensor, Tensor]:
        """Of the prompts and the duration, `[B, S, D]`, all valid; those of the empty prompt are zero."""
        text, silence, _ = self._conditions(prompts, None, duration_seconds)
        empty = torch.tensor([not prompt for prompt in prompts], device=text.context.device)[:, None, None]
        return torch.where(empty, silence.context, text.context), text.mask

    def predict(
        self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, duration_seconds: float
    ) -> Tensor:
        """The transformer in training, on latents of any number of frames."""
        *_, durations = self._conditions([""], None, duration_seconds)
        return self._predict(durations, self._rotary(noisy.shape[-1]), noisy, timestep, context, context_mask)

    def _rotary(self, num_frames: int | None = None) -> tuple[Tensor, ...]:
        """Cosines and sines of all frames, and of the token that durations and time are in."""
        length: int = (num_frames or self.pipeline.transformer.config.sample_size) + 1
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
        return decode_each(self.pipeline.vae, latents)
