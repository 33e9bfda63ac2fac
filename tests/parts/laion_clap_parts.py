"""A checkpoint of the laion_clap package: its own audio model as published, and a small RoBERTa, of random weights."""

from pathlib import Path

import numpy as np
import torch
from published_keys import affine
from tiny_clap import save_clap
from transformers import ClapConfig

from foley.metrics.extractors.laion_clap import build_model

HIDDEN, EMBEDDING, POSITIONS = 64, 12, 80


def port_config(vocabulary: int, fusion: bool, epsilon: float) -> ClapConfig:
    """What transformers' port calls the same model."""
    text = {"vocab_size": vocabulary, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 1, "max_position_embeddings": POSITIONS, "layer_norm_eps": epsilon}
    return ClapConfig(text_config={**text, **sizes}, audio_config={"enable_fusion": fusion}, projection_dim=EMBEDDING)


def save_laion_clap(directory: Path, fusion: bool = False) -> tuple[Path, Path]:
    """Write `laion.pt` and a tokenizer; returns both."""
    tokenizer = save_clap(directory / "tokenizer")
    torch.manual_seed(0)
    model = build_model(_sizes(20, fusion), "sizes")
    for name, value in model.state_dict().items():
        if "running" in name:  # of batches that differ from each other
            value.uniform_(0.5, 1.5)
        elif name.startswith("text_") and value.dim() == 2:
            value.normal_(std=0.3)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(POSITIONS)[None]  # as the published files have
    path = directory / "laion.pt"
    torch.save({"epoch": 1, "loss": np.float64(0.5), "state_dict": state}, path)
    return path, tokenizer


def _sizes(vocabulary: int, fusion: bool) -> dict[str, torch.Tensor]:
    text = "text_branch.embeddings"
    shapes = {
        "audio_branch.patch_embed.proj.weight": (96, 1, 4, 4),
        f"{text}.word_embeddings.weight": (vocabulary, HIDDEN),
        f"{text}.position_embeddings.weight": (POSITIONS, HIDDEN),
        f"{text}.token_type_embeddings.weight": (1, HIDDEN),
        **affine("text_projection.0", EMBEDDING, HIDDEN),
        **affine("text_branch.encoder.layer.0.intermediate.dense", 2 * HIDDEN, HIDDEN),
        **({"audio_branch.patch_embed.mel_conv2d.weight": (96, 1, 4, 12)} if fusion else {}),
    }
    return {name: torch.empty(shape) for name, shape in shapes.items()}
