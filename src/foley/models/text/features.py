"""Conditioning on features that were computed beforehand, one file per clip: of video (CAVP), or of anything else."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from foley.core.devices import to_device
from foley.core.logs import get_logger
from foley.models.text.base import TextConditioner, TextEmbedding
from foley.nn.embedding import LearnedPositions
from foley.nn.feedforward import normal_linear

SUFFIX = ".safetensors"
_KEY = "features"  # the tensor's name, where a file holds several
_log = get_logger(__name__)


class FeatureError(ValueError):
    """Features that are absent or not of the kind that the model knows."""


def feature_files(path: Path) -> list[Path]:
    """The file `path`, or those in the folder `path`, by name; raises FeatureError where there is none."""
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FeatureError(f"features={path} is neither a {SUFFIX} file nor a folder of them")
    return files


class FeatureConditioner(TextConditioner):
    """Stands where a text encoder stands: a prompt is a clip's id or a .safetensors file, or "", the learned empty one.

    A file holds one tensor, or `features` among others: `[S, feature_dim]`, evenly spaced from the clip's start. A
    projection and learned positions, which train with the denoiser, make tokens of it.

    Args:
        feature_dim: of each feature.
        dim: width Dc of the tokens.
        max_length: longest sequence S; what lies beyond is dropped with a warning.
        directory: holds `<id>.safetensors`, or the clip's path with that suffix in place of its own; None knows no
            clips, only files.

    Raises:
        FeatureError: when called, where a prompt names no file or the file holds other features.

    Example:
        >>> conditioner = FeatureConditioner(feature_dim=512, dim=16, max_length=40)
        >>> conditioner([""]).embeddings.shape
        torch.Size([1, 1, 16])
    """

    trainable = True
    prompt_field = "id"

    def __init__(self, feature_dim: int, dim: int, max_length: int, directory: str | None = None) -> None:
        super().__init__()
        self.feature_dim, self.dim, self.max_length = feature_dim, dim, max_length
        self.directory = None if directory is None else Path(directory).expanduser()
        self.projection = normal_linear(feature_dim, dim)
        self.positions = LearnedPositions(max_length, dim)
        self.empty_embedding = nn.Parameter(torch.empty(1, dim))  # one token, [1, Dc]
        nn.init.normal_(self.empty_embedding, std=0.02)

    def forward(self, prompts: list[str]) -> TextEmbedding:
        """B ids or files to embeddings `[B, S, Dc]`, zero where the mask is false; FeatureError where one is absent."""
        rows = [self._embed(prompt) for prompt in prompts]  # each [S_i, Dc], of its own length
        embeddings = pad_sequence(rows, batch_first=True)  # [B, S, Dc], zero beyond each length
        lengths = to_device(torch.tensor([len(row) for row in rows]), embeddings.device)
        # A mask [B, S] of the tokens within each length.
        return TextEmbedding(embeddings, torch.arange(embeddings.shape[1], device=embeddings.device) < lengths[:, None])

    def find(self, prompt: str) -> Path:
        """The file of a clip, or `prompt` itself where it names one; raises FeatureError."""
        # With a directory, the id of a clip may end so too.
        if prompt.endswith(SUFFIX) and (self.directory is None or Path(prompt).is_file()):
            return Path(prompt)
        if self.directory is None:
            raise FeatureError(f"{prompt!r} is no {SUFFIX} file, and no directory of features is given")
        for name in (f"{prompt}{SUFFIX}", str(Path(prompt).with_suffix(SUFFIX))):  # an id, or a path
            file = self.directory / name
            # A prompt may come from a stranger: no ".." leads out of the directory.
            if file.is_file() and file.resolve().is_relative_to(self.directory.resolve()):
                return file
        raise FeatureError(f"{self.directory} holds no features of {prompt!r}: {prompt}{SUFFIX} does not exist")

    def _embed(self, prompt: str) -> Tensor:
        if not prompt:
            return self.empty_embedding
        features, weight = self._read(self.find(prompt)), self.empty_embedding  # [S, feature_dim]
        # [S, Dc]; positions take a batch.
        return self.positions(self.projection(to_device(features, weight.device).to(weight))[None])[0]

    def _read(self, file: Path) -> Tensor:
        """`[S, feature_dim]`."""
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise FeatureError(f"{file} cannot be read as safetensors: {error}") from error
        features = next(iter(tensors.values())) if len(tensors) == 1 else tensors.get(_KEY)
        if features is None or features.dim() != 2 or features.shape[1] != self.feature_dim or not len(features):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise FeatureError(f"{file} must hold `{_KEY}` of shape [S, {self.feature_dim}], it holds {shapes}")
        if not bool(features.isfinite().all()):
            raise FeatureError(f"{file} holds features that are not finite; compute them again")
        if len(features) > self.max_length:
            _log.warning("%s holds %d features; only the first %d are used", file, len(features), self.max_length)
        return features[: self.max_length]
