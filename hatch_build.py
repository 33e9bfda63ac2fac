"""What travels in the wheel besides the package: `foley/shipped`, laid out as the checkout (see foley.core.config).

A build hook and no static list, because an editable installation reads the checkout itself and needs no copy.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = (
    *("train.py", "sample.py", "evaluate.py", "scripts", "configs"),
    *("data/demo", "data/extractor", "data/second_extractor", "data/prompts", "data/tokenizer"),
)
LEFT_OUT = {".png", ".pyc"}  # drawings of calibrations; README.md of data/demo links to the JSON beside them


class ShippedFiles(BuildHookInterface):  # type: ignore[misc]
    """Adds the files of `SHIPPED` to a wheel that is to be installed away from the checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Map each file to its place in the wheel."""
        if version != "standard":
            return
        root = Path(self.root)
        files = [
            file
            for name in SHIPPED
            for file in ([root / name] if (root / name).is_file() else (root / name).rglob("*"))
        ]
        kept = [file for file in files if file.is_file() and file.suffix not in LEFT_OUT]
        places = {str(file): f"foley/shipped/{file.relative_to(root)}" for file in kept}
        build_data["force_include"].update(places)
