"""What is looked at in the options of sample.py before anything is loaded: numbers, and options that change nothing."""

from collections.abc import Callable, Collection
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from foley.core.config import is_pipeline, published_name
from foley.core.logs import get_logger
from foley.core.numbers import shown
from foley.generation.options import IDLE, OPTION_NUMBERS

_log = get_logger(__name__)

RECORDINGS = ("edit", "init", "control")
"""Options that name a recording to start from."""
# What the system decides, or does without, where it is null.
_OPTIONAL = {"duration_seconds", "window_seconds", "decode_chunk_seconds", "trained_seconds", "steps"}
_OPTIONAL |= {"loudness_lufs", "guidance_scale", "mask_start_seconds", "mask_length_seconds"}


def check_numbers(cfg: DictConfig) -> None:
    """Raise ValueError, which names the option, for one that should be a number and is none, or an impossible one."""
    for name, numbers in OPTION_NUMBERS.items():
        if cfg[name] is not None or name not in _OPTIONAL:
            numbers.check(name, cfg[name])
    if cfg.duration_seconds is not None and cfg.duration_seconds > cfg.max_duration_seconds:
        raise ValueError(
            f"duration_seconds={cfg.duration_seconds} must be at most {cfg.max_duration_seconds} (max_duration_seconds)"
        )


def check_source(cfg: DictConfig) -> None:
    """Raise ValueError for options of a recording to start from that do not go together, or lack one."""
    given = [f"{option}={cfg[option]}" for option in RECORDINGS if cfg[option] is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
    one = cfg.mask_start_seconds, cfg.mask_length_seconds
    if cfg.edit is None and (*one, cfg.masks) != (None, None, None):
        raise ValueError(
            "mask_start_seconds and mask_length_seconds, or masks, say what to replace: give edit=FILE too"
        )
    if cfg.masks is not None and one != (None, None):
        raise ValueError(
            "masks= stands in the place of mask_start_seconds= and mask_length_seconds=: give them or masks="
        )
    if cfg.edit is not None and cfg.masks is None and None in one:
        raise ValueError(
            f"edit={cfg.edit} replaces a part of the recording: give mask_start_seconds= and mask_length_seconds= "
            f"(now {shown(one[0])} and {shown(one[1])}), or masks="
        )


def _recording(cfg: DictConfig) -> bool:
    return any(cfg[option] is not None for option in RECORDINGS)


def _guided(cfg: DictConfig) -> bool:
    return bool(cfg.guidance_scale != 1)


def _longer_than_a_window(cfg: DictConfig) -> bool:
    return _recording(cfg) or cfg.duration_seconds is None or cfg.duration_seconds > cfg.window_seconds


def _reuses(cfg: DictConfig) -> bool:
    """Whether the caching policy lets anything be reused."""
    always = {"threshold": 0, "alpha": 0, "interval": 1, "target_speedup": 1}
    return all(cfg.accel.get(name) != value for name, value in always.items())


_Has = Callable[[DictConfig], Any]
_PROMPTS: tuple[_Has, str] = (lambda cfg: cfg.prompts is not None, "without prompts=FILE")
_PUBLISHED: tuple[_Has, str] = (
    lambda cfg: published_name(cfg.system) is not None or is_pipeline(cfg.system),
    "without a published system",
)
EFFECT: dict[str, tuple[_Has, str]] = {
    "duration_seconds": (lambda cfg: not _recording(cfg), IDLE["duration_seconds"]),
    "negative_prompt": (_guided, IDLE["negative_prompt"]),
    "guidance_rescale": (_guided, IDLE["guidance_rescale"]),
    "overlap_seconds": (lambda cfg: cfg.window_seconds is not None, IDLE["overlap_seconds"]),
    "window_seconds": (_longer_than_a_window, "on clips that are no longer than a window"),
    "strength": (lambda cfg: cfg.init is not None, "without init=FILE"),
    "control_scale": (lambda cfg: cfg.control is not None, "without control=FILE"),
    "downmix": (_recording, "without edit=FILE, init=FILE or control=FILE"),
    "boundary_seconds": (lambda cfg: cfg.edit is not None, "without edit=FILE"),
    "trained_seconds": (lambda cfg: cfg.rotary_extension is not None, "without rotary_extension"),
    "caption_seed": (lambda cfg: cfg.captions == "random", "without captions=random"),
    **dict.fromkeys(("caption_column", "id_column", "clip_column", "split_column", "split", "captions"), _PROMPTS),
    **dict.fromkeys(("hub_dir", "system_overrides"), _PUBLISHED),
    "ddp_strategy": (lambda cfg: cfg.trainer is not None, "without trainer=ddp"),
    "accel.seed": (lambda cfg: cfg.accel.get("ratio") != 0, "with accel.ratio=0, which draws nothing"),
    "accel.double_count": (
        lambda cfg: cfg.accel.ratio != 0 and cfg.accel.same_frequency,
        "unless tokens can be in both sets: accel.same_frequency=true and accel.ratio above 0",
    ),
    "accel.max_lookahead": (lambda cfg: cfg.accel.alpha != 0, "with accel.alpha=0, which computes always"),
    "accel.reuse": (_reuses, "where every layer computes always"),
}
"""Options that depend on others: whether one has an effect in a request, and where it has none."""


def typed_options() -> set[str]:
    """The options on the command line that began this process; none outside of a command."""
    if not HydraConfig.initialized():
        return set()
    return {override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task}


def warn_without_effect(cfg: DictConfig, typed: Collection[str]) -> None:
    """Name each option that was typed and changes nothing in this request."""
    for option, (has_effect, without) in EFFECT.items():
        named = any(name == option or name.startswith(f"{option}.") for name in typed)
        if named and OmegaConf.select(cfg, option) is not None and not has_effect(cfg):
            _log.warning("%s has no effect %s", option, without)
