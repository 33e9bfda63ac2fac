"""Imports run downwards only: walks the imports of the package and compares them with the allowed layers."""

import ast
from pathlib import Path

import foley

PACKAGE = Path(foley.__file__).parent
BELOW_TRAINING = {"accel", "data", "diffusion", "losses", "metrics", "models", "nn", "reporting", "system"}
ALLOWED = {
    "core": {"core"},
    "nn": {"nn"},
    "models": {"models", "nn"},
    "losses": {"losses"},
    "diffusion": {"diffusion"},
    "data": {"data"},
    "accel": {"accel", "nn", "diffusion.context"},
    "metrics": {"metrics"},
    # What reads clips of ours: a judge, references, an audit, and the extractor that ships with its training.
    **{f"metrics.{name}": {"metrics", "data"} for name in ("audit", "judge", "references")},
    **{f"metrics.embedded.{name}": {"metrics", "data"} for name in ("train", "data")},
    "reporting": {"reporting", "metrics", "data.audio"},
    "system": {"system", "accel", "diffusion", "models", "nn"},
    "training": BELOW_TRAINING | {"training"},
    "generation": BELOW_TRAINING | {"generation"},
    "generation.editing": {"data"},
    "generation.decoding": {"accel.precision", "models", "nn"},
    "generation.options": set(),  # known without PyTorch
    "generation.prompts": {"data.ordering", "data.tables", "generation.options"},  # refused as manifests are
    "generation.novelty": set(),
    "serving": {"accel", "data", "diffusion", "generation", "reporting", "serving"},
    "cli": {""},
}
"""Room, or one of its modules, to what it may import besides `core`; the longest name that fits holds.

A missing room is an error: say where a new one belongs.
"""


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


def rule_for(module: str) -> str | None:
    """The longest name in `ALLOWED` that the module lies in."""
    return max((name for name in ALLOWED if within(module, name)), key=len, default=None)


def violations(package: Path) -> list[str]:
    found = []
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if module in ("__init__", "__main__"):
            continue
        rule = rule_for(module)
        if rule is None:
            found.append(f"{relative}: room {relative.parts[0]!r} has no rule")
            continue
        for name in sorted(imported_modules(file, package)):
            if not any(within(name, target) for target in ALLOWED[rule] | {"core"}):
                found.append(f"{relative}: {rule} may not import foley.{name}")
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
    write(tmp_path, "losses/c.py", "from ..models.codec import encoder\n")
    write(tmp_path, "core/seeding.py", "from foley import nn\n")
    write(tmp_path, "metrics/scores.py", "from foley.data.audio import read_audio\n")
    write(tmp_path, "novel/d.py", "")
    assert violations(tmp_path) == [
        "accel/a.py: accel may not import foley.diffusion.process",
        "core/seeding.py: core may not import foley.nn",
        "diffusion/b.py: diffusion may not import foley.models.dit",
        "losses/c.py: losses may not import foley.models.codec.encoder",
        "metrics/scores.py: metrics may not import foley.data.audio.read_audio",
        "novel/d.py: room 'novel' has no rule",
    ]


def test_allowed_imports_pass(tmp_path):
    write(tmp_path, "accel/a.py", "from foley.diffusion.context import StepContext\nfrom foley.nn import attention\n")
    write(tmp_path, "models/b.py", "from foley.nn.adaln import Modulation\nfrom foley.core.logs import x\n")
    write(tmp_path, "training/c.py", "from foley.models import dit\nfrom foley import metrics\n")
    write(tmp_path, "metrics/judge.py", "from foley.data.audio import read_audio\n")
    assert violations(tmp_path) == []
