"""Small random transformers of diffusers' own classes, each with the inputs of one call."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from stirring_parts import stir
from torch import Tensor, nn

ITEMS, TEXT_WIDTH = 2, 16
Inputs = Mapping[str, Any]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}


def _times(value: float = 5) -> Tensor:
    return torch.full((ITEMS,), float(value))


def _text(tokens: int = 3) -> Tensor:
    return torch.randn(ITEMS, tokens, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))


def _image(*shape: int) -> Tensor:
    return torch.randn(ITEMS, *shape, generator=torch.Generator().manual_seed(2))


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(**HEADS, sample_size=8, out_channels=8, num_embeds_ada_norm=1000)


def pixart() -> nn.Module:
    sizes = {"sample_size": 8, "in_channels": 4, "cross_attention_dim": 16, "caption_channels": TEXT_WIDTH}
    return diffusers.PixArtTransformer2DModel(**HEADS, **sizes, out_channels=8, use_additional_conditions=False)


def flux(guidance: bool = True) -> nn.Module:
    sizes = {"patch_size": 1, "in_channels": 16, "joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": 16}
    return diffusers.FluxTransformer2DModel(
        **HEADS, **sizes, num_single_layers=2, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4)
    )


def sd3(dual: tuple[int, ...] = (0,)) -> nn.Module:
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 16}
    text = {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": 16, "pos_embed_max_size": 8}
    return diffusers.SD3Transformer2DModel(**HEADS, **sizes, **text, dual_attention_layers=dual)


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        **{**HEADS, "attention_head_dim": 16},
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_WIDTH,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=3,
    )


def wan() -> nn.Module:
    sizes = {"in_channels": 16, "out_channels": 16, "text_dim": TEXT_WIDTH, "freq_dim": 16, "ffn_dim": 32}
    return diffusers.WanTransformer3DModel(
        **{**HEADS, "attention_head_dim": 12}, **sizes, cross_attn_norm=True, rope_max_seq_len=32
    )


def hunyuan_dit() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        **HEADS,
        patch_size=2,
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=TEXT_WIDTH,
        pooled_projection_dim=4,
        text_len=3,
        text_len_t5=3,
        use_style_cond_and_image_meta_size=False,
    )


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=TEXT_WIDTH
    )


def mochi() -> nn.Module:
    sizes = {"text_embed_dim": TEXT_WIDTH, "pooled_projection_dim": 8, "time_embed_dim": 4, "max_sequence_length": 3}
    return diffusers.MochiTransformer3DModel(**HEADS, **sizes, in_channels=4, out_channels=4)


def lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        cap_feat_dim=TEXT_WIDTH,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16),
    )


def hunyuan_video() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        **{**HEADS, "num_layers": 1},
        in_channels=4,
        out_channels=4,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )


def stable_audio_3() -> nn.Module:
    return diffusers.StableAudio3DiTModel(
        io_channels=4,
        embed_dim=64,
        depth=2,
        num_heads=2,
        cond_token_dim=TEXT_WIDTH,
        global_cond_dim=TEXT_WIDTH,
        local_add_cond_dim=5,
        timestep_features_dim=8,
        num_memory_tokens=2,
    )


def ace_step() -> nn.Module:
    return diffusers.AceStepTransformer1DModel(
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
    )


def longcat() -> nn.Module:
    return diffusers.LongCatAudioDiTTransformer(
        dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=TEXT_WIDTH, latent_dim=4, cross_attn_norm=True
    )


def inputs_of(name: str) -> Inputs:
    """Of one call, without the latent."""
    positions = {"txt_ids": torch.zeros(3, 3), "img_ids": torch.zeros(4, 3), "guidance": _times(3.5)}
    mask = torch.ones(ITEMS, 3, dtype=torch.long)
    text, pooled = {"encoder_hidden_states": _text()}, {"pooled_projections": _text(1)[:, 0]}
    hunyuan = {"text_embedding_mask": mask, "encoder_hidden_states_t5": _text(), "text_embedding_mask_t5": mask}
    rope = (torch.ones(16, 8), torch.zeros(16, 8))
    sizes = {"num_frames": 2, "height": 2, "width": 2}
    table: Mapping[str, Inputs] = {
        "dit": {"timestep": _times().long(), "class_labels": torch.arange(ITEMS)},
        "pixart": {"timestep": _times(), **text},
        "flux": {"timestep": _times(0.5), **text, **pooled, **positions},
        "sd3": {"timestep": _times(), **text, **pooled},
        "cogvideox": {"timestep": _times(), **text},
        "wan": {"timestep": _times(), **text},
        "hunyuan_dit": {"timestep": _times(), **text, **hunyuan, "image_rotary_emb": rope},
        "ltx": {"timestep": _times(), **text, "encoder_attention_mask": mask, **sizes},
        "mochi": {"timestep": _times(), **text, "encoder_attention_mask": mask.bool()},
        "lumina2": {"timestep": _times(0.5), **text, "encoder_attention_mask": mask.bool()},
        "stable_audio_3": {"timestep": _times(0.5), **text, "global_hidden_states": _text(1)[:, 0]},
        "ace_step": {
            "timestep": _times(0.5),
            "timestep_r": _times(0.5),
            **text,
            "context_latents": _image(8, 8),
        },
        "longcat": {"timestep": _times(0.5), **text, "encoder_attention_mask": mask.bool()},
        "hunyuan_video": {
            "timestep": _times(),
            **text,
            "encoder_attention_mask": mask,
            "pooled_projections": _text(1)[:, 0, :8],
            "guidance": _times(3.5),
        },
    }
    return table[name]


LATENTS = {
    "dit": (4, 8, 8),
    "pixart": (4, 8, 8),
    "flux": (4, 16),
    "sd3": (4, 8, 8),
    "cogvideox": (2, 4, 8, 8),
    "wan": (16, 2, 4, 4),
    "hunyuan_dit": (4, 8, 8),
    "ltx": (8, 4),
    "mochi": (4, 2, 4, 4),
    "lumina2": (4, 8, 8),
    "hunyuan_video": (4, 1, 4, 4),
    "stable_audio_3": (4, 8),
    "ace_step": (8, 4),
    "longcat": (8, 4),
}
"""The shape of one latent of each model."""

_MODELS: Mapping[str, Callable[[], nn.Module]] = {
    make.__name__: make
    for make in (
        dit,
        pixart,
        flux,
        sd3,
        cogvideox,
        wan,
        hunyuan_dit,
        ltx,
        mochi,
        lumina2,
        hunyuan_video,
        stable_audio_3,
        ace_step,
        longcat,
    )
}


def transformer(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = _MODELS[name]().eval()
    stir(model)  # what starts at zero would have nothing to cache
    return model
