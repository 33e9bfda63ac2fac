"""What a converter asks of a published config."""

from collections.abc import Collection, Mapping
from typing import Any


def flat_options(published: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in published.items():
        flat |= flat_options(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def check_options(
    options: Mapping[str, Any], needed: Collection[str], supported: Mapping[str, Collection[Any]], source: str
) -> None:
    """Raises ValueError where an option is missing, or is none of the `supported` values that we build."""
    if missing := [name for name in (*needed, *supported) if name not in options]:
        raise ValueError(
            f"{source}: the config does not say {', '.join(missing)}; it holds only "
            f"{', '.join(sorted(options)) or 'nothing'}. Give the config published with these weights"
        )
    for name, values in supported.items():
        if options[name] not in values:
            raise ValueError(
                f"{source}: `{name}: {options[name]}` is not supported, only {' or '.join(map(str, values))}; "
                "these weights are of another architecture"
            )
