"""Systems on the Hugging Face hub: what a folder says of itself, its model card, and the way there and back.

A system's folder is shared as it is: configs as JSON, weights as safetensors, its student inside it. Nothing else is
sent or fetched, no pickle and no code. What comes back is compared with the hashes in its `system.json`.
"""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from foley.core.components import ROW_SCALES, WEIGHTS_FILE, CheckpointError, read_config
from foley.core.config import is_repository
from foley.core.hub import Hub
from foley.core.logs import get_logger
from foley.core.reading import read_json, reading
from foley.system.checkpoint import SHARED_FILES, SYSTEM_FILE, fetched, system_parts
from foley.system.system import STUDENT_FOLDER, check_system

TRAINING_FILE, ATTRIBUTION_FILE, CARD_FILE = "training.json", "ATTRIBUTION.md", "README.md"
_TEMPLATE = "card.md"
_log = get_logger(__name__)


# ---------------------------------------------------------------- what a folder says of itself


def describe(system: Path) -> dict[str, Any]:
    """Its parts, sizes, calibrations, student, licences of its recordings, and the stages of its training."""
    parts = sorted(file.parent for file in system.rglob(WEIGHTS_FILE))
    training = system / TRAINING_FILE
    stages = []
    if training.is_file():
        content = read_json(training, "the stages of a training run", "write it again with training=")
        with reading(training, "the stages of a training run", "write it again with training="):
            stages = content["stages"]
    return {
        "parts": [_describe_part(folder, str(folder.relative_to(system))) for folder in parts],
        "megabytes": sum(file.stat().st_size for file in system.rglob("*") if file.is_file()) / 1e6,
        "calibrations": sorted(file.stem for file in system.glob("calibration/*.json")),
        "has_student": (system / STUDENT_FOLDER).is_dir(),
        "licences": _read_licences(system / ATTRIBUTION_FILE),
        "stages": stages,
        "hours": sum(stage["seconds"] for stage in stages) / 3600,
    }


def _describe_part(folder: Path, name: str) -> dict[str, Any]:
    """A component's parameters, and its class and size in words."""
    config = read_config(folder)
    sizes = ("width", "depth", "dim", "latent_channels", "sample_rate_hz")
    what = ", ".join(f"{size.replace('_', ' ')} {config[size]}" for size in sizes if size in config)
    kind = config["_target_"].rpartition(".")[2]
    return {"name": name, "parameters": count_parameters(folder / WEIGHTS_FILE), "what": f"{kind}; {what}"}


def count_parameters(weights: Path) -> int:
    """Elements of all tensors in a component's file of weights."""
    with safe_open(weights, framework="pt") as tensors:
        names = (name for name in tensors.keys() if not name.endswith(ROW_SCALES))  # noqa: SIM118  (no mapping)
        return sum(tensors.get_tensor(name).numel() for name in names)


def _read_licences(attribution: Path) -> dict[str, int]:
    """Clips of each licence, out of the table that scripts/write_attributions.py writes; empty without it."""
    if not attribution.is_file():
        return {}
    rows = re.findall(r"^\| .* \| ([^|]+) \| (\d+) \|$", attribution.read_text(encoding="utf-8"), re.MULTILINE)
    counts: Counter[str] = Counter()
    for licence, clips in rows:
        counts[licence] += int(clips)
    return dict(counts.most_common())


# ---------------------------------------------------------------- there


def push_system(folder: str | Path, repository: str, licence: str | None = None, private: bool = False) -> str:
    """Put an exported system's folder on the hub, with its card, in one commit; returns the commit's address.

    Args:
        repository: OWNER/NAME, made where there is none.
        licence: of the weights, as the hub names it ("cc-by-4.0", "mit", "other", ...); None where the folder's own
            card says it.

    Raises:
        CheckpointError: for a folder that holds no whole system, or parts that lie outside it.
        ValueError: where nobody says the licence, and for a name without its owner.
        HubError: where the hub refuses.
    """
    if not is_repository(repository):
        raise ValueError(f"repository={repository}: give OWNER/NAME, of letters, digits, '.', '_' and '-'")
    folder = Path(folder).expanduser()
    for each in check_system(folder):
        _refuse_strangers(each, folder)
    card = model_card(folder, repository, licence)  # before anything is sent
    sent: dict[str, Path | bytes] = {file.relative_to(folder).as_posix(): file for file in _shared_files(folder)}
    sent[CARD_FILE] = card.encode()
    _log.info("sending %d files to %s: %s", len(sent), repository, ", ".join(sorted(sent)))
    return Hub().upload(repository, sent, f"A system of foley, {_hash_of(folder)[:12]}", private)


def _refuse_strangers(system: Path, folder: Path) -> None:
    outside = [path for path in system_parts(system).values() if not path.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise CheckpointError(
            f"{system / SYSTEM_FILE} refers to {outside[0]}, outside of {folder}; export the system again without "
            "share_with=, or share the folder that holds both"
        )


def _shared_files(folder: Path) -> list[Path]:
    """What is sent, none of it hidden; which of the other files are left behind is said."""
    inside = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    visible = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    sent = [file for file in visible if any(file.match(pattern) for pattern in SHARED_FILES)]
    if left := [file.relative_to(folder).as_posix() for file in visible if file not in sent]:
        _log.warning("not shared, for a system's folder holds no such files: %s", ", ".join(left))
    return sent


def model_card(folder: Path, repository: str, licence: str | None = None) -> str:
    """The card for the hub: the folder's own text where it has one, or else what `training.json` and the parts say.

    Its header names the licence, the task and the hash of the system. Raises ValueError where nobody says the licence.
    """
    own = _own_card(folder / CARD_FILE)
    licence = licence or (own.data.get("license") if own else None)
    if licence is None:
        raise ValueError(
            f"{folder}: nothing says the licence of the weights; give licence=, as the hub names it: cc-by-4.0, mit, "
            "other, ..."
        )
    header = ModelCardData(
        license=licence,
        library_name="foley",
        pipeline_tag="text-to-audio",
        tags=["text-to-audio", "latent-diffusion", "foley"],
        foley_system_sha256=_hash_of(folder),
    )
    if own is not None:
        return f"---\n{header.to_yaml()}\n---\n\n{own.text.lstrip()}"
    facts: Mapping[str, Any] = {"card": describe(folder), "repository": repository, "system_hash": _hash_of(folder)}
    template = files("foley.system").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return str(ModelCard.from_template(header, template_str=template, licence=licence, **facts))


def _own_card(file: Path) -> ModelCard | None:
    """What the folder says of itself; one without a header has an empty one, which the library would warn of."""
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    return ModelCard(text if text.startswith("---\n") else f"---\n{{}}\n---\n{text}")


def _hash_of(folder: Path) -> str:
    return str(read_json(folder / SYSTEM_FILE, "the description of a system", "export it again")["sha256"])


# ---------------------------------------------------------------- and back


def pull_system(
    source: str | Path,
    revision: str | None = None,
    output_dir: str | Path | None = None,
    sha256: str | None = None,
    hub_dir: str | Path | None = None,
) -> Path:
    """The folder of a system on the hub, or `source` itself where that is a folder, every file of it checked.

    What is on the hub now is fetched; without a network, what was fetched last is taken.

    Args:
        source: OWNER/NAME, or a folder.
        revision: branch, tag or commit.
        output_dir: a new folder to copy it to; None leaves it in the hub's cache.
        sha256: of the system, as its card says it; any other one is refused.
        hub_dir: a folder laid out as the hub is, instead of the network.

    Raises:
        CheckpointError: where it cannot be had, was altered, or has another hash.
        FileExistsError: where `output_dir` exists.
    """
    target = None if output_dir is None else Path(output_dir).expanduser()
    if target is not None and target.exists():  # before anything is fetched
        raise FileExistsError(f"{target} exists already; give a new folder as output_dir")
    folder = Path(fetched(str(source), hub_dir, revision)).expanduser()
    check_system(folder)
    if sha256 is not None and _hash_of(folder) != sha256:
        raise CheckpointError(f"{source} holds the system {_hash_of(folder)}, not {sha256} (sha256)")
    if target is None:
        return folder
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        # The cache holds links; what was named there is copied, whole or not at all.
        (Path(shutil.copytree(folder, Path(beside) / target.name))).rename(target)
    return target
