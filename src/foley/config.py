"""Paths of the project, and the OmegaConf resolvers that the configs use."""

from pathlib import Path

from omegaconf import OmegaConf

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def register_resolvers() -> None:
    """`${project_root:}` is the checkout's root, wherever the command is run from."""
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)


register_resolvers()
