"""Stands where a frozen text encoder stands whose weights are not at hand: embeddings of its shape, out of noise."""

import torch

from foley.core.seeding import torch_generator
from foley.models.text.base import TextConditioner, TextEmbedding


class RandomEmbeddings(TextConditioner):
    """Embeddings `[B, max_length, dim]` that depend on the prompt alone, every token valid.

    For measurements: a denoiser costs the same with them as with embeddings of the longest prompt. Nothing can be
    learned from them.

    Args:
        dim: width Dc of the embeddings.
        max_length: tokens S of every prompt.

    Example:
        >>> RandomEmbeddings(dim=16, max_length=40)(["a dog barks", ""]).embeddings.shape
        torch.Size([2, 40, 16])
    """

    trainable = False
    place: torch.Tensor

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.dim, self.max_length = dim, max_length
        self.register_buffer("place", torch.empty(0), persistent=False)  # follows the module to its device

    def forward(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`."""
        rows = {prompt: self._row(prompt) for prompt in prompts}  # each distinct prompt once
        embeddings = torch.stack([rows[prompt] for prompt in prompts]).to(self.place)
        return TextEmbedding(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device))

    def _row(self, prompt: str) -> torch.Tensor:
        return torch.randn(self.max_length, self.dim, generator=torch_generator("random embeddings", prompt))
