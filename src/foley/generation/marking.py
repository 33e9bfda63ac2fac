"""What a generated file says of its origin: tags that travel in the file, and a watermark in the sound itself.

The tags name the software, the model's hash, the prompt and the seed: who has these and the settings makes the clip
again. They change no sample, and are lost where a file is converted. The watermark is that of resemble-perth, whose
package brings its network. It changes the sound below 2 kHz, and outlives MP3. It says nothing but that it is there.
"""

import io
import json
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import foley
from foley.core.channels import SILENCE_PEAK
from foley.core.files import one_line
from foley.core.rates import FloatArray, resample
from foley.data.audio import NO_TAGS, read_channels, read_tags

WATERMARK = "resemble-perth"
SOFTWARE = f"foley {foley.__version__}"
SURE = 0.95
"""The confidence from which on a sound counts as watermarked."""
_NETWORK_HZ = 32_000
_LEAST_SAMPLES = 4096  # two windows of its spectrogram
_LONGEST_SECONDS = 60.0  # of a file that is looked into
_MAX_TITLE_CHARACTERS = 200
_MAX_COMMENT_CHARACTERS = 2000  # libsndfile reads no more of an INFO chunk, and a far longer one breaks its WAV


def origin_tags(prompt: str, seed: int, settings: Mapping[str, Any]) -> Mapping[str, str]:
    """The tags of a clip, for `foley.data.audio.write_wav`; none where its settings say `provenance: false`.

    Of a prompt of more than about 1,700 characters they hold the beginning, and say so (`prompt_is_cut`).

    Args:
        settings: what the JSON of the clip says of how it was made.

    >>> tags = origin_tags("a dog barks", 3, {"provenance": True, "model_hash": "ab12"})
    >>> tags["title"], json.loads(tags["comment"])["seed"]
    ('a dog barks', 3)
    """
    if not settings.get("provenance"):
        return NO_TAGS
    origin: dict[str, Any] = {
        "software": SOFTWARE,
        "model_hash": settings.get("model_hash"),
        "prompt": prompt,
        "seed": seed,
    }
    if settings.get("watermark"):
        origin["watermark"] = settings["watermark"]
    # ASCII alone: INFO chunks have no encoding of their own, and old ID3 tags have another one.
    while len(comment := json.dumps(origin)) > _MAX_COMMENT_CHARACTERS:
        origin |= {"prompt": origin["prompt"][: len(origin["prompt"]) * 9 // 10], "prompt_is_cut": True}
    return {"title": one_line(prompt)[:_MAX_TITLE_CHARACTERS], "software": SOFTWARE, "comment": comment}


def read_origin(path: Path) -> dict[str, Any] | None:
    """What `origin_tags` wrote into a file, of whatever format; None where it says nothing. Raises AudioError."""
    try:
        origin = json.loads(read_tags(path).get("comment", ""))
    except (ValueError, RecursionError):  # someone's own comment
        return None
    if not isinstance(origin, dict) or not str(origin.get("software")).startswith("foley "):
        return None
    return origin


@dataclass(frozen=True)
class Marks:
    """What was found in a file: its origin by its tags, and how sure the network is of a watermark, from 0 to 1.

    None where a file has no such tags; where the network is not installed, or the sound is silent.
    """

    origin: Mapping[str, Any] | None
    watermark_confidence: float | None

    @property
    def watermarked(self) -> bool:
        return (self.watermark_confidence or 0.0) >= SURE

    def to_json(self) -> dict[str, Any]:
        """For a file of results."""
        return {**asdict(self), "watermarked": self.watermarked}


def detect(path: Path) -> Marks:
    """Of any audio file, the first minute of it; raises AudioError where it cannot be read."""
    origin = read_origin(path)
    if not can_watermark():
        return Marks(origin, None)
    samples, rate = read_channels(path, max_duration_seconds=_LONGEST_SECONDS)
    found = [value for channel in samples.T if (value := _confidence(channel, rate)) is not None]
    return Marks(origin, max(found, default=None))


def watermarked(audio: Tensor, sample_rate_hz: int) -> Tensor:
    """`audio` `[N, channels, T]` with the watermark in every channel; silence stays as it is.

    The network works at 32 kHz. Only what it adds is brought to the rate of the audio, which else keeps all it has.
    Raises ModuleNotFoundError as `require_watermark` does.
    """
    rows = audio.flatten(0, 1).float().cpu().numpy()
    marked = np.stack([row + _addition(row, sample_rate_hz) for row in rows])
    return torch.from_numpy(marked).reshape(audio.shape).to(audio)


def can_watermark() -> bool:
    """Whether the package is installed."""
    return find_spec("perth") is not None


def require_watermark() -> None:
    """Raise ModuleNotFoundError, which names the extra, where the package is not installed."""
    if not can_watermark():
        raise ModuleNotFoundError(f"watermark=true wants {WATERMARK}: pip install 'foley[watermark]'")


@lru_cache(maxsize=1)
def _network() -> Any:
    """Of the package's files alone, on the CPU."""
    require_watermark()
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it prints which one it has loaded
            warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
            from perth.perth_net.perth_net_implicit.perth_watermarker import PerthImplicitWatermarker

            return PerthImplicitWatermarker()
    except ModuleNotFoundError as error:  # of a library that the package needs and does not ask for
        raise ModuleNotFoundError(f"{WATERMARK} wants {error.name}: pip install 'foley[watermark]'") from error


def _for_network(samples: FloatArray, sample_rate_hz: int) -> FloatArray:
    at_its_rate = resample(samples, sample_rate_hz, _NETWORK_HZ)
    return np.pad(at_its_rate, (0, max(0, _LEAST_SAMPLES - len(at_its_rate))))


def _addition(samples: FloatArray, sample_rate_hz: int) -> FloatArray:
    """What the watermark adds to `[T]`."""
    if np.abs(samples).max() < SILENCE_PEAK:
        return np.zeros_like(samples)
    clean = _for_network(samples, sample_rate_hz)
    with torch.no_grad():
        marked = _network().apply_watermark(clean, sample_rate=_NETWORK_HZ)
    added = np.zeros_like(clean)
    length = min(len(clean), len(marked))
    added[:length] = marked[:length] - clean[:length]
    return resample(added, _NETWORK_HZ, sample_rate_hz)[: len(samples)]


def _confidence(samples: FloatArray, sample_rate_hz: int) -> float | None:
    with torch.no_grad():
        found = _network().get_watermark(_for_network(samples, sample_rate_hz), sample_rate=_NETWORK_HZ, round=False)
    return None if np.isnan(found) else float(cast(float, found))  # not a number: silence
