"""A frozen T5 encoder and the cache of its embeddings."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foley.core.files import write_tensors
from foley.core.hub import load_pretrained
from foley.core.logs import get_logger
from foley.core.seeding import torch_generator
from foley.models.text.base import TextConditioner, TextEmbedding, bounded, warn_truncated

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# T5 checkpoints round their embedding table up: 32,128 rows for 32,100 tokens.
_SMALLEST_VOCABULARY_SHARE = 0.9
_MEND = "set `text.download=true`, give a local directory as `text.name_or_path`, or choose `text=small`"
logger = get_logger(__name__)


# ---------------------------------------------------------------- embeddings that are kept


class EmbeddingCache:
    """Maps a prompt to its unpadded embedding `[S, Dc]`.

    Args:
        identity: everything besides the prompt that the embedding depends on (model, revision, length, type).
        directory: where embeddings stay between runs, one file per prompt named by content hash; None keeps none.
        memory_items: how many of the most recently used embeddings stay in memory.
    """

    def __init__(self, identity: str, directory: Path | None = None, memory_items: int = 256) -> None:
        self.identity = identity
        self.directory = directory
        self.memory_items = memory_items
        self._memory: OrderedDict[str, Tensor] = OrderedDict()  # the least recently used first

    def path(self, prompt: str) -> Path | None:
        """The file of a prompt, whether it exists or not."""
        if self.directory is None:
            return None
        # The unit separator: neither an identity nor a prompt holds one by chance.
        digest = hashlib.sha256(f"{self.identity}\x1f{prompt}".encode(errors="surrogatepass")).hexdigest()
        return self.directory / digest[:2] / f"{digest}.safetensors"  # in 256 folders, to keep each small

    def get(self, prompt: str, device: torch.device) -> Tensor | None:
        """The embedding on `device`, or None where it is not known; an unreadable file counts as not known."""
        if prompt in self._memory:
            self._memory.move_to_end(prompt)
            return self._memory[prompt].to(device)
        path = self.path(prompt)
        if path is None or not path.is_file():
            return None
        try:
            embedding = load_file(path)["embedding"].to(device)
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("%s cannot be read (%s); the embedding is computed again", path, error)
            return None
        self._remember(prompt, embedding)
        return embedding

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Keep an embedding `[S, Dc]`; the file appears whole or not at all."""
        self._remember(prompt, embedding)
        path = self.path(prompt)
        if path is not None:
            write_tensors(path, {"embedding": embedding.detach().cpu()})

    def forget(self) -> None:
        """Leave nothing in memory; files stay."""
        self._memory.clear()

    def embed(
        self, prompts: Sequence[str], device: torch.device, encode: Callable[[list[str]], list[Tensor]]
    ) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]` on `device`, zero where the mask is false.

        Args:
            encode: prompts that are not known, each once, to unpadded embeddings `[S, Dc]`.
        """
        # Each distinct prompt once, in the order of first appearance.
        found = {prompt: self.get(prompt, device) for prompt in dict.fromkeys(prompts)}
        known = {prompt: embedding for prompt, embedding in found.items() if embedding is not None}
        missing = [prompt for prompt in found if prompt not in known]
        if missing:
            known.update(zip(missing, encode(missing), strict=True))  # in one batch
        for prompt in missing:
            self.put(prompt, known[prompt])
        rows = [known[prompt] for prompt in prompts]  # each [S_i, Dc], of its own length
        lengths = torch.tensor([len(row) for row in rows], device=device)
        embeddings = pad_sequence(rows, batch_first=True)  # [B, S, Dc]
        return TextEmbedding(embeddings, torch.arange(embeddings.shape[1], device=device) < lengths[:, None])

    def _remember(self, prompt: str, embedding: Tensor) -> None:
        self._memory[prompt] = embedding
        self._memory.move_to_end(prompt)
        if len(self._memory) > self.memory_items:
            self._memory.popitem(last=False)  # the least recently used


class CachedText:
    """A conditioner that is not trained any more: encodes each distinct prompt once, the empty one included.

    Rounding depends on what else is encoded in the same batch, and stays with the prompt from then on.
    """

    def __init__(self, text: TextConditioner) -> None:
        self._text = text
        self.cache = EmbeddingCache(type(text).__name__)

    def __call__(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`, zero where the mask is false."""
        return self.cache.embed(prompts, next(self._text.parameters()).device, self._encode)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> list[Tensor]:
        encoded = self._text(prompts)
        # [S_i, Dc], without padding.
        return [row[mask] for row, mask in zip(encoded.embeddings, encoded.mask, strict=True)]


# ---------------------------------------------------------------- the encoder


class TextModelError(RuntimeError):
    """A text model whose files are missing or do not belong together."""


class _Shared:
    """Holds a model outside the module tree: not in state dicts, not trained, and shared by copies of its owner."""

    def __init__(self, model: "PreTrainedModel") -> None:
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

    With `download=True`, `FrozenT5Conditioner("google/flan-t5-base", dim=768, download=True)(["a dog barks"])` holds
    embeddings `[1, 6, 768]`; without it the files must be in the cache.
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
        from transformers import AutoTokenizer, T5EncoderModel  # seconds to import, and of no use to other encoders

        super().__init__()
        source = {"revision": revision, "local_files_only": not download}
        self.max_length = max_length
        load = partial(load_pretrained, name_or_path=name_or_path, error_type=TextModelError, mend=_MEND)
        self.tokenizer: PreTrainedTokenizerBase = load(AutoTokenizer.from_pretrained, options=source)
        encoder = load(T5EncoderModel.from_pretrained, options={**source, "dtype": getattr(torch, dtype)})
        _check_vocabulary(self.tokenizer, encoder, name_or_path)
        if encoder.config.d_model != dim:
            raise TextModelError(f"{name_or_path} has width {encoder.config.d_model}, but `dim` is {dim}: set it so")
        self._shared = _Shared(encoder.requires_grad_(False).eval().to(device))  # no sub-module, see `_Shared`
        self.dim = dim
        identity = "\x1f".join(map(str, (name_or_path, revision, max_length, dtype)))
        self.cache = EmbeddingCache(identity, Path(cache_dir) if cache_dir else None)

    @property
    def encoder(self) -> "PreTrainedModel":
        """The frozen encoder."""
        return self._shared.model

    def forward(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`, zero where the mask is false."""
        return self.cache.embed(prompts, self.encoder.device, self._encode)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> list[Tensor]:
        """Unpadded embeddings `[S, Dc]`, one per prompt."""
        tokens = [self._tokens(prompt) for prompt in prompts]  # ids, each of its own length
        batch = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self.encoder.device)  # [B, S]
        with torch.autocast(self.encoder.device.type, enabled=False):  # what is kept must not depend on who asked first
            hidden = self.encoder(  # [B, S, Dc]
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state
        # A view would keep the batch alive.
        return [row[: len(ids)].clone() for row, ids in zip(hidden, tokens, strict=True)]

    def _tokens(self, prompt: str) -> list[int]:
        """At most `max_length` ids; the last one is always the end token, so "" has one."""
        ids: list[int] = self.tokenizer(bounded(prompt, self.max_length), verbose=False)["input_ids"]
        if len(ids) <= self.max_length:
            return ids
        warn_truncated(prompt, self.max_length)
        return [*ids[: self.max_length - 1], ids[-1]]  # T5 was trained to see the end token

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenT5Conditioner":
        self.encoder._apply(fn, recurse)  # which is no sub-module
        super()._apply(fn, recurse)
        return self


def _check_vocabulary(tokenizer: "PreTrainedTokenizerBase", encoder: "PreTrainedModel", name_or_path: str) -> None:
    """An incomplete tokenizer would load silently and map every word to the unknown token."""
    rows = int(encoder.config.vocab_size)  # of the embedding table
    if not _SMALLEST_VOCABULARY_SHARE * rows <= len(tokenizer) <= rows:
        raise TextModelError(
            f"{name_or_path}: the tokenizer knows {len(tokenizer)} tokens but the model has {rows}; "
            "its tokenizer files are incomplete or of another model: fetch them again"
        )


# ---------------------------------------------------------------- without its weights


class RandomEmbeddings(TextConditioner):
    """Stands where a frozen encoder stands: noise `[B, max_length, dim]` by the prompt alone, every token valid.

    For measurements where weights are not at hand: a denoiser costs the same with these as with embeddings of the
    longest prompt. Nothing can be learned from them.

    Args:
        dim: width Dc of the embeddings.
        max_length: tokens S of every prompt.

    Example:
        >>> RandomEmbeddings(dim=16, max_length=40)(["a dog barks", ""]).embeddings.shape
        torch.Size([2, 40, 16])
    """

    trainable = False
    place: Tensor

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.dim, self.max_length = dim, max_length
        self.register_buffer("place", torch.empty(0), persistent=False)  # follows the module to its device

    def forward(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`."""
        rows = {prompt: self._row(prompt) for prompt in prompts}  # each distinct prompt once
        embeddings = torch.stack([rows[prompt] for prompt in prompts]).to(self.place)
        return TextEmbedding(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device))

    def _row(self, prompt: str) -> Tensor:
        return torch.randn(self.max_length, self.dim, generator=torch_generator("random embeddings", prompt))
