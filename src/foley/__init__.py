"""foley: train, distil, accelerate and evaluate latent diffusion models for sound."""

__version__ = "0.1.0"
