"""What every text conditioner gives, and the care that prompts from outside need."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.export import register_dataclass
from torch.nn.functional import pad

from foley.core.devices import to_device
from foley.core.logs import get_logger

logger = get_logger(__name__)

# No tokenizer used here makes tokens this long on average, so cutting at this length never changes what is kept,
# while a prompt of a megabyte costs no more than a long one.
_MAX_CHARACTERS_PER_TOKEN = 64

TEXT_MULTIPLE = 16
"""Tokens to a multiple of which compiled denoisers have their text padded."""


@dataclass(frozen=True)
class TextEmbedding:
    """`embeddings [B, S, Dc]` and `mask [B, S]` (bool, true = valid; at least one valid token per prompt)."""

    embeddings: Tensor
    mask: Tensor

    def padded(self, length: int) -> "TextEmbedding":
        """With masked tokens up to `length`; as it is where it is that long."""
        more = max(0, length - self.mask.shape[1])
        return TextEmbedding(pad(self.embeddings, (0, 0, 0, more)), pad(self.mask, (0, more)))

    def replaced(self, rows: Tensor, other: "TextEmbedding") -> "TextEmbedding":
        """With the one row of `other` where `rows [B]` is true."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        own, other, rows = self.padded(length), other.padded(length), to_device(rows, self.mask.device)[:, None]
        embeddings = torch.where(rows[..., None], other.embeddings.to(own.embeddings), own.embeddings)
        return TextEmbedding(embeddings, torch.where(rows, other.mask, own.mask))


register_dataclass(TextEmbedding)  # so that sharded training finds the tensors in what an encoder returns


class TextConditioner(nn.Module):
    """Prompts to embeddings. The empty prompt is valid: it is the unconditional one, of classifier-free guidance.

    Attributes:
        dim: width Dc of the embeddings.
        trainable: whether the parameters are trained with the denoiser.
        prompt_field: what of a clip is its prompt in training, "caption" or "id".
        length_multiple: S is a multiple of it, so that a compiled denoiser meets few shapes; masked tokens change
            nothing.
    """

    prompt_field: ClassVar[str] = "caption"

    dim: int
    trainable: bool
    length_multiple: int = 1

    def forward(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`; S is the longest prompt's number of tokens."""
        raise NotImplementedError

    def compute_exactly(self, exact: bool) -> None:
        """Compute in float32 without TF32, or in what suits the device, where that was left open; else no effect."""

    def change_weights(self, how: str, change: Callable[[nn.Module], object]) -> None:
        """Let `change` replace layers of the encoder, by rounded ones for example; `how` names what it does."""
        change(self)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Unpadded embeddings `[S, Dc]`, one per prompt, without gradients."""
        encoded = self(prompts)
        return [row[mask] for row, mask in zip(encoded.embeddings, encoded.mask, strict=True)]


def bounded(prompt: str, max_length: int) -> str:
    """A prompt of which at most `max_length` tokens count, ready for a tokenizer.

    Bounds the work that a huge prompt can ask for; lone surrogates, which no tokenizer takes, become "?".
    """
    return prompt[: _MAX_CHARACTERS_PER_TOKEN * max_length].encode(errors="replace").decode()


def warn_truncated(prompt: str, max_length: int) -> None:
    """Say that only the beginning of `prompt` counts."""
    logger.warning(
        "prompt of %d characters (%r...) exceeds %d tokens; only its beginning is used",
        len(prompt),
        prompt[:40],
        max_length,
    )
