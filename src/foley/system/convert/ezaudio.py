"""The published EzAudio denoisers as `DiffusionTransformer`, and the ControlNet published beside them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foley.models.dit.controlnet import ControlNet
from foley.models.dit.model import DiffusionTransformer
from foley.nn.rotary import inverse_frequencies
from foley.system.convert.files import build_around, check_options, flat_options

_SOURCE = "published EzAudio weights"
_ROTARY_BUFFER = "rotary.inv_freq"
_PUBLISHED_AXES = {"patch_embed.proj.weight": -1, "x_pe.abs_pe": 0}  # of length 1, which ours do without
_NEEDED = (
    *("out_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "context_dim", "img_size"),
    *("skip", "skip_norm", "ada_sola_rank", "ada_sola_alpha"),
)
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mae": (True,),
    "patch_size": (1,),
    "input_type": ("1d",),
    "norm_layer": ("layernorm",),
    "act_layer": ("geglu",),
    "qkv_bias": (False,),
    "qk_scale": (None,),
    "qk_norm": (None, "layernorm"),
    "time_fusion": ("ada", "ada_single", "ada_sola_bias"),
    "cls_dim": (None,),
    "context_norm": (True,),
    "context_fusion": ("cross",),
    "context_pe_method": ("none",),
    "pe_method": ("none", "abs"),
    "rope_mode": ("none", "shared"),
    "use_conv": (True,),
}

# Applied in order to every published name.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^mask_embed$", "masked_input.mask_embedding"),
        (r"^controlnet_pre\.mask_embed$", "embedding.mask_embedding"),
        (r"^controlnet_pre\.conv_in\.", "embedding.input."),
        (r"^controlnet_pre\.conv_out\.", "embedding.output."),
        (r"^controlnet_pre\.blocks\.", "embedding.stages."),
        (r"^controlnet_zero_blocks\.", "projections."),
        (r"^model\.", ""),
        (r"^patch_embed\.proj\.", "input_projection."),
        (r"^x_pe\.abs_pe$", "positions.table"),
        (r"^time_embed\.", "time_embedding."),
        (r"^time_ada_final\.", "output_layer.modulation."),
        (r"^time_ada\.", "shared_modulation."),
        (r"^context_embed\.", "context_embedding."),
        (r"^final_block\.final_layer\.", "output_layer.conv."),
        (r"^final_block\.", "output_layer."),
        (r"\.skip_(norm|linear)\.", r".skip.\1."),
        (r"\.adaln\.time_ada\.", ".modulation.projection."),
        (r"\.adaln\.lora_a\.", ".modulation.down."),
        (r"\.adaln\.lora_b\.", ".modulation.up."),
        (r"\.adaln\.scale_shift_table$", ".modulation.table"),
        (r"\.norm1\.", ".self_attention.norm."),
        (r"\.norm2\.", ".cross_attention.norm."),
        (r"\.norm_context\.", ".cross_attention.norm_context."),
        (r"\.norm3\.", ".feed_forward.norm."),
        (r"\.attn\.", ".self_attention.attention."),
        (r"\.cross_attn\.", ".cross_attention.attention."),
        (r"\.attention\.proj\.", ".attention.output."),
        (r"\.mlp\.net\.0\.proj\.", ".feed_forward.layer.input."),
        (r"\.mlp\.net\.2\.", ".feed_forward.layer.output."),
    )
)


def _modulation(published: Mapping[str, Any]) -> dict[str, Any]:
    schemes: dict[str, dict[str, Any]] = {
        "ada": {"_target_": "foley.nn.adaln.AdaLN"},
        "ada_single": {"_target_": "foley.nn.adaln.AdaLNSingle"},
        "ada_sola_bias": {
            "_target_": "foley.nn.adaln.AdaLNSola",
            "rank": published["ada_sola_rank"],
            "alpha": published["ada_sola_alpha"],
        },
    }
    return schemes[published["time_fusion"]]


def denoiser_config(published: Mapping[str, Any], source: str = _SOURCE) -> dict[str, Any]:
    """Our component config for a published model config; one of ours is returned as it is.

    Raises ValueError for options that are missing or that we do not build.
    """
    if "_target_" in published:
        return dict(published)
    check_options(published, _NEEDED, _SUPPORTED, source)
    return {
        "_target_": "foley.models.dit.model.DiffusionTransformer",
        "latent_channels": published["out_chans"],
        "width": published["embed_dim"],
        "depth": published["depth"],
        "num_heads": published["num_heads"],
        "context_dim": published["context_dim"],
        "modulation": _modulation(published),
        "feed_forward_ratio": published["mlp_ratio"],
        "qk_norm": published["qk_norm"] is not None,
        "long_skips": published["skip"],
        "skip_norm": published["skip_norm"],
        "rotary": published["rope_mode"] != "none",
        "learned_positions": published["img_size"] if published["pe_method"] == "abs" else None,
    }


def rename(published_key: str) -> str:
    """Our name of a published parameter."""
    for pattern, replacement in _RENAMES:
        published_key = pattern.sub(replacement, published_key)
    return published_key


# The way back for a ControlNet, applied in order too.
_BACK = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embedding\.mask_embedding$", "controlnet_pre.mask_embed"),
        (r"^embedding\.input\.", "controlnet_pre.conv_in."),
        (r"^embedding\.output\.", "controlnet_pre.conv_out."),
        (r"^embedding\.stages\.", "controlnet_pre.blocks."),
        (r"^projections\.", "controlnet_zero_blocks."),
        (r"^input_projection\.", "patch_embed.proj."),
        (r"^positions\.table$", "x_pe.abs_pe"),
        (r"^time_embedding\.", "time_embed."),
        (r"^shared_modulation\.", "time_ada."),
        (r"^context_embedding\.", "context_embed."),
        (r"\.modulation\.projection\.", ".adaln.time_ada."),
        (r"\.modulation\.down\.", ".adaln.lora_a."),
        (r"\.modulation\.up\.", ".adaln.lora_b."),
        (r"\.modulation\.table$", ".adaln.scale_shift_table"),
        (r"\.self_attention\.norm\.", ".norm1."),
        (r"\.cross_attention\.norm\.", ".norm2."),
        (r"\.cross_attention\.norm_context\.", ".norm_context."),
        (r"\.feed_forward\.norm\.", ".norm3."),
        (r"\.attention\.output\.", ".attention.proj."),
        (r"\.self_attention\.attention\.", ".attn."),
        (r"\.cross_attention\.attention\.", ".cross_attn."),
        (r"\.feed_forward\.layer\.input\.", ".mlp.net.0.proj."),
        (r"\.feed_forward\.layer\.output\.", ".mlp.net.2."),
    )
)


def published_controlnet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `ControlNet` of ours as the published code names and shapes them.

    That code also has rotary frequencies in its files, which are not learned: it makes them anew with `strict=False`.
    """
    published = {}
    for name, value in state_dict.items():
        for pattern, replacement in _BACK:
            name = pattern.sub(replacement, name)
        published[name] = value
    for name, axis in _PUBLISHED_AXES.items():
        if name in published:
            published[name] = published[name].unsqueeze(axis)
    return published


def denoiser_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names and shapes, without the rotary frequencies, which are not learned."""
    state = {rename(key): value for key, value in state_dict.items() if not key.endswith(_ROTARY_BUFFER)}
    for name, axis in ((rename(published), axis) for published, axis in _PUBLISHED_AXES.items()):
        if name in state:
            state[name] = state[name].squeeze(axis)
    return state


def _check_rotary(state_dict: Mapping[str, Tensor], head_dim: int, source: str) -> None:
    expected = inverse_frequencies(head_dim)
    for key, value in state_dict.items():
        if not key.endswith(_ROTARY_BUFFER):
            continue
        rounding = 10 * torch.finfo(value.dtype).eps
        if value.shape != expected.shape or not torch.allclose(value.float().cpu(), expected, rtol=rounding):
            raise ValueError(
                f"{source}: {key} differs from the standard frequencies of head dimension {head_dim}; "
                "use the config published with these weights"
            )


def ezaudio_denoiser(
    state_dict: Mapping[str, Tensor], model_config: Mapping[str, Any], source: str = _SOURCE
) -> DiffusionTransformer:
    """The published denoiser in eval mode, around the tensors given.

    Args:
        state_dict: weights under their published names.
        model_config: the published `model` section, or a plain config of ours with `_target_`.
        source: where the weights are from, for errors.

    Raises:
        ValueError: an option that is missing or that we do not build, or rotary frequencies of another kind.
        CheckpointError: weights and config that do not fit.
    """
    config = denoiser_config(model_config, source)
    _check_rotary(state_dict, config["width"] // config["num_heads"], source)
    denoiser: DiffusionTransformer = build_around(config, denoiser_state(state_dict), source)
    return denoiser


# ---------------------------------------------------------------- the ControlNet

_CONTROL_NEEDED = ("controlnet.cond_in", "controlnet.cond_blocks")
_CONTROL_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "controlnet.cond_mask": (True,),
    "conditioner.condition_type": ("energy",),
    "conditioner.hop_size": (240,),
    "conditioner.window_size": (1920,),
    "conditioner.padding": ("reflect",),
    "conditioner.min_db": (-60,),
    "conditioner.norm": (True,),
}


def controlnet_config(published: Mapping[str, Any], source: str = _SOURCE) -> dict[str, Any]:
    """Our component config for the published config of a ControlNet; one of ours is returned as it is.

    Raises ValueError for options that are missing or that we do not build.
    """
    if "_target_" in published:
        return dict(published)
    check_options(flat_options(published), _CONTROL_NEEDED, _CONTROL_SUPPORTED, source)
    return {
        "_target_": "foley.models.dit.controlnet.ControlNet",
        "model": denoiser_config(published, source),
        "channels": published["controlnet"]["cond_in"],
        "widths": list(published["controlnet"]["cond_blocks"]),
    }


def ezaudio_controlnet(
    state_dict: Mapping[str, Tensor], model_config: Mapping[str, Any], source: str = _SOURCE
) -> ControlNet:
    """The published ControlNet in eval mode, around the tensors given; args and raises as for `ezaudio_denoiser`.

    Args:
        model_config: `ckpts/controlnet/energy_l.yml`, its `model` section at the top, or a plain config of ours.
    """
    config = controlnet_config(model_config, source)
    _check_rotary(state_dict, config["model"]["width"] // config["model"]["num_heads"], source)
    control: ControlNet = build_around(config, denoiser_state(state_dict), source)
    return control
