"""Layers of torch alone, from which models are built: attention, modulation, embeddings, convolutions, transforms."""
