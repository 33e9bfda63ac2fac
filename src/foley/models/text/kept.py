"""Embeddings that are kept: in memory, in a store that grows, and in one that was made before training."""

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foley.core.components import build_component, component_class, written_out
from foley.core.config import locate
from foley.core.devices import to_device
from foley.core.embeddings import EmbeddingStore, TextStoreError, key_of, pad_rows, write_shard
from foley.core.logs import get_logger
from foley.models.text.base import TextConditioner, TextEmbedding

_log = get_logger(__name__)

MEMORY_GIB = 1.0
_WRITE_BYTES, _WRITE_SECONDS = 64 << 20, 60.0  # a shard of a growing store, whichever comes first
_ENCODED_TOGETHER = 64
_CONTENT = "sha256:"
_LOOKED_AT_BYTES = 1 << 20  # of each end of a file of weights
# Options that say where and how an encoder computes: embeddings agree within bfloat16.
_INCIDENTAL = ("device", "download", "cache_dir", "dtype", "memory_gib", "length_multiple")


def encoder_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the embeddings of an encoder depend on, out of its plain config; a local file or folder by its content.

    >>> encoder_identity({"_target_": "foley.models.text.FrozenT5Conditioner", "name_or_path": "a/t5", "dim": 8})
    {'kind': 'FrozenT5Conditioner', 'max_length': 100, 'revision': 'main', 'name_or_path': 'a/t5', 'dim': 8}
    """
    kind = component_class(str(config["_target_"]))
    identity: dict[str, Any] = {"kind": kind.__name__ if kind else str(config["_target_"])}
    for name, value in written_out(config).items():
        path = locate(str(Path(value).expanduser())) if isinstance(value, str) and value else None
        if name not in ("_target_", *_INCIDENTAL):
            identity[name] = _fingerprint(path) if path is not None and path.exists() else value
    if str(identity.get("name_or_path")).startswith(_CONTENT):
        identity.pop("revision", None)  # of the hub alone
    return identity


def _fingerprint(path: Path) -> str:
    """Of names, sizes, beginnings and ends of the files: other weights differ there, and 11 GB take no time."""
    digest = sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path)}:{file.stat().st_size};".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_LOOKED_AT_BYTES))
                stream.seek(max(stream.tell(), file.stat().st_size - _LOOKED_AT_BYTES))
                digest.update(stream.read())
    return _CONTENT + digest.hexdigest()


# ---------------------------------------------------------------- while they are made


class EmbeddingCache:
    """Maps a prompt to its unpadded embedding `[S, Dc]`.

    Args:
        identity: everything besides the prompt that the embedding depends on (encoder, type).
        directory: a store that keeps embeddings between runs (`foley.core.embeddings`); it is appended to in the
            background, many embeddings to a file, and when the process ends. None keeps none.
        memory_gib: of the most recently used embeddings that stay in memory, on the device that they were made on.
    """

    def __init__(self, identity: Any, directory: Path | None = None, memory_gib: float = MEMORY_GIB) -> None:
        self.identity = identity
        self.directory = directory
        self.memory_bytes = round(memory_gib * (1 << 30))
        self._memory: OrderedDict[str, Tensor] = OrderedDict()  # the least recently used first
        self._held = 0  # bytes
        self._growing: _GrowingStore | None = None

    def get(self, prompt: str, device: torch.device) -> Tensor | None:
        """The embedding on `device`, or None where it is not known; an unreadable file counts as not known."""
        if prompt in self._memory:
            self._memory.move_to_end(prompt)
            return to_device(self._memory[prompt], device)
        stored = self._store.get(prompt) if self._store else None
        if stored is None:
            return None
        stored = to_device(stored, device)
        self._remember(prompt, stored)
        return stored

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Keep an embedding `[S, Dc]`."""
        self._remember(prompt, embedding)
        if self._store:
            self._store.put(prompt, embedding.detach())

    def flush(self) -> None:
        """Write what waits to be written."""
        if self._growing:
            self._growing.flush()

    def forget(self) -> None:
        """Leave nothing in memory; what is in the store stays."""
        self._memory.clear()
        self._held = 0

    def become(self, identity: Any) -> None:
        """Go on with the embeddings of another type, or of another encoder: those in memory are forgotten."""
        if identity != self.identity:
            self.flush()
            self.identity, self._growing = identity, None
            self.forget()

    def embed(
        self,
        prompts: Sequence[str],
        device: torch.device,
        encode: Callable[[list[str]], list[Tensor]],
        multiple: int = 1,
    ) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]` on `device`, zero where the mask is false.

        Args:
            encode: prompts that are not known, each once, to unpadded embeddings `[S, Dc]`.
            multiple: S is the length of the longest prompt, or the next multiple of this.
        """
        # Each distinct prompt once, in the order of first appearance.
        found = {prompt: self.get(prompt, device) for prompt in dict.fromkeys(prompts)}
        known = {prompt: embedding for prompt, embedding in found.items() if embedding is not None}
        missing = [prompt for prompt in found if prompt not in known]
        if missing:
            known.update(zip(missing, encode(missing), strict=True))  # in one batch
        for prompt in missing:
            self.put(prompt, known[prompt])
        return TextEmbedding(*pad_rows([known[prompt] for prompt in prompts], multiple))

    @property
    def _store(self) -> "_GrowingStore | None":
        """Opened when it is first needed: the directory may be named later."""
        if self._growing is None and self.directory is not None:
            self._growing = _GrowingStore(str(self.directory), self.identity)
        return self._growing

    def _remember(self, prompt: str, embedding: Tensor) -> None:
        self._held += embedding.nbytes - (self._memory[prompt].nbytes if prompt in self._memory else 0)
        self._memory[prompt] = embedding
        self._memory.move_to_end(prompt)
        while self._held > self.memory_bytes:
            self._held -= self._memory.popitem(last=False)[1].nbytes  # the least recently used


class _GrowingStore:
    """A store that is read, and appended to from time to time, by any number of processes."""

    def __init__(self, url: str, identity: Any) -> None:
        self._url, self._identity = url, identity
        self._found = EmbeddingStore.scan(url, identity)
        self._waiting: list[tuple[str, Tensor]] = []
        self._held = 0  # bytes that wait
        self._last = time.monotonic()
        weakref.finalize(self, _write_all, url, identity, self._waiting)  # at the end of the process at the latest

    def get(self, prompt: str) -> Tensor | None:
        try:
            return self._found.get(prompt)
        except (TextStoreError, EOFError, OSError) as error:
            _log.warning("%s; the embedding is computed again", error)
            return None

    def put(self, prompt: str, embedding: Tensor) -> None:
        self._waiting.append((prompt, embedding))
        self._held += embedding.nbytes
        if self._held > _WRITE_BYTES or time.monotonic() - self._last > _WRITE_SECONDS:
            # A thread, which no step of training waits for; the interpreter does, at its end.
            Thread(target=_write_all, args=(self._url, self._identity, self._taken())).start()

    def flush(self) -> None:
        _write_all(self._url, self._identity, self._taken())

    def _taken(self) -> list[tuple[str, Tensor]]:
        taken = list(self._waiting)
        self._waiting.clear()
        self._held, self._last = 0, time.monotonic()
        return taken


def _write_all(url: str, identity: Any, embeddings: list[tuple[str, Tensor]]) -> None:
    """Write embeddings as one shard; a store that cannot be written costs time, and no run."""
    if not embeddings:
        return
    keys = np.concatenate([key_of(prompt) for prompt, _ in embeddings])
    try:
        write_shard(url, keys, [embedding.cpu() for _, embedding in embeddings], identity)
    except OSError as error:
        _log.warning("embeddings of %d prompts could not be kept in %s: %s", len(embeddings), url, error)


class CachedText:
    """A conditioner that is not trained any more: encodes each distinct prompt once, the empty one included.

    Rounding depends on what else is encoded in the same batch, and stays with the prompt from then on.
    """

    def __init__(self, text: TextConditioner) -> None:
        self._text = text
        self.cache = EmbeddingCache(type(text).__name__)

    def __call__(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`, zero where the mask is false."""
        device = next(self._text.parameters()).device
        return self.cache.embed(prompts, device, self._text.encode, self._text.length_multiple)


# ---------------------------------------------------------------- made before training


class StoredText(TextConditioner):
    """Stands where a frozen encoder stands whose embeddings of all captions were made before: it is not loaded.

    Loader processes read the embeddings of captions; this gives those of the empty prompt and of samples. A prompt that
    the store lacks has the encoder loaded for it, with a word, and let go again.

    Args:
        directory: the store, a folder or a URL.
        encoder: the encoder's plain config.

    Raises:
        TextStoreError: there is no finished store, it is of another encoder, or lacks the empty prompt.
    """

    trainable = False
    place: Tensor

    def __init__(self, directory: str, encoder: Mapping[str, Any]) -> None:
        super().__init__()
        self.store = EmbeddingStore.open(directory)
        self._encoder = dict(encoder)
        require_encoder(self.store, self._encoder)
        if self.store.get("") is None:
            raise TextStoreError(f"{directory} lacks the empty prompt; encode the captions again (foley encode-text)")
        self.dim, self.length_multiple = self.store.dim, self._encoder.get("length_multiple", 1)
        self.cache = EmbeddingCache(self.store.encoder)
        self.register_buffer("place", torch.empty(0), persistent=False)  # follows the module to its device

    def forward(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`, zero where the mask is false."""
        return self.cache.embed(prompts, self.place.device, self.encode, self.length_multiple)

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Unpadded embeddings `[S, Dc]`, one per prompt, in the type of the store."""
        found = {prompt: self.store.get(prompt) for prompt in prompts}
        known = {prompt: embedding for prompt, embedding in found.items() if embedding is not None}
        if missing := [prompt for prompt in found if prompt not in known]:
            known.update(zip(missing, self._encode_online(missing), strict=True))
        return [to_device(known[prompt], self.place.device) for prompt in prompts]

    def _encode_online(self, prompts: list[str]) -> list[Tensor]:
        _log.warning(
            "%s lacks %d prompts, such as %r: the text encoder is loaded for them (foley encode-text prompts=...)",
            *(self.store.url, len(prompts), prompts[0][:60]),
        )
        encoder: TextConditioner = build_component(self._encoder).to(self.place.device)
        starts = range(0, len(prompts), _ENCODED_TOGETHER)
        rows = [row for start in starts for row in encoder.encode(prompts[start : start + _ENCODED_TOGETHER])]
        return [row.to(self.store.dtype) for row in rows]


def require_encoder(store: EmbeddingStore, encoder: Mapping[str, Any]) -> None:
    """Raise TextStoreError, with each difference, unless the encoder of this plain config made the store."""
    stored, own = dict(store.encoder), encoder_identity(encoder)
    if differences := [
        f"{name}: {stored.get(name)} in the store, {own.get(name)} in the run"
        for name in dict.fromkeys([*stored, *own])
        if stored.get(name) != own.get(name)
    ]:
        raise TextStoreError(
            f"{store.url} was made by another text encoder than this run's: {'; '.join(differences)}; "
            "choose the text encoder that made it, or encode the captions again (foley encode-text)"
        )
