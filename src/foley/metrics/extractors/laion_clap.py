"""Checkpoints of the laion_clap package, such as `630k-audioset-fusion-best.pt`, in transformers' `ClapModel`."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ClapModel

from foley.checkpoint import load_state, read_pickle
from foley.metrics.extractors.weights import PublishedWeights, require_tensors

_NAMES = PublishedWeights(
    file="630k-audioset-fusion-best.pt",
    url="https://huggingface.co/lukewys/laion_clap",
    # Spectrograms, unused heads, and what follows from shapes alone.
    derived=(
        r"(text|audio)_transform\.|audio_branch\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\."
        r"|.*\.(attn_mask|relative_position_index|position_ids|token_type_ids)$"
    ),
    renames=(
        (r"^text_branch\.", "text_model."),
        (r"^audio_branch\.", "audio_model.audio_encoder."),
        (r"(text|audio)_projection\.0\.", r"\1_projection.linear1."),
        (r"(text|audio)_projection\.2\.", r"\1_projection.linear2."),
        (r"\.bn0\.", ".batch_norm."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.self."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
)
# The checkpoints hold a NumPy number beside the weights, which `weights_only` refuses unless its parts are named.
_NUMBER = np._core.multiarray.scalar  # type: ignore[attr-defined]
_HARMLESS = [(_NUMBER, "numpy.core.multiarray.scalar"), _NUMBER, np.dtype, type(np.dtype(np.float64))]


def load_laion_clap(model: ClapModel, path: Path) -> None:
    """Give `model` the weights at `path`; raises CheckpointError that lists keys and shapes that disagree."""
    with torch.serialization.safe_globals(_HARMLESS):
        content = read_pickle(path, mmap=True)
    published = content.get("state_dict", content) if isinstance(content, Mapping) else content
    state = {name.removeprefix("module."): value for name, value in require_tensors(published, path).items()}
    kept = {name: value for name, value in model.state_dict().items() if re.match(_NAMES.derived or "", name)}
    load_state(model, kept | _split_attention(_NAMES.renamed(state)), str(path))


def _split_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value, which laion_clap keeps in one tensor, as three."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            split |= {name.replace(".qkv.", f".{part}."): third for part, third in parts}
        else:
            split[name] = value
    return split
