"""Imports run downwards only: walks the imports of the package and compares them with the allowed layers."""

import ast
from pathlib import Path

import foley

PACKAGE = Path(foley.__file__).parent
BASE = {"config", "seeding", "hashing", "logs", "checkpoint", "durations", "files", "hub", "resampling"}
EVERYTHING = {""}
ALLOWED = {
    **{name: set() for name in BASE},
    "nn": {"nn"},
    "models": {"models", "nn"},
    "diffusion": {"diffusion"},
    "losses": {"losses"},
    "metrics": {"metrics", "reporting.tables"},
    "data": {"data"},
    "judging": {"data", "metrics", "prompts"},
    "references": {"data", "metrics"},
    "novelty": set(),
    "prompts": {"prompts"},
    "reporting": {"reporting"},
    "accel": {"accel", "nn", "diffusion.types"},
    "convert": {"convert", "models", "nn"},
    "published": EVERYTHING,
    "training": EVERYTHING,
    "inference": set(),
    "decoding": {"inference", "models", "nn"},
    "editing": {"editing", "data"},
    "generation": {"generation", "diffusion", "reporting"},
    "pipeline": EVERYTHING,
    "requests": EVERYTHING,
    "test_set": {"generation", "prompts", "reporting", "test_set"},
    "system": EVERYTHING,
}
"""Layer to what it may import besides the base. A missing layer is an error: say where a new package belongs."""


def imported_modules(file: Path, package: Path) -> set[str]:
    """Names inside `foley` that a file imports, without the leading `foley.`; relative imports are resolved."""
    here = ["foley", *file.relative_to(package).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*parent, *([node.module] if node.module else [])])
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return {name.removeprefix("foley.") for name in names if name.startswith("foley.")}


def within(name: str, layer: str) -> bool:
    return not layer or name == layer or name.startswith(f"{layer}.")


def violations(package: Path) -> list[str]:
    found = []
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package)
        layer = relative.parts[0].removesuffix(".py")
        if layer == "__init__":
            layer = "config"
        if layer not in ALLOWED:
            found.append(f"{relative}: layer {layer!r} has no rule")
            continue
        allowed = BASE | ALLOWED[layer]
        for name in sorted(imported_modules(file, package)):
            if not any(within(name, target) for target in allowed):
                found.append(f"{relative}: {layer} may not import foley.{name}")
    return found


def write(package: Path, name: str, text: str) -> None:
    file = package / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_imports_run_downwards_only():
    assert violations(PACKAGE) == []


def test_a_violation_is_found_however_it_is_written(tmp_path):
    write(tmp_path, "accel/a.py", "from foley.diffusion import process\n")
    write(tmp_path, "diffusion/b.py", "def late():\n    import foley.models.dit\n")
    write(tmp_path, "losses/c.py", "from ..models.vae import encoder\n")
    write(tmp_path, "seeding.py", "from foley import nn\n")
    write(tmp_path, "novel/d.py", "")
    assert violations(tmp_path) == [
        "accel/a.py: accel may not import foley.diffusion.process",
        "diffusion/b.py: diffusion may not import foley.models.dit",
        "losses/c.py: losses may not import foley.models.vae.encoder",
        "novel/d.py: layer 'novel' has no rule",
        "seeding.py: seeding may not import foley.nn",
    ]


def test_allowed_imports_pass(tmp_path):
    write(tmp_path, "accel/a.py", "from foley.diffusion.types import StepContext\nfrom foley.nn import attention\n")
    write(tmp_path, "models/b.py", "import torch\nfrom foley.nn.norm import ModulatedNorm\nfrom foley.logs import x\n")
    write(tmp_path, "training/c.py", "from foley.models import dit\nfrom foley import metrics\n")
    assert violations(tmp_path) == []
