"""Frozen encoders, T5's first of all, and noise that stands where its weights are not at hand."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foley.core.devices import float32_products, has_bf16, to_device
from foley.core.hub import load_pretrained
from foley.core.logs import get_logger
from foley.core.seeding import torch_generator
from foley.models.text.base import TextConditioner, TextEmbedding, bounded, warn_truncated
from foley.models.text.kept import MEMORY_GIB, EmbeddingCache, encoder_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# T5 checkpoints round their embedding table up: 32,128 rows for 32,100 tokens.
_SMALLEST_VOCABULARY_SHARE = 0.9
MEND = "set `text.download=true`, give a local directory as `text.name_or_path`, or choose `text=small`"
_DTYPES = {
    "auto": torch.float32,  # where it starts, see `_apply`
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
logger = get_logger(__name__)


class TextModelError(RuntimeError):
    """A text model whose files are missing or do not belong together."""


class _Shared:
    """Holds a model outside the module tree: not in state dicts, not trained, and shared by copies of its owner."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


class FrozenEncoder(TextConditioner):
    """A pretrained encoder, always in eval mode and without gradients; a subclass has `encode` and sets `dim`.

    The weights never enter a checkpoint: `state_dict` is empty, and the name finds them again. Each distinct prompt is
    encoded once while it stays in the cache, the empty (unconditional) one in practice once per run. Rounding depends
    on what else is encoded in the same batch, so a run that must repeat bit for bit needs a filled `cache_dir`.

    Args:
        load: the encoder, in the type of `dtype`; called again where rounded weights must be read anew.
        identity: what embeddings depend on besides prompt and type, as in a config.
        dtype: what the encoder computes in: bfloat16, float16, float32, tf32 (float32 with the faster products of an
            NVIDIA GPU), or auto: bfloat16 on such a GPU, float32 elsewhere. Embeddings agree within bfloat16.
        cache_dir: a store that keeps embeddings between runs, see `EmbeddingCache`.
        memory_gib: of embeddings that stay in memory.
        length_multiple: batches are padded to the next multiple of it, see `TextConditioner`.
    """

    trainable = False

    def __init__(
        self,
        load: Callable[[], nn.Module],
        identity: Mapping[str, Any],
        dtype: str,
        cache_dir: str | None,
        memory_gib: float,
        length_multiple: int,
    ) -> None:
        super().__init__()
        self.dtype, self.length_multiple, self._load = dtype, length_multiple, load
        self._shared = _Shared(load().requires_grad_(False).eval())  # no sub-module, see `_Shared`
        self._exact = False
        self._identity = encoder_identity({"_target_": f"{type(self).__module__}.{type(self).__name__}", **identity})
        self.cache = EmbeddingCache(None, Path(cache_dir).expanduser() if cache_dir else None, memory_gib)

    @property
    def encoder(self) -> Any:
        """The frozen encoder."""
        return self._shared.model

    @property
    def _weight(self) -> Tensor:
        """One of the encoder's weights, which have one type and one device."""
        return next(self.encoder.parameters())

    def forward(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`, zero where the mask is false."""
        return self.cache.embed(prompts, self._weight.device, self.encode, self.length_multiple)

    def compute_exactly(self, exact: bool) -> None:
        """With dtype=auto: float32 without TF32 on every device; rounded weights are read again."""
        if self.dtype != "auto":
            return
        device, self._exact = self._weight.device, exact
        if exact and self._weight.dtype != torch.float32:
            self._shared = _Shared(self._load().requires_grad_(False).eval())
        self.to(device)

    def change_weights(self, how: str, change: Callable[[nn.Module], object]) -> None:
        """Of the frozen encoder; embeddings that it makes from now on are kept as those of another one."""
        self._shared = _Shared(deepcopy(self.encoder))  # others may share it, and expect the exact one
        change(self.encoder)
        self._identity = {**self._identity, "weights": how}
        self.cache.become({**self._identity, "dtype": self._computes_in})

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """What is kept must not depend on who asked first: neither autocast nor TF32 of a run reaches it."""
        with torch.autocast(self._weight.device.type, enabled=False), _products(self._computes_in):
            yield

    @property
    def _computes_in(self) -> str:
        """The type by its name, tf32 among them."""
        name = str(self._weight.dtype).removeprefix("torch.")
        exact = self._exact or self.dtype == "float32" or self._weight.device.type != "cuda"
        return name if exact or name != "float32" else "tf32"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenEncoder":
        if self.dtype == "auto" and not self._exact and self._weight.dtype == torch.float32:
            dtype = fast_dtype(fn(torch.empty(0)).device)
            self.encoder.to(dtype)  # before they move, so that half as much does; positions stay whole numbers
        self.encoder._apply(fn, recurse)  # which is no sub-module
        super()._apply(fn, recurse)
        self.cache.become({**self._identity, "dtype": self._computes_in})
        return self


class FrozenT5Conditioner(FrozenEncoder):
    """The last hidden states of a T5 encoder, see `FrozenEncoder`.

    Files are only looked for locally unless `download` is set, so a machine without a network fails at once.

    Args:
        name_or_path: model on the Hugging Face Hub, or a local directory.
        dim: width Dc that the denoiser expects; the model must have it.
        max_length: longest prompt in tokens; what lies beyond is dropped with a warning.
        device: where the encoder starts; it then follows `to`.
        revision: branch, tag or commit on the Hub.
        download: fetch missing files from the Hub.
        dtype, cache_dir, memory_gib, length_multiple: as for `FrozenEncoder`.

    Raises:
        TextModelError: where files are missing, or the tokenizer or `dim` does not fit the model.
        ValueError: for an unknown dtype.

    With `download=True`, `FrozenT5Conditioner("google/flan-t5-base", dim=768, download=True)(["a dog barks"])` holds
    embeddings `[1, 6, 768]`; without it the files must be in the cache.
    """

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
        memory_gib: float = MEMORY_GIB,
        length_multiple: int = 1,
    ) -> None:
        from transformers import AutoTokenizer, T5EncoderModel  # seconds to import, and of no use to other encoders

        source = {"revision": revision, "local_files_only": not download}
        load = partial(load_pretrained, name_or_path=name_or_path, error_type=TextModelError, mend=MEND)
        options = {**source, "dtype": torch_dtype(dtype)}
        tokenizer = load(AutoTokenizer.from_pretrained, options=source)
        identity = {"name_or_path": name_or_path, "dim": dim, "max_length": max_length, "revision": revision}
        load_encoder = partial(load, T5EncoderModel.from_pretrained, options=options)
        super().__init__(load_encoder, identity, dtype, cache_dir, memory_gib, length_multiple)
        self.dim, self.max_length = dim, max_length
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        check_vocabulary(self.tokenizer, self.encoder.config.vocab_size, name_or_path)
        if self.encoder.config.d_model != dim:
            raise TextModelError(
                f"{name_or_path} has width {self.encoder.config.d_model}, but `dim` is {dim}: set it so"
            )
        self.to(device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Unpadded embeddings `[S, Dc]`, one per prompt, in one batch; nothing is remembered."""
        tokens = [token_ids(self.tokenizer, prompt, self.max_length) for prompt in prompts]
        padded = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt")  # [B, S]
        batch = {name: to_device(padded[name], self._weight.device) for name in ("input_ids", "attention_mask")}
        with self._computing():
            hidden = self.encoder(**batch).last_hidden_state  # [B, S, Dc]
        # A view would keep the batch alive.
        return [row[: len(ids)].clone() for row, ids in zip(hidden, tokens, strict=True)]


def token_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, max_length: int) -> list[int]:
    """At most `max_length` ids; the last one is always the end token, so "" has one."""
    ids: list[int] = tokenizer(bounded(prompt, max_length), verbose=False)["input_ids"]
    if len(ids) <= max_length:
        return ids
    warn_truncated(prompt, max_length)
    return [*ids[: max_length - 1], ids[-1]]  # these encoders were trained to see the end token


def torch_dtype(dtype: str) -> torch.dtype:
    """What weights are read in for an option `dtype`; ValueError for one that there is not."""
    if dtype not in _DTYPES:
        raise ValueError(f"text.dtype={dtype}: give {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def fast_dtype(device: torch.device) -> torch.dtype:
    """What a frozen encoder computes in unless told: bfloat16 on a GPU that computes in it, float32 elsewhere."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def _products(computes_in: str) -> AbstractContextManager[None]:
    """Matrix products of float32 in TF32, or exact, whatever the run around this has chosen."""
    return float32_products(computes_in == "tf32") if torch.cuda.is_available() else nullcontext()


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", rows: int, name_or_path: str) -> None:
    """An incomplete tokenizer would load silently and map every word to the unknown token; raises TextModelError.

    Args:
        rows: of the model's embedding table.
    """
    if not _SMALLEST_VOCABULARY_SHARE * rows <= len(tokenizer) <= rows:
        raise TextModelError(
            f"{name_or_path}: the tokenizer knows {len(tokenizer)} tokens but the model has {rows}; "
            "its tokenizer files are incomplete or of another model: fetch them again"
        )


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
        embeddings = torch.stack([rows[prompt] for prompt in prompts])
        embeddings = to_device(embeddings, self.place.device).to(self.place)
        return TextEmbedding(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device))

    def _row(self, prompt: str) -> Tensor:
        return torch.randn(self.max_length, self.dim, generator=torch_generator("random embeddings", prompt))
