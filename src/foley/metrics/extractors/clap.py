"""LAION-CLAP (Wu et al. 2023) by transformers' model: one space for sounds and captions.

Weights are the published ones of transformers, or a checkpoint of the laion_clap package such as
`630k-audioset-fusion-best.pt`, renamed. `transformers` takes seconds to import, so only what loads a model does.
`foley.metrics.extractors.laion_clap` has the same by the model of that package, and `load_embedder` loads either.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from foley.core.components import CheckpointError, load_state, read_pickle
from foley.core.hub import load_pretrained
from foley.metrics.extractors import ExtractorOutput
from foley.metrics.extractors.published import PublishedWeights, require_tensors

if TYPE_CHECKING:
    from transformers import ClapModel, PreTrainedTokenizerBase

REPOSITORY = "laion/clap-htsat-unfused"
BACKENDS = ("transformers", "laion_clap")
_WINDOW_SECONDS = 10
_FFT_SAMPLES, _HOP_SAMPLES, _MEL_BANDS = 1024, 480, 64
_LOWEST_HZ, _HIGHEST_HZ = 50.0, 14000.0
_POWER_FLOOR = 1e-10
_SMALLEST_VOCABULARY_SHARE = 0.9

Clip = Tensor | NDArray[np.float32]


class ClapSpectrogram(nn.Module):
    """Log-mel power in dB as CLAP was trained on: Slaney's mel scale, or HTK's where the model fuses windows."""

    filters: Tensor
    window: Tensor

    def __init__(self, sample_rate_hz: int, fusion: bool) -> None:
        super().__init__()
        norm, scale = (None, "htk") if fusion else ("slaney", "slaney")
        bins = _FFT_SAMPLES // 2 + 1
        filters = melscale_fbanks(bins, _LOWEST_HZ, _HIGHEST_HZ, _MEL_BANDS, sample_rate_hz, norm, scale)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(_FFT_SAMPLES), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """`audio [B, T]` -> `[B, frames, mel_bands]`."""
        spectrum = torch.stft(audio, _FFT_SAMPLES, _HOP_SAMPLES, window=self.window, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(dim=-1).transpose(1, 2) @ self.filters
        return 10 * power.clamp_min(_POWER_FLOOR).log10()


def split_windows(audio: Tensor, window_samples: int) -> Tensor:
    """`audio [T]` as windows `[W, window_samples]`.

    A longer clip gives adjoining windows, the last one moved back to end with the clip; a shorter one is repeated
    whole times and zero-padded, as in CLAP's training. Nothing is cropped at random, so scores repeat.
    """
    if audio.numel() > window_samples:
        starts = list(range(0, audio.numel() - window_samples, window_samples))
        return torch.stack([audio[s : s + window_samples] for s in [*starts, audio.numel() - window_samples]])
    repeated = audio.repeat(window_samples // audio.numel())
    return nn.functional.pad(repeated, (0, window_samples - repeated.numel())).unsqueeze(0)


class ClapEmbedder:
    """Unit embeddings of sounds and captions, whose products are CLAP scores.

    A long clip's embedding is the normalised mean of its windows of 10 s.
    """

    sample_rate_hz = 48000

    def __init__(self, model: "ClapModel", tokenizer: "PreTrainedTokenizerBase", device: str = "cpu") -> None:
        self.model = model.requires_grad_(False).eval().to(device)
        self.tokenizer = tokenizer
        audio: Any = model.config.audio_config
        self._fusion = bool(audio.enable_fusion)
        self._spectrogram = ClapSpectrogram(self.sample_rate_hz, self._fusion).to(device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = REPOSITORY,
        device: str = "cpu",
        download: bool = False,
        checkpoint: str | Path | None = None,
    ) -> "ClapEmbedder":
        """The published model, from a local folder or the Hugging Face cache.

        Args:
            download: fetch missing files; otherwise nothing is asked of a network.
            checkpoint: a file of the laion_clap package, whose weights take the place of the published ones.
        Raises CheckpointError where files are missing or the tokenizer is not whole.
        """
        from transformers import ClapModel

        model = _load(ClapModel.from_pretrained, name_or_path, download)
        if checkpoint is not None:
            load_laion_clap(model, Path(checkpoint))
        return cls(model, load_tokenizer(name_or_path, model.config.text_config.vocab_size, download), device)

    @property
    def dim(self) -> int:
        """D, the width of the embeddings."""
        return int(self.model.config.projection_dim)

    @property
    def longest_text(self) -> int:
        """Of a caption, so many tokens are heard."""
        return int(self.model.config.text_config.max_position_embeddings) - 2

    @torch.inference_mode()
    def audio(self, clips: Sequence[Clip]) -> Tensor:
        """Embeddings `[B, D]` of mono clips `[T]` of any lengths at 48 kHz; on the CPU."""
        window_samples = _WINDOW_SECONDS * self.sample_rate_hz
        windows = [split_windows(torch.as_tensor(clip).reshape(-1).float(), window_samples) for clip in clips]
        embedded = self.windows(torch.cat(windows)).split([len(part) for part in windows])
        return nn.functional.normalize(torch.stack([part.mean(dim=0) for part in embedded]), dim=-1)

    @torch.inference_mode()
    def windows(self, audio: Tensor) -> Tensor:
        """Embeddings `[W, D]` of windows `[W, 480000]`; on the CPU."""
        features = self._spectrogram(audio.to(self.model.device)).unsqueeze(1)
        if self._fusion:  # windows are never longer than the model's own, so all four views are the same
            features = features.expand(-1, 4, -1, -1)
        longer = torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)
        embedded: Tensor = self.model.get_audio_features(input_features=features, is_longer=longer).pooler_output
        return embedded.cpu()

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Embeddings `[B, D]` of captions; what lies beyond `longest_text` is dropped. On the CPU."""
        options = {"padding": True, "truncation": True, "max_length": self.longest_text, "return_tensors": "pt"}
        tokens = self.tokenizer(list(captions), **options)
        device = next(self.model.parameters()).device
        embedded = self._embed_tokens({name: tokens[name].to(device) for name in ("input_ids", "attention_mask")})
        return nn.functional.normalize(embedded.cpu(), dim=-1)

    def extractor(self) -> "ClapExtractor":
        """This in the form of a protocol's extractor, whose class is its name in reports."""
        return ClapExtractor(self)

    def _embed_tokens(self, tokens: dict[str, Tensor]) -> Tensor:
        embedded: Tensor = self.model.get_text_features(**tokens).pooler_output
        return embedded


def load_embedder(backend: str = "transformers", **options: Any) -> ClapEmbedder:
    """CLAP by `backend`: "transformers", the port, or "laion_clap", the package that its authors train it with.

    Args:
        options: `name_or_path`, `device`, `download` and `checkpoint`, as of `ClapEmbedder.from_pretrained`.

    Raises ValueError for another backend, and CheckpointError as that does.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend}: CLAP is loaded by one of {', '.join(BACKENDS)}")
    if backend == "transformers":
        return ClapEmbedder.from_pretrained(**options)
    # Here, for it imports the one below and its package much else.
    from foley.metrics.extractors.laion_clap import LaionClapEmbedder

    return LaionClapEmbedder.from_pretrained(**options)


def load_tokenizer(name_or_path: str | Path, vocabulary: int, download: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer there, of a model that has `vocabulary` tokens; raises CheckpointError where it is not whole."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer.from_pretrained, name_or_path, download)
    if len(tokenizer) < _SMALLEST_VOCABULARY_SHARE * vocabulary:
        raise CheckpointError(
            f"{name_or_path}: the tokenizer knows {len(tokenizer)} tokens but the model has {vocabulary}; "
            "its tokenizer files are incomplete: fetch them again"
        )
    return tokenizer


def _load(from_pretrained: Callable[..., Any], name_or_path: str | Path, download: bool) -> Any:
    return load_pretrained(
        from_pretrained,
        name_or_path,
        options={"local_files_only": not download},
        error_type=CheckpointError,
        mend="give the path of a folder that holds them",
        repository=REPOSITORY,
    )


class ClapExtractor:
    """A `ClapEmbedder` in the form of a protocol's extractor: features in the space of captions, and no classes."""

    sample_rate_hz = ClapEmbedder.sample_rate_hz
    labels: Sequence[str] = ()

    def __init__(self, embedder: ClapEmbedder) -> None:
        self.embedder, self.feature_dim = embedder, embedder.dim
        self.label_groups: Mapping[str, Sequence[str]] = {}

    def text(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings `[B, D]` of captions."""
        return self.embedder.text(captions)

    def __call__(self, audio: Tensor) -> ExtractorOutput:
        """`audio [B, windows, 480000]` -> unit features `[B, D]` and no logits."""
        embedded = self.embedder.windows(audio.flatten(0, 1)).unflatten(0, audio.shape[:2])
        features = nn.functional.normalize(embedded.mean(dim=1), dim=-1)
        return ExtractorOutput(features, features.new_zeros(len(audio), 0))


_NAMES = PublishedWeights(
    file="630k-audioset-fusion-best.pt",
    url="https://huggingface.co/lukewys/laion_clap",
    # Spectrograms, unused heads, and what follows from shapes alone.
    derived=(
        r"(text|audio)_transform\.|audio_branch\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\."
        r"|.*\.(attn_mask|relative_position_index|position_ids|token_type_ids)$"
    ),
    renames=(
        (r"^text_branch\.", "text_model."),
        (r"^audio_branch\.", "audio_model.audio_encoder."),
        (r"(text|audio)_projection\.0\.", r"\1_projection.linear1."),
        (r"(text|audio)_projection\.2\.", r"\1_projection.linear2."),
        (r"\.bn0\.", ".batch_norm."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.self."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
)
# The checkpoints hold a NumPy number beside the weights, which `weights_only` refuses unless its parts are named.
_NUMBER = np._core.multiarray.scalar  # type: ignore[attr-defined]
_HARMLESS = [(_NUMBER, "numpy.core.multiarray.scalar"), _NUMBER, np.dtype, type(np.dtype(np.float64))]


def read_laion_clap(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint of the laion_clap package, as its model names them; raises CheckpointError."""
    with torch.serialization.safe_globals(_HARMLESS):
        content = read_pickle(path, mmap=True)
    published = content.get("state_dict", content) if isinstance(content, Mapping) else content
    return {name.removeprefix("module."): value for name, value in require_tensors(published, path).items()}


def load_laion_clap(model: "ClapModel", path: Path) -> None:
    """Give `model` the weights at `path`; raises CheckpointError that lists keys and shapes that disagree."""
    state = _split_attention(_NAMES.renamed(read_laion_clap(path)))
    kept = {name: value for name, value in model.state_dict().items() if re.match(_NAMES.derived or "", name)}
    load_state(model, kept | state, str(path))


def _split_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value, which laion_clap keeps in one tensor, as three."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            split |= {name.replace(".qkv.", f".{part}."): third for part, third in parts}
        else:
            split[name] = value
    return split
