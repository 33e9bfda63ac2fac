"""Names and shapes of published extractor checkpoints, as their authors' code defines them."""

from itertools import pairwise
from pathlib import Path

import torch

Shapes = dict[str, tuple[int, ...]]


def batch_norm(name: str, width: int) -> Shapes:
    vectors: Shapes = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {**vectors, f"{name}.num_batches_tracked": ()}


def affine(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def cnn14() -> Shapes:
    shapes: Shapes = {
        "spectrogram_extractor.stft.conv_real.weight": (257, 1, 512),
        "spectrogram_extractor.stft.conv_imag.weight": (257, 1, 512),
        "logmel_extractor.melW": (257, 64),
        **batch_norm("bn0", 64),
    }
    widths = (1, 64, 128, 256, 512, 1024, 2048)
    for block, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        shapes[f"conv_block{block}.conv1.weight"] = (outputs, inputs, 3, 3)
        shapes[f"conv_block{block}.conv2.weight"] = (outputs, outputs, 3, 3)
        shapes |= batch_norm(f"conv_block{block}.bn1", outputs) | batch_norm(f"conv_block{block}.bn2", outputs)
    return shapes | affine("fc1", 2048, 2048) | affine("fc_audioset", 527, 2048)


def vggish() -> Shapes:
    convolutions = {0: (64, 1), 3: (128, 64), 6: (256, 128), 8: (256, 256), 11: (512, 256), 13: (512, 512)}
    shapes: Shapes = {}
    for index, (outputs, inputs) in convolutions.items():
        shapes |= affine(f"features.{index}", outputs, inputs, 3, 3)
    layers = {0: (4096, 512 * 4 * 6), 2: (4096, 4096), 4: (128, 4096)}
    for index, shape in layers.items():
        shapes |= affine(f"embeddings.{index}", *shape)
    return shapes


def openl3() -> Shapes:
    shapes: Shapes = {
        "speclayer.dft_real_kernels": (1025, 1, 2048),
        "speclayer.dft_imag_kernels": (1025, 1, 2048),
        "speclayer.mel_basis": (256, 1025),
        **batch_norm("batch_normalization_1", 1),
    }
    widths = (1, 64, 64, 128, 128, 256, 256, 512)
    for index, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        shapes |= affine(f"conv2d_{index}", outputs, inputs, 3, 3)
        shapes |= batch_norm(f"batch_normalization_{index + 1}", outputs)
    return shapes | affine("audio_embedding_layer", 512, 512, 3, 3)


def passt(width: int = 768, depth: int = 12) -> Shapes:
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "dist_token": (1, 1, width),
        "new_pos_embed": (1, 2, width),
        "freq_new_pos_embed": (1, width, 12, 1),
        "time_new_pos_embed": (1, width, 1, 99),
        **affine("patch_embed.proj", width, 1, 16, 16),
    }
    for index in range(depth):
        block = f"blocks.{index}"
        shapes |= affine(f"{block}.norm1", width) | affine(f"{block}.norm2", width)
        shapes |= affine(f"{block}.attn.qkv", 3 * width, width) | affine(f"{block}.attn.proj", width, width)
        shapes |= affine(f"{block}.mlp.fc1", 4 * width, width) | affine(f"{block}.mlp.fc2", width, 4 * width)
    for name, shape in (
        ("norm", (width,)),
        ("head.0", (width,)),
        ("head.1", (527, width)),
        ("head_dist", (527, width)),
    ):
        shapes |= affine(name, *shape)
    return shapes


def constant_state(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that take no memory: every value is the number of its name."""
    numbered = enumerate(shapes.items())
    return {name: torch.full((1,) * len(shape), float(index)).expand(shape) for index, (name, shape) in numbered}


def save_state(shapes: Shapes, path: Path, section: str | None = None) -> dict[str, torch.Tensor]:
    """Write a checkpoint of `constant_state` as its authors do, and return its tensors."""
    state = constant_state(shapes)
    torch.save({section: state, "iteration": 0} if section else state, path)
    return state
