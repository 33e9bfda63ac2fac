"""Captions to a store of their embeddings: each once, over any number of processes, going on where one has stopped."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foley.core.columns import Texts
from foley.core.embeddings import (
    EmbeddingStore,
    Keys,
    TextStoreError,
    is_finished,
    make_folder,
    text_keys,
    write_shard,
)
from foley.core.logs import get_logger
from foley.core.sharding import ALL, Shard
from foley.models.text.base import TextConditioner
from foley.models.text.kept import encoder_identity, require_encoder

_log = get_logger(__name__)

SHARD_BYTES = 256 << 20
_SHARD_SECONDS = 300.0  # what a fault costs at most, where encoding is slow


def encode_texts(
    text: TextConditioner,
    config: Mapping[str, Any],
    texts: Texts,
    url: str,
    batch_size: int = 64,
    share: Shard = ALL,
    shard_bytes: int = SHARD_BYTES,
) -> EmbeddingStore | None:
    """Encode what the store at `url` lacks of `texts` and of the empty prompt, as bfloat16.

    What the finished shards hold is done, whoever wrote them: a run that was killed goes on, on any number of ranks,
    a finished store grows by further texts, a damaged one is mended. The rank that finds all texts writes the index.

    Args:
        text: a frozen conditioner, on the device where it is to run.
        config: its plain config, by which training knows the store.
        texts: captions, in any order, as often as they occur.
        batch_size: texts of similar length that are encoded together.
        share: which of the texts this process encodes, by their hash.
        shard_bytes: of embeddings in a file.

    Returns the finished store, or None where other ranks still have texts to encode.

    Raises:
        ValueError: the encoder is trained along, or gives an embedding that is not finite; the text is named.
        TextStoreError: the store at `url` is of another encoder, or can be no folder.
    """
    if text.trainable:
        raise ValueError(f"{type(text).__name__} is trained with the denoiser: what it gives now is of no later use")
    make_folder(url)
    store = _finished(url, config)
    identity = encoder_identity(config)
    keys, texts = _distinct(Texts.join([texts, Texts.of([""])]))
    found = EmbeddingStore.scan(url, identity)
    absent = found.find(keys) < 0
    own = np.flatnonzero(absent & (keys[:, 0] % share.count == share.number))
    _log.info("%d distinct captions; %d embeddings are in %s; %d are made here", len(keys), len(found), url, len(own))
    _encode(text, texts.take(own), keys[own], url, identity, batch_size, shard_bytes)
    if absent.any() or store is None:
        found = EmbeddingStore.scan(url, identity)
        if waiting := int((found.find(keys) < 0).sum()):
            _log.info("%d captions are left to other processes; the last to end writes the index", waiting)
            return None
        found.write_index()
    _log.info("embeddings of %d captions are in %s: train with data.text_dir=%s", len(found), url, url)
    return EmbeddingStore.open(url)


def _finished(url: str, config: Mapping[str, Any]) -> EmbeddingStore | None:
    """The store at `url`; None where there is none, or a damaged one, whose index is then written anew.

    Raises TextStoreError where it is of another encoder.
    """
    if not is_finished(url):
        return None
    try:
        store = EmbeddingStore.open(url)
    except TextStoreError as error:
        _log.warning("%s; what is whole of it is kept", error)
        return None
    require_encoder(store, config)
    return store


def _distinct(texts: Texts) -> tuple[Keys, Texts]:
    keys = text_keys(texts)
    _, rows = np.unique(keys[:, 0], return_index=True)
    return keys[rows], texts.take(rows)


def _encode(
    text: TextConditioner, texts: Texts, keys: Keys, url: str, identity: Any, batch_size: int, shard_bytes: int
) -> None:
    """Encode `texts` and write them; a shard is written while the next one is encoded."""
    order = np.argsort(-np.diff(texts.ends, prepend=0), kind="stable")  # the longest first: memory fails early or never
    writes: list[Future[str]] = []
    with ThreadPoolExecutor(1) as writer:
        for done, rows in _shards(text, texts, order, batch_size, shard_bytes):
            for earlier in writes:
                earlier.result()  # raises what went wrong; no more than one shard waits in memory
            writes = [writer.submit(write_shard, url, keys[order[done - len(rows) : done]], rows, identity)]
            _log.info("%d of %d captions are encoded", done, len(texts))
        for last in writes:
            last.result()


def _shards(
    text: TextConditioner, texts: Texts, order: NDArray[np.int64], batch_size: int, shard_bytes: int
) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """How many texts are encoded so far, and the embeddings of the last of them, enough to fill a shard."""
    rows: list[Tensor] = []
    held, since = 0, time.monotonic()
    for first in range(0, len(order), batch_size):
        batch = _encode_batch(text, list(texts.take(order[first : first + batch_size])))
        rows += batch
        held += sum(row.nbytes for row in batch)
        if held >= shard_bytes or time.monotonic() - since > _SHARD_SECONDS or first + batch_size >= len(order):
            yield min(first + batch_size, len(order)), rows
            rows, held, since = [], 0, time.monotonic()


def _encode_batch(text: TextConditioner, prompts: list[str]) -> list[Tensor]:
    encoded = text.encode(prompts)
    together = torch.cat(encoded).to("cpu", torch.bfloat16)  # one transfer
    rows = list(together.split([len(row) for row in encoded]))
    for prompt, row in zip(prompts, rows, strict=True):
        if not bool(row.isfinite().all()):
            raise ValueError(f"the embedding of {prompt[:80]!r} is not finite: compute in text.dtype=float32")
    return rows
