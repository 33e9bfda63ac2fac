"""Named, versioned evaluation protocols: numbers are comparable only under the same name, version and extractor.

A protocol is a preprocessing, an extractor and the scores made of its features. To add one: a class in
`preprocessing.py`, a network in `extractors/`, and a function here that joins them.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foley.core.components import WEIGHTS_FILE, load_component
from foley.core.hashing import hash_file, hash_module
from foley.metrics.extractors import CaptionExtractor, Extractor, cnn14, passt
from foley.metrics.extractors import clap as clap_extractor
from foley.metrics.extractors import vggish as vggish_extractor
from foley.metrics.extractors.openl3 import OpenL3, openl3_weights
from foley.metrics.extractors.published import PublishedWeights
from foley.metrics.preprocessing import (
    Clap16kHzPreprocessing,
    ClapPreprocessing,
    EmbeddedPreprocessing,
    OpenL3Preprocessing,
    PannsPreprocessing,
    PasstPreprocessing,
    PeakClapPreprocessing,
    Preprocessing,
    VggishPreprocessing,
)

FUSED_CLAP = "laion/clap-htsat-fused"
"""The weights of stable-audio-metrics, 630k-audioset-fusion-best.pt, in transformers' layout."""

EZAUDIO_CLAP = "laion/larger_clap_general"
"""The weights of EzAudio's tables (Hai et al. 2024, footnote 5)."""

_UNRELATED = ("a dog barks", "rain falls on a metal roof", "an opera singer practises scales")
HIGHEST_SIMILARITY = 0.9
"""Of what has nothing to do with each other, to a CLAP that was trained and has its tokenizer."""

_REFERENCE_FIRST, _GENERATED_FIRST = "KL(reference || generated)", "KL(generated || reference)"


class ProtocolError(ValueError):
    """A protocol that does not exist, or whose extractor is absent or not the expected one."""


@dataclass(frozen=True)
class EvaluationProtocol:
    """How clips become features, and which scores are made of these.

    Args:
        preprocessing: from stored audio to the extractor's input.
        extractor_hash: of its weights; reports state it.
        scores: names out of `foley.metrics.scores.SCORES`.
        inception_splits: parts over which the inception score is averaged.
        direction: of the divergence that the protocol's papers report; both are measured.
        crop_seconds: of both sets' clips only the beginning of this length is judged; None: all of it. It is part of
            the protocol: its numbers are no others'. ProtocolError for a length that is none.
    """

    name: str
    version: int
    preprocessing: Preprocessing
    extractor: Extractor
    extractor_hash: str
    scores: tuple[str, ...]
    inception_splits: int = 1
    direction: str = _REFERENCE_FIRST
    crop_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.crop_seconds is not None and not 0 < self.crop_seconds < math.inf:
            raise ProtocolError(f"crop_seconds={self.crop_seconds} must be a positive number of seconds, or null")

    @property
    def sample_rate_hz(self) -> int:
        return self.preprocessing.sample_rate_hz

    def describe(self) -> dict[str, Any]:
        """What a report states beside every number."""
        return {
            "protocol": self.name,
            "version": self.version,
            **self.preprocessing.describe(),
            "extractor": type(self.extractor).__name__,
            "extractor_hash": self.extractor_hash,
            "feature_dim": self.extractor.feature_dim,
            "inception_splits": self.inception_splits,
            "direction": self.direction,
            # Absent where nothing is cropped: features that were cached before there was a crop stay valid.
            **({} if self.crop_seconds is None else {"crop_seconds": self.crop_seconds}),
        }

    def crop(self, audio: Tensor, rate_hz: int) -> Tensor:
        """What is judged of `audio [channels, T]`."""
        return audio if self.crop_seconds is None else audio[:, : max(round(self.crop_seconds * rate_hz), 1)]

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the description and the labels: what cached features belong to."""
        content = json.dumps([self.describe(), list(self.extractor.labels)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def require_distinct_captions(extractor: CaptionExtractor) -> None:
    """Refuse an extractor to which unrelated captions are alike, as they are to an incomplete tokenizer."""
    embedded = extractor.text(_UNRELATED)
    similar = float((embedded @ embedded.T).fill_diagonal_(-1).max())
    if similar >= HIGHEST_SIMILARITY:
        raise ProtocolError(
            f"unrelated captions have a similarity of {similar:.3f}, and it must be under {HIGHEST_SIMILARITY}: "
            "this is no trained CLAP, or its tokenizer is another's; fetch its files again"
        )


def _load_published(
    weights: PublishedWeights, build: Callable[[], nn.Module], directory: str | Path, sha256: str | None
) -> tuple[Any, str]:
    """A published extractor and the hash of its file, which is looked for before anything is built."""
    path = weights.find(Path(directory).expanduser(), sha256)
    return weights.load(build(), path), hash_file(path)


def _load_clap(backend: str, **options: Any) -> tuple[clap_extractor.ClapExtractor, str]:
    embedder = clap_extractor.load_embedder(backend, **options)
    extractor = embedder.extractor()
    require_distinct_captions(extractor)
    return extractor, hash_module(embedder.model)


def embedded(directory: str | Path, sha256: str | None = None) -> list[EvaluationProtocol]:
    """The small extractor that ships, in `directory`. Its numbers are its own, never those of a published protocol.

    Raises ProtocolError where it is absent or has another hash.
    """
    weights = Path(directory) / WEIGHTS_FILE
    if not weights.is_file():
        raise ProtocolError(
            f"protocol 'embedded': {weights} does not exist (expected SHA-256 {sha256 or 'not pinned'}); it "
            "ships with foley in data/extractor and is made by `python scripts/train_extractor.py`"
        )
    if sha256 is not None and (found := hash_file(weights)) != sha256:
        raise ProtocolError(
            f"protocol 'embedded': {weights} has SHA-256 {found}, expected {sha256}; restore the shipped "
            "file, or set the expected hash to that of the extractor that you trained"
        )
    extractor = load_component(Path(directory))
    scores = ("frechet", "frechet_infinity", "kad", "kl", "inception")
    return [EvaluationProtocol("embedded", 1, EmbeddedPreprocessing(), extractor, hash_module(extractor), scores)]


def panns(directory: str | Path, sha256: str | None = None) -> list[EvaluationProtocol]:
    """EzAudio and AudioLDM-eval: distances on Cnn14's 2048 features, divergences and IS on its 527 classes.

    Raises CheckpointError where the weights in `directory` are absent or others than expected, as do the following.
    """
    loaded = _load_published(cnn14.WEIGHTS, cnn14.Cnn14, directory, sha256)
    scores = ("frechet", "kad", "kl", "inception")
    return [EvaluationProtocol("panns", 1, PannsPreprocessing(), *loaded, scores, inception_splits=10)]


def vggish(directory: str | Path, sha256: str | None = None) -> list[EvaluationProtocol]:
    """FAD (Kilgour et al. 2019) on examples of 0.96 s, and its extrapolation (Gui et al. 2024)."""
    loaded = _load_published(vggish_extractor.WEIGHTS, vggish_extractor.Vggish, directory, sha256)
    return [EvaluationProtocol("vggish", 1, VggishPreprocessing(), *loaded, ("frechet", "frechet_infinity", "kad"))]


def stable_audio(
    directory: str | Path,
    openl3_content: str = "env",
    clap: str = FUSED_CLAP,
    download: bool = False,
    clap_checkpoint: str | None = None,
    openl3_sha256: str | None = None,
    passt_sha256: str | None = None,
    clap_backend: str = "transformers",
) -> list[EvaluationProtocol]:
    """AudioCache, SmoothCache and Stable Audio Open: three extractors, each with its own preprocessing.

    Args:
        openl3_content: what OpenL3 was trained on: "env" for sounds, "music" for music.
        clap, download, clap_checkpoint, clap_backend: as of `clap`.
    """
    openl3 = _load_published(openl3_weights(openl3_content), OpenL3, directory, openl3_sha256)
    tagged = _load_published(passt.WEIGHTS, passt.Passt, directory, passt_sha256)
    embedder = _load_clap(clap_backend, name_or_path=clap, download=download, checkpoint=clap_checkpoint)
    return [
        EvaluationProtocol("stable_audio/openl3", 1, OpenL3Preprocessing(), *openl3, ("frechet",)),
        EvaluationProtocol("stable_audio/passt", 1, PasstPreprocessing(), *tagged, ("kl",), direction=_GENERATED_FIRST),
        EvaluationProtocol("stable_audio/clap", 1, PeakClapPreprocessing(), *embedder, ("clap",)),
    ]


def clap(
    name_or_path: str = clap_extractor.REPOSITORY,
    download: bool = False,
    checkpoint: str | None = None,
    backend: str = "transformers",
) -> list[EvaluationProtocol]:
    """Cosine of LAION-CLAP's embeddings of sound and caption.

    Args:
        name_or_path: repository in the Hugging Face cache, or a folder.
        download: let missing files be fetched.
        checkpoint: a file of the laion_clap package, whose weights take the place of the repository's.
        backend: as of `foley.metrics.extractors.clap.load_embedder`; "laion_clap" wants the checkpoint.
    """
    loaded = _load_clap(backend, name_or_path=name_or_path, download=download, checkpoint=checkpoint)
    return [EvaluationProtocol("clap", 1, ClapPreprocessing(), *loaded, ("clap", "kad"))]


def clap_16khz(name_or_path: str = EZAUDIO_CLAP, **options: Any) -> list[EvaluationProtocol]:
    """The same of audio that was brought to 16 kHz first, as EzAudio's section III-A does with all clips.

    Args:
        options: the others of `clap`.
    """
    wide = clap(name_or_path, **options)
    return [replace(part, name="clap_16khz", preprocessing=Clap16kHzPreprocessing()) for part in wide]


_SINGLE: dict[str, Callable[[str | Path, str | None], list[EvaluationProtocol]]] = {
    "embedded": embedded,
    "panns": panns,
    "vggish": vggish,
}


def load_protocol(name: str, directory: str | Path, expected_sha256: str | None = None) -> EvaluationProtocol:
    """Protocol `name`, which has one extractor, from its weights in `directory`; never falls back to another.

    Raises ProtocolError for an unknown name, and what the protocols themselves raise.

    >>> from foley.core.config import PROJECT_ROOT
    >>> load_protocol("embedded", PROJECT_ROOT / "data" / "extractor").describe()["sample_rate_hz"]
    24000
    """
    if name not in _SINGLE:
        raise ProtocolError(f"unknown protocol {name!r}; available: {', '.join(_SINGLE)}")
    return _SINGLE[name](directory, expected_sha256)[0]
