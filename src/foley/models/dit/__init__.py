"""Diffusion transformers: EzAudio's, AudioLCM's stack of LLaMA blocks, and what masked training and inference add."""
