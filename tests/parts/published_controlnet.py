"""A ControlNet in the layout that EzAudio's authors publish, around a model's published weights."""

import torch
from torch import Tensor

CONTROL = {
    "controlnet": {
        **{"cond_in": 1, "cond_blocks": [64, 128], "cond_mask": True},
        **{"cond_mask_prob": 0.25, "cond_mask_ratio": [0.25, 0.5], "cond_mask_span": 10},
    },
    "conditioner": {
        **{"condition_type": "energy", "hop_size": 240, "window_size": 1920},
        **{"padding": "reflect", "min_db": -60, "norm": True},
    },
}
"""The sections of `ckpts/controlnet/energy_l.yml` beside `model`."""

_COPIED = ("patch_embed.", "x_pe.", "time_embed.", "time_ada.", "context_embed.", "in_blocks.")


def controlnet_weights(model: dict[str, Tensor], width: int, depth: int) -> dict[str, Tensor]:
    """Random but for what is copied of `model`, the published weights of a denoiser."""
    torch.manual_seed(1)
    names = {key: key.removeprefix("model.") for key in model}
    copied = {name: model[key] for key, name in names.items() if name.startswith(_COPIED)}
    shapes = {
        "controlnet_pre.mask_embed": (64,),
        **_affine("controlnet_pre.conv_in", 64, 1, 1),
        **_affine("controlnet_pre.blocks.0.0", 65, 65, 3),
        **_affine("controlnet_pre.blocks.0.2", 128, 65, 3),
        **_affine("controlnet_pre.conv_out", width, 128, 1),
    }
    for block in range(depth // 2):
        shapes |= _affine(f"controlnet_zero_blocks.{block}", width, width)
    return copied | {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def _affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
