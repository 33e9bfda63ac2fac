"""Prompts to conditioning sequences: frozen T5 encoders, a small encoder that trains along, precomputed features."""

from foley.models.text.base import TEXT_MULTIPLE, TextConditioner, TextEmbedding
from foley.models.text.clap_t5 import ClapT5Conditioner
from foley.models.text.features import FeatureConditioner, FeatureError, feature_files
from foley.models.text.frozen_t5 import FrozenEncoder, FrozenT5Conditioner, TextModelError
from foley.models.text.kept import CachedText, EmbeddingCache, StoredText, encoder_identity
from foley.models.text.small import SmallTextEncoder

__all__ = [
    "TEXT_MULTIPLE",
    "CachedText",
    "ClapT5Conditioner",
    "EmbeddingCache",
    "FeatureConditioner",
    "FeatureError",
    "FrozenEncoder",
    "FrozenT5Conditioner",
    "SmallTextEncoder",
    "StoredText",
    "TextConditioner",
    "TextEmbedding",
    "TextModelError",
    "encoder_identity",
    "feature_files",
]
