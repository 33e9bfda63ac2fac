"""What a training run needs, looked for before it begins and before PyTorch is loaded: one message names all of it.

Nothing here imports what takes time.
"""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from foley.core.config import default_hub_dir, published_config, published_name

_log = logging.getLogger(__name__)

_MADE_BY = {
    "data.cache_dir": "latents, made by: foley encode codec_path=CODEC data=manifest data.splits.manifest=FILE "
    "output_dir=FOLDER; of preferences, made by: foley prefer system=SYSTEM prompts=FILE output_dir=FOLDER",
    "data.text_dir": "embeddings of captions, made by: foley encode-text captions=LATENTS text=NAME output_dir=FOLDER",
    "data.splits": "clips: data=manifest data.splits.manifest=FILE, data=shards data.splits.url=FOLDER, data=demo, ...",
    "data.splits.folder": "a folder of audio",
    "data.splits.manifest": "a CSV or JSONL file with `path` and `caption`, made by: foley prepare --help, or by hand",
    "data.splits.url": "a folder or URL of shards, made by: foley shards manifest=FILE output=FOLDER",
    "system": "the teacher, or what is controlled or tuned: a system's folder, a .ckpt, or a published system's name",
    "text.directory": "a folder of precomputed features, <clip id>.safetensors",
    "callbacks.evaluation.reference": "real clips to compare with: a folder or a manifest",
    "codec_path": "the codec that made the latents",
    "ckpt": "the weights to start from: a .ckpt file, a folder (of a run, a system, a component), or a published name",
}
"""What stands for `???` or for a path in a recipe, and the command that makes it."""

_INDEXED = {"data.cache_dir": "latents", "data.text_dir": "embeddings"}
_NAMED = ("system", "ckpt", "codec_path")  # by a path, or a published name
_PATHS = (*_INDEXED, "data.splits.manifest", "data.splits.url", "text.directory", *_NAMED)

_CODECS = {
    "waveform_vae.WaveformVAE": "made by: foley train experiment=waveform_vae data=manifest data.splits.manifest=FILE, "
    "or from published weights by foley convert",
    "spectral_vae.SpectralVAE": "data/demo/codec ships, and foley train experiment=tiny_vae makes another",
    "oobleck.OobleckCodec": "the folder vae of stabilityai/stable-audio-open-1.0 on the hub",
    "dac.DACCodec": "a file of descript-audio-codec's releases, weights_44khz.pth or weights_24khz.pth",
    "mel_codec.MelCodec": "made by: foley train experiment=audiolcm_mel_vae, experiment=bigvgan; foley join-mel-codec",
}
"""Class of a codec to the command that makes it."""

_DOWNLOAD_GIGABYTES = {
    **{"google/flan-t5-xl": 11.4, "google/flan-t5-large": 3.1, "google-t5/t5-base": 0.9},
    **{"google/t5-v1_1-large": 3.1, "microsoft/msclap": 2.3},
    **{"ezaudio_xl": 3.5, "ezaudio_l": 2.4},  # by the parameters of their denoisers, in float32
}

_LESS_MEMORY = "; model.gradient_checkpointing=true takes far less, and a third longer"

Lack = tuple[str, str]
"""An option, and what it wants."""


def refuse_missing(cfg: DictConfig) -> None:
    """Raise SystemExit with a line for everything that this run lacks; nothing has been loaded yet.

    What it would merely do better with is said only beside what it cannot do without; a GPU that is smaller than the
    recipe's own estimate is a warning.
    """
    if is_synthetic(cfg):
        return
    lacks = [*_unset(cfg), *_absent(cfg), *_decoder(cfg), *_published(cfg), *_text_weights(cfg), *_gpu(cfg)]
    if not lacks:
        return
    lines = [f"  {option}  {words}" for option, words in [*lacks, *_codec(cfg)]]
    raise SystemExit("\n".join([f"{cfg.name or 'this run'} cannot train yet; it lacks", *lines, *_ways_out(cfg)]))


def is_synthetic(cfg: DictConfig) -> bool:
    """Whether this is `data=synthetic`, which needs nothing (`foley.training.synthetic`)."""
    return str(_selected(cfg, "data._target_")).startswith("foley.training.synthetic.")


def _ways_out(cfg: DictConfig) -> list[str]:
    recipe = f"experiment={cfg.name} " if cfg.name else ""
    return [
        f"Without any of it: foley train {recipe}data=synthetic measures step time and memory on random data; "
        "foley train alone trains a small system on what ships, in a minute."
    ]


def _unset(cfg: DictConfig) -> Iterator[Lack]:
    """Options that the recipe leaves to the user."""
    for key in _missing(OmegaConf.to_container(cfg, resolve=False)):
        yield f"{key}=...", _MADE_BY.get(key, "see its comment in configs/").replace("CODEC", _codec_of(cfg))


def _codec_of(cfg: DictConfig) -> str:
    """What to write for the recipe's codec: that of the small recipes ships."""
    return "data/demo/codec" if str(_selected(cfg, "codec._target_")).endswith("SpectralVAE") else "CODEC"


def _missing(node: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the values that are `???` themselves, not those that refer to one."""
    if node == "???":
        yield name
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _missing(value, f"{name}.{key}".lstrip("."))


def _absent(cfg: DictConfig) -> Iterator[Lack]:
    """Files and folders that are named but do not exist."""
    for key in _PATHS:
        path = _selected(cfg, key)
        known = path is None or "://" in str(path) or (key in _NAMED and published_name(path) is not None)
        wanted = _INDEXED.get(key)
        file = Path(str(path)).expanduser() / ("index.json" if wanted else "")
        optional = key == "data.splits.manifest" and _selected(cfg, "data.splits.optional")
        if not known and not optional and not file.exists():
            yield f"{key}={path}", f"{f'no {wanted} are there' if wanted else 'does not exist'}; {_MADE_BY[key]}"


def _selected(cfg: DictConfig, key: str) -> Any:
    """A value by its dotted name; None where there is none, or where it refers to one that is missing."""
    return OmegaConf.select(cfg, key, default=None, throw_on_resolution_failure=False)


def _codec(cfg: DictConfig) -> Iterator[Lack]:
    """The codec, where sounds would be made with it."""
    listens = any(_selected(cfg, f"callbacks.{name}._target_") for name in ("audio_samples", "evaluation"))
    if not cfg.codec_path and listens:
        target = str(_selected(cfg, "codec._target_"))
        made_by = next((words for name, words in _CODECS.items() if target.endswith(name)), "the teacher's own")
        yield "codec_path=...", f"{_MADE_BY['codec_path']}, {made_by}; without it there are no samples to hear"


def _decoder(cfg: DictConfig) -> Iterator[Lack]:
    """The codec that decodes latents in training, where the system does not bring it."""
    if _selected(cfg, "task.codec.name") == "codec" and not cfg.codec_path:
        yield "codec_path=...", f"{_MADE_BY['codec_path']}: that of the system"


def _published(cfg: DictConfig) -> Iterator[Lack]:
    """The files of published weights, to distil or to begin with, that are not on this machine."""
    named = {published_name(_selected(cfg, option)): option for option in reversed(_NAMED)}
    for name, option in named.items():
        if name is not None:
            yield from _published_files(name, option)
    teacher = published_name(_selected(cfg, "system"))
    text = teacher and _selected(published_config(teacher).published, "configs.text.name_or_path")
    if text and not _selected(cfg, "data.text_dir") and not _in_hub_cache(text, "main"):
        size = f"{_DOWNLOAD_GIGABYTES[text]:g} GB" if text in _DOWNLOAD_GIGABYTES else "weights"
        yield f"system={teacher}", f"its text encoder, {size} that are not on this machine, by: hf download {text}"


def _published_files(name: str, option: str) -> Iterator[Lack]:
    published = published_config(name).published
    keys = ("codec_file",) if option == "codec_path" else ("denoiser_file", "codec_file", "controlnet_file")
    files = [published[key] for key in keys if key in published] or ["model_index.json"]
    if lacking := [file for file in files if not _cached(published.repository, file, "main")]:
        size = f"{_DOWNLOAD_GIGABYTES[name]:g} GB or more" if name in _DOWNLOAD_GIGABYTES else "weights"
        what = " ".join([published.repository, *(lacking if "denoiser_file" in published else ())])
        yield f"{option}={name}", f"{size} that are not on this machine, fetched by: hf download {what}"


def _text_weights(cfg: DictConfig) -> Iterator[Lack]:
    """The files of a frozen text encoder that this stage trains with; stored embeddings need none."""
    text = None if _selected(cfg, "data.text_dir") else _selected(cfg, "task.text")
    if text is None or "name_or_path" not in text:
        return
    for option, name in _absent_encoders(text):
        size = f"{_DOWNLOAD_GIGABYTES[name]:g} GB" if name in _DOWNLOAD_GIGABYTES else "the files"
        if not text.download:
            yield (
                "text.download=true",
                f"fetches {size} of {name}, which is not on this machine; or: hf download {name}",
            )
        elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            yield f"text.{option}={name}", f"is not on this machine, and HF_HUB_OFFLINE forbids to fetch {size}"
        else:
            _log.warning("%s is not on this machine: %s will be fetched", name, size)


def _absent_encoders(text: DictConfig) -> Iterator[Lack]:
    """Options of a frozen encoder that name what is neither a path nor in the cache of the hub."""
    cached: dict[str, Callable[[str], bool]] = {"name_or_path": lambda name: _in_hub_cache(name, text.revision)}
    if "weights" in text:
        from foley.models.text.clap_t5 import CLAP_FILE  # with PyTorch, which few commands with a lack would load

        files = {"bert": "config.json", "weights": CLAP_FILE}
        cached |= {option: partial(_cached, file=file, revision="main") for option, file in files.items()}
    for option, is_cached in cached.items():
        if not Path(text[option]).expanduser().exists() and not is_cached(text[option]):
            yield option, text[option]


def _in_hub_cache(name: str, revision: str) -> bool:
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return _cached(name, "config.json", revision) and any(_cached(name, file, revision) for file in files)


def _cached(name: str, file: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if (folder := default_hub_dir()) is not None:
        return (folder / name / file).is_file()
    return isinstance(try_to_load_from_cache(name, file, revision=revision), str)


def _gpu(cfg: DictConfig) -> Iterator[Lack]:
    """A GPU, where the trainer is to run on one."""
    if _selected(cfg, "trainer.accelerator") not in ("gpu", "cuda"):
        return
    wanted, memory = cfg.gpu_memory_gib, gpu_memory_gib()
    size = f" of {wanted:g} GiB or more" if wanted else ""
    if memory is None:
        yield "trainer=cpu", f"there is no GPU here, and the recipe wants one{size}; on the CPU it takes far longer"
    elif wanted and memory and min(memory) < wanted:
        less = _LESS_MEMORY if _selected(cfg, "model.gradient_checkpointing") is False else ""
        _log.warning(
            "the recipe wants GPUs%s by its estimate; the smallest here has %.0f GiB%s", size, min(memory), less
        )


def gpu_memory_gib() -> list[float] | None:
    """GiB of each NVIDIA GPU that may be used; None where there is no GPU, empty for those that do not tell."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        return [int(mebibytes) / 1024 for mebibytes in told if mebibytes.isdecimal()] or None
    return [] if any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd")) else None
