"""Synthetic sounds with exact labels and varied captions."""

from foley.data.procedural.captions import captions_for
from foley.data.procedural.dataset import CLASS_NAMES, ProceduralDataset, components_of

__all__ = ["CLASS_NAMES", "ProceduralDataset", "captions_for", "components_of"]
