"""Published T5 and FLAN-T5 encoders, frozen."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from foley.hub import load_pretrained
from foley.models.text.base import TextConditioner, TextEmbedding, bounded, warn_truncated
from foley.models.text.cache import EmbeddingCache

# T5 checkpoints round their embedding table up: 32,128 rows for 32,100 tokens.
_SMALLEST_VOCABULARY_SHARE = 0.9
_MEND = "set `text.download=true`, give a local directory as `text.name_or_path`, or choose `text=small`"


class TextModelError(RuntimeError):
    """A text model whose files are missing or do not belong together."""


class _Shared:
    """Holds a model outside the module tree: not in state dicts, not trained, and shared by copies of its owner."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


class FrozenT5Conditioner(TextConditioner):
    """The last hidden states of a T5 encoder, always in eval mode and without gradients.

    The weights never enter a checkpoint: `state_dict` is empty, and the name finds them again. Each distinct prompt is
    encoded once while it stays in the cache, the empty (unconditional) one in practice once per run. Rounding depends
    on what else is encoded in the same batch, so a run that must repeat bit for bit needs a filled `cache_dir`.
    Files are only looked for locally unless `download` is set, so a machine without a network fails at once.

    Args:
        name_or_path: model on the Hugging Face Hub, or a local directory.
        dim: width Dc that the denoiser expects; the model must have it.
        max_length: longest prompt in tokens; what lies beyond is dropped with a warning.
        dtype: name of the torch type that the encoder computes in.
        device: where the encoder starts; it then follows `to`.
        revision: branch, tag or commit on the Hub.
        cache_dir: keeps embeddings on disk between runs.
        download: fetch missing files from the Hub.

    Raises:
        TextModelError: where files are missing, or the tokenizer or `dim` does not fit the model.
    """

    trainable = False

    def __init__(
        self,
        name_or_path: str,
        dim: int,
        max_length: int = 100,
        dtype: str = "float32",
        device: str = "cpu",
        revision: str = "main",
        cache_dir: str | None = None,
        download: bool = False,
    ) -> None:
        super().__init__()
        source = {"revision": revision, "local_files_only": not download}
        self.max_length = max_length
        load = partial(load_pretrained, name_or_path=name_or_path, error_type=TextModelError, mend=_MEND)
        self.tokenizer: PreTrainedTokenizerBase = load(AutoTokenizer.from_pretrained, options=source)
        encoder = load(T5EncoderModel.from_pretrained, options={**source, "dtype": getattr(torch, dtype)})
        _check_vocabulary(self.tokenizer, encoder, name_or_path)
        if encoder.config.d_model != dim:
            raise TextModelError(f"{name_or_path} has width {encoder.config.d_model}, but `dim` is {dim}: set it so")
        self._shared = _Shared(encoder.requires_grad_(False).eval().to(device))
        self.dim = dim
        identity = "\x1f".join(map(str, (name_or_path, revision, max_length, dtype)))
        self.cache = EmbeddingCache(identity, Path(cache_dir) if cache_dir else None)

    @property
    def encoder(self) -> PreTrainedModel:
        """The frozen encoder."""
        return self._shared.model

    def forward(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`, zero where the mask is false."""
        return self.cache.embed(prompts, self.encoder.device, self._encode)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> list[Tensor]:
        """Unpadded embeddings `[S, Dc]`, one per prompt."""
        tokens = [self._tokens(prompt) for prompt in prompts]
        batch = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self.encoder.device)
        with torch.autocast(self.encoder.device.type, enabled=False):  # what is kept must not depend on who asked first
            hidden = self.encoder(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state
        return [row[: len(ids)].clone() for row, ids in zip(hidden, tokens, strict=True)]

    def _tokens(self, prompt: str) -> list[int]:
        """At most `max_length` ids; the last one is always the end token, so "" has one."""
        ids: list[int] = self.tokenizer(bounded(prompt, self.max_length), verbose=False)["input_ids"]
        if len(ids) <= self.max_length:
            return ids
        warn_truncated(prompt, self.max_length)
        return [*ids[: self.max_length - 1], ids[-1]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenT5Conditioner":
        self.encoder._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, name_or_path: str) -> None:
    """An incomplete tokenizer would load silently and map every word to the unknown token."""
    rows = int(encoder.config.vocab_size)
    if not _SMALLEST_VOCABULARY_SHARE * rows <= len(tokenizer) <= rows:
        raise TextModelError(
            f"{name_or_path}: the tokenizer knows {len(tokenizer)} tokens but the model has {rows}; "
            "its tokenizer files are incomplete or of another model: fetch them again"
        )
