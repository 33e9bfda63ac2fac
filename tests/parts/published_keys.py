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


def laion_clap(width: int, hidden: int, embedding: int, vocabulary: int, positions: int, depths: int = 4) -> Shapes:
    """The unfused model with one block a stage and one text layer."""
    shapes: Shapes = {"logit_scale_a": (), "logit_scale_t": ()}
    for name, inputs in (("text", hidden), ("audio", width << (depths - 1))):
        shapes |= affine(f"{name}_projection.0", embedding, inputs) | affine(
            f"{name}_projection.2", embedding, embedding
        )
        for layer in (0, 3):
            shapes |= affine(f"{name}_transform.sequential.{layer}", embedding, embedding)
    text, layer = "text_branch", "text_branch.encoder.layer.0"
    shapes |= {
        f"{text}.embeddings.position_ids": (1, positions),
        f"{text}.embeddings.word_embeddings.weight": (vocabulary, hidden),
        f"{text}.embeddings.position_embeddings.weight": (positions, hidden),
        f"{text}.embeddings.token_type_embeddings.weight": (1, hidden),
        **affine(f"{text}.embeddings.LayerNorm", hidden),
        **affine(f"{text}.pooler.dense", hidden, hidden),
    }
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        shapes |= affine(f"{layer}.attention.{part}", hidden, hidden)
    shapes |= affine(f"{layer}.attention.output.LayerNorm", hidden) | affine(f"{layer}.output.LayerNorm", hidden)
    shapes |= affine(f"{layer}.intermediate.dense", 2 * hidden, hidden)
    shapes |= affine(f"{layer}.output.dense", hidden, 2 * hidden)
    return shapes | _htsat(width, depths)


def _htsat(width: int, depths: int) -> Shapes:
    branch = "audio_branch"
    last = width << (depths - 1)
    shapes: Shapes = {
        f"{branch}.spectrogram_extractor.stft.conv_real.weight": (513, 1, 1024),
        f"{branch}.spectrogram_extractor.stft.conv_imag.weight": (513, 1, 1024),
        f"{branch}.logmel_extractor.melW": (513, 64),
        **batch_norm(f"{branch}.bn0", 64),
        **affine(f"{branch}.patch_embed.proj", width, 1, 4, 4),
        **affine(f"{branch}.patch_embed.norm", width),
        **affine(f"{branch}.norm", last),
        **affine(f"{branch}.tscam_conv", 527, last, 2, 3),
        **affine(f"{branch}.head", 527, 527),
    }
    for stage in range(depths):
        size, block = width << stage, f"{branch}.layers.{stage}.blocks.0"
        shapes |= affine(f"{block}.norm1", size) | affine(f"{block}.norm2", size)
        shapes |= affine(f"{block}.attn.qkv", 3 * size, size) | affine(f"{block}.attn.proj", size, size)
        shapes |= affine(f"{block}.mlp.fc1", 4 * size, size) | affine(f"{block}.mlp.fc2", size, 4 * size)
        shapes[f"{block}.attn.relative_position_bias_table"] = (225, (1, 1, 2, 2)[stage])
        shapes[f"{block}.attn.relative_position_index"] = (64, 64)
        if stage < depths - 1:
            shapes[f"{branch}.layers.{stage}.downsample.reduction.weight"] = (2 * size, 4 * size)
            shapes |= affine(f"{branch}.layers.{stage}.downsample.norm", 4 * size)
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
