"""Prompts to conditioning sequences: frozen T5 encoders, and a small encoder that trains with the denoiser."""

from foley.models.text.base import TextConditioner, TextEmbedding
from foley.models.text.cache import CachedText, EmbeddingCache
from foley.models.text.frozen_t5 import FrozenT5Conditioner, TextModelError
from foley.models.text.small import SmallTextEncoder

__all__ = [
    "CachedText",
    "EmbeddingCache",
    "FrozenT5Conditioner",
    "SmallTextEncoder",
    "TextConditioner",
    "TextEmbedding",
    "TextModelError",
]
