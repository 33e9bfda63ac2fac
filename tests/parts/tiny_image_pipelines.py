"""Small random image and video pipelines of diffusers' own classes, and what each is called with.

Texts are given as embeddings and latents are what comes out, so that encoders and decoders can be left out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from tiny_transformers import TEXT_WIDTH, transformer
from torch import Tensor

STEPS = 6


def _text(items: int = 2, tokens: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(items, tokens, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def _texts(seed: int = 1) -> dict[str, Tensor]:
    return {"prompt_embeds": _text(), "negative_prompt_embeds": _text(seed=seed)}


def _pooled() -> dict[str, Tensor]:
    return {f"{sign}pooled_prompt_embeds": _text(tokens=1, seed=7)[:, 0] for sign in ("", "negative_")}


def _flux() -> tuple[Any, dict[str, Any]]:
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, None, None, transformer("flux")
    )
    call = {"prompt_embeds": _text(), "pooled_prompt_embeds": _text(tokens=1)[:, 0], "guidance_scale": 3.5}
    return pipeline, {**call, "height": 32, "width": 32}


def _flux_true_cfg() -> tuple[Any, dict[str, Any]]:
    pipeline, call = _flux()
    return pipeline, {**call, **_texts(), **_pooled(), "true_cfg_scale": 3.0}


def _sd3() -> tuple[Any, dict[str, Any]]:
    pipeline = StableDiffusion3Pipeline(transformer("sd3"), FlowMatchEulerDiscreteScheduler(shift=3.0), *(None,) * 7)
    return pipeline, {**_texts(), **_pooled(), "height": 64, "width": 64}


def _dit() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    pipeline = DiTPipeline(transformer("dit"), AutoencoderKL(latent_channels=4, norm_num_groups=4,
                           block_out_channels=(4,)), DDIMScheduler())  # fmt: skip
    return pipeline, {"class_labels": [1, 2], "output_type": "pt"}


def _pixart() -> tuple[Any, dict[str, Any]]:
    pipeline = PixArtAlphaPipeline(None, None, None, transformer("pixart"), DPMSolverMultistepScheduler())
    masks = {name: torch.ones(2, 3) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    sizes = {"height": 64, "width": 64, "use_resolution_binning": False}
    return pipeline, {**_texts(), **masks, **sizes, "negative_prompt": None}


def _wan() -> tuple[Any, dict[str, Any]]:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(None, None, None, scheduler, transformer("wan"))
    return pipeline, {**_texts(), "height": 32, "width": 32, "num_frames": 5}


def _cogvideox() -> tuple[Any, dict[str, Any]]:
    pipeline = CogVideoXPipeline(None, None, None, transformer("cogvideox"), CogVideoXDDIMScheduler())
    return pipeline, {**_texts(), "height": 64, "width": 64, "num_frames": 5}


_PIPELINES = {
    "flux": _flux,
    "flux_true_cfg": _flux_true_cfg,
    "sd3": _sd3,
    "dit": _dit,
    "pixart": _pixart,
    "wan": _wan,
    "cogvideox": _cogvideox,
}
PIPELINES = tuple(_PIPELINES)


def image_pipeline(name: str) -> tuple[Any, Mapping[str, Any]]:
    """The pipeline, and the arguments of a call for two items."""
    pipeline, call = _PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {"num_inference_steps": STEPS, "output_type": "latent", **call}


def generate(pipeline: Any, call: Mapping[str, Any]) -> Tensor:
    """What the call gives, with seeds 0 and 1 for its two items."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    output = pipeline(**call, generator=generators, return_dict=False)
    made: Tensor = torch.as_tensor(output[0])
    return made
