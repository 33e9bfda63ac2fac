"""From the options of `foley serve` to a server that runs."""

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from fastapi import FastAPI
from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.accel.combined import NoAcceleration
from foley.cli.sampling import chosen_sampling, open_system
from foley.core.components import CheckpointError
from foley.core.config import published_name
from foley.core.devices import resolve_devices
from foley.core.logs import get_logger
from foley.core.numbers import COUNT, NOT_NEGATIVE, POSITIVE, NumberRange
from foley.core.pipelines import system_config
from foley.generation.settings import GenerationSettings
from foley.serving.app import LOCAL_HOSTS, Access, create_app
from foley.serving.engine import Engine, Served
from foley.serving.jobs import DEFAULT_ACCELERATOR, STUDENT, KeptJobs
from foley.serving.server import run, server_config
from foley.serving.service import Limits, Service
from foley.system.checkpoint import fetched
from foley.system.system import student_of

KEY_VARIABLE = "FOLEY_API_KEY"
_NUMBERS = {
    **dict.fromkeys(
        ("batch_size", "queue_size", "max_num", "max_steps", "max_upload_bytes", "keep_jobs", "max_connections"), COUNT
    ),
    **dict.fromkeys(("timeout_seconds", "max_upload_seconds", "max_duration_seconds"), POSITIVE),
    **dict.fromkeys(("drain_seconds", "keep_seconds", "keep_bytes", "batch_wait_seconds"), NOT_NEGATIVE),
    "port": NumberRange(least=0, most=65_535, whole=True),
}
_log = get_logger(__name__)


def serve(cfg: DictConfig) -> None:
    """Load what is to be served on every device, and serve it until a signal."""
    mount_page = page_mounter() if cfg.page else None  # before anything is loaded
    service, access = open_service(cfg), chosen_access(cfg)
    app = create_app(service, access)
    if mount_page is not None:
        mount_page(app, service, access, cfg.keep_bytes)
    run(server_config(app, cfg.host, cfg.port, cfg.access_log, cfg.max_connections), service, cfg.drain_seconds)


def page_mounter() -> Callable[[FastAPI, Service, Access, int], None]:
    """`foley.serving.page.mount_page`; raises ModuleNotFoundError, which names the extra, without Gradio."""
    try:
        from foley.serving.page import mount_page
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"page=true wants {error.name}: pip install 'foley[page]'") from error
    return mount_page


def open_service(cfg: DictConfig) -> Service:
    """Engine and service; raises ValueError for impossible options, and CheckpointError as `open_system` does."""
    for name, numbers in _NUMBERS.items():
        numbers.check(name, cfg[name])
    devices, systems = resolve_devices(cfg.device), chosen_systems(cfg)
    loaded = [{name: open_served(cfg, systems, name, device) for name in systems} for device in devices]
    waiting = cfg.queue_size, cfg.batch_size, cfg.batch_wait_seconds, cfg.timeout_seconds
    limits = Limits(**{name: cfg[name] for name in Limits.__dataclass_fields__})
    kept = KeptJobs(cfg.keep_jobs, cfg.keep_bytes, cfg.keep_seconds)
    names = ", ".join(systems)
    _log.info("serving %s on %s", names, ", ".join(map(str, devices)))
    return Service(Engine(loaded, *waiting), limits, kept)


def chosen_systems(cfg: DictConfig) -> dict[str, str]:
    """What each model of the server is loaded from, by name: `system=`, its student, and `models=`.

    Raises CheckpointError where a student is asked for and there is none, ValueError where a name is given twice.
    """
    name = published_name(cfg.system) or Path(str(cfg.system)).resolve().name.removesuffix(".ckpt")
    systems = {name: str(cfg.system)}
    if (student := _student(cfg)) is not None:
        systems[f"{name}{STUDENT}"] = student
    if twice := systems.keys() & cfg.models.keys():
        raise ValueError(f"models: {', '.join(sorted(twice))} is the name of system= already; give another")
    return systems | {str(name): str(system) for name, system in cfg.models.items()}


def _student(cfg: DictConfig) -> str | None:
    """The folder of the student inside the system's, where it is wanted."""
    if cfg.student is False or system_config(cfg.system, hub_dir=cfg.hub_dir) is not None:
        return None
    try:
        return str(student_of(Path(fetched(cfg.system, cfg.hub_dir))))
    except CheckpointError:
        if cfg.student is True:
            raise
        return None


def open_served(cfg: DictConfig, systems: dict[str, str], name: str, device: torch.device) -> Served:
    """A system on a device, with accelerators of its own; options of sampling, and `accel=`, are of the first alone."""
    own, is_first = deepcopy(cfg), name == next(iter(systems))
    own.system = systems[name]
    if not is_first:
        own.codec_path, own.system_overrides, own.adapters = None, {}, []
    accelerators = {DEFAULT_ACCELERATOR: instantiate(own.accel) if is_first else NoAcceleration()}
    accelerators |= {str(key): instantiate(own.accelerators[key]) for key in own.accelerators}
    sampling = chosen_sampling(own) | {"duration_seconds": own.duration_seconds} if is_first else {}
    lengths = {option: cfg[option] for option in ("window_seconds", "overlap_seconds", "decode_chunk_seconds")}
    marks = {option: cfg[option] for option in ("loudness_lufs", "fade_seconds", "provenance", "watermark")}
    defaults = GenerationSettings(**sampling, **lengths, **marks, facts={"model": name})
    return Served(open_system(own, device), accelerators, defaults)


def chosen_access(cfg: DictConfig) -> Access:
    """Who is answered: the machine itself alone, unless another `host=` is given."""
    key, is_local = os.environ.get(KEY_VARIABLE) or None, cfg.host in LOCAL_HOSTS
    if not is_local and key is None:
        _log.warning("host=%s: whoever reaches this machine may generate; set %s to a key", cfg.host, KEY_VARIABLE)
    hosts = cfg.hosts or (LOCAL_HOSTS if is_local else ("*",))
    return Access(key, tuple(hosts), tuple(cfg.cors_origins))
