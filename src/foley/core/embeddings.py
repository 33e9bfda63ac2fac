"""Embeddings of texts, each made once: rows of tokens in shards, found by a hash of the text and read by their offset.

A store is a folder, or any fsspec URL:

    text-HASH.safetensors   `embedding [T, Dc]`, the tokens of its texts end to end; `key [n, 2]`, the texts' hashes;
                            `end [n]`, where each text ends among the tokens. Named by its content, whole or absent.
    table-HASH.safetensors  of all texts, sorted by key: `key`, `check`, `shard`, `first_token`, `num_tokens`
    index.json              written last: the encoder, the table, and where in each shard the embeddings begin

Shards describe themselves, so that any number of processes write at the same time, and one that was killed goes on:
what the finished shards hold is done. A cache that grows has no index: its shards are looked through when it is opened.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from foley.core.columns import Columns, Texts
from foley.core.devices import to_device
from foley.core.files import atomic_write
from foley.core.hashing import hash_tensors
from foley.core.logs import get_logger
from foley.core.numbers import NumberRange
from foley.core.ranges import Range, RangeReader, TensorHeader, filesystem_of, local_copy, publish
from foley.core.reading import DamagedFileError, parse_json, reading

_log = get_logger(__name__)

FORMAT = "foley-text-1"
INDEX_FILE = "index.json"

_AN_INDEX, _A_TABLE, _A_SHARD = (f"{part} of a text store" for part in ("the index", "the table", "a shard"))
_AGAIN = "encode the captions again (foley encode-text)"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_CHUNK_TEXTS = 1 << 16
_NAMED = 3

Keys = NDArray[np.uint64]
"""`[N, 2]`: of each text the first 16 bytes of its SHA-256."""


class TextStoreError(RuntimeError):
    """A store of embeddings that is damaged, of another encoder, or lacks a text; the message names it."""


def text_keys(texts: Texts) -> Keys:
    """`[N, 2]`; two million captions take about two seconds.

    >>> text_keys(Texts.of(["rain", "rain", ""]))[:, 0].tolist()
    [18381341208388868913, 18381341208388868913, 1449310910991872227]
    """
    keys, starts = np.empty((len(texts), 2), "<u8"), texts.starts
    content = texts.utf8.data  # slices of it are no copies
    for first in range(0, len(texts), _CHUNK_TEXTS):
        part = slice(first, first + _CHUNK_TEXTS)
        places = zip(starts[part].tolist(), texts.ends[part].tolist(), strict=True)
        digests = b"".join(sha256(content[start:end]).digest()[:16] for start, end in places)
        keys[part] = np.frombuffer(digests, "<u8").reshape(-1, 2)
    return keys


def key_of(text: str) -> Keys:
    """`[1, 2]`; halves of surrogate pairs count as the question marks that an encoder sees."""
    return np.frombuffer(sha256(text.encode(errors="replace")).digest()[:16], "<u8").reshape(1, 2)


@dataclass(frozen=True)
class StoredShard:
    """A shard as the index names it: its content's hash, and the byte where its `num_tokens` embeddings begin."""

    name: str
    sha256: str
    dtype: str
    offset: int
    num_tokens: int

    def __post_init__(self) -> None:
        if Path(str(self.name)).name != self.name or self.dtype not in _DTYPES:
            raise ValueError(f"shard {str(self.name)[:40]!r} is no file of this folder, or of no type that is stored")
        for number in ("offset", "num_tokens"):
            NumberRange(least=0, whole=True).check(f"{self.name}: {number}", getattr(self, number))

    def require_end(self, reader: RangeReader, dim: int) -> None:
        """Raise EOFError where the file, whose header is whole, was cut."""
        if size := self.num_tokens * dim * _DTYPES[self.dtype].itemsize:
            reader.read(self.name, self.offset + size - 1, 1)


_FoundShard = tuple[StoredShard, Keys, NDArray[np.int64], int]
"""A shard, the keys `[n, 2]` and ends `[n]` of its texts, and Dc."""


def write_shard(url: str, keys: Keys, rows: Sequence[Tensor], encoder: Any) -> str:
    """Write the embeddings, each `[S, Dc]`, of texts with these keys; returns the shard's name."""
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    # As signed numbers, which every version of PyTorch stores.
    tensors = {"key": torch.from_numpy(keys.view(np.int64).copy()), "end": ends, "embedding": torch.cat(list(rows))}
    digest = hash_tensors(tensors)
    name = f"text-{digest[:16]}.safetensors"
    metadata = {"format": FORMAT, "encoder": _plain(encoder), "sha256": digest}
    _write(url, name, save(tensors, metadata))
    return name


class EmbeddingStore:
    """The embeddings of a store, `[S, Dc]` by text; a few bytes of memory a text, shared where the table is mapped.

    `open` takes a finished store, by its index; `scan` what is there so far of one encoder. Pickled, an opened store
    is its URL: loader processes map the same table.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = [torch.ones(3, 8), torch.zeros(1, 8)]
    ...     _ = write_shard(folder, text_keys(Texts.of(["rain", ""])), rows, encoder="a T5")
    ...     EmbeddingStore.scan(folder, encoder="a T5").write_index()
    ...     store = EmbeddingStore.open(folder)
    ...     store.get("rain").shape, store.get("").shape, store.get("snow"), store.num_bytes
    (torch.Size([3, 8]), torch.Size([1, 8]), None, 128)
    """

    def __init__(
        self,
        url: str,
        encoder: Any,
        dim: int,
        shards: Sequence[StoredShard],
        columns: Mapping[str, NDArray[Any]],
        indexed: bool = False,
    ) -> None:
        self.url, self.encoder, self.dim, self.shards = url, encoder, dim, list(shards)
        self._columns, self._indexed = columns, indexed
        self._reader = RangeReader(url)

    @classmethod
    def open(cls, url: str | Path) -> "EmbeddingStore":
        """The finished store at `url`; raises TextStoreError where there is none, or it is damaged."""
        url = str(url)
        try:
            index = _read_index(url)
            with reading(f"{url}/{INDEX_FILE}", _AN_INDEX, _AGAIN):
                shards = [StoredShard(**shard) for shard in index["shards"]]
                if Path(index["table"]).name != index["table"]:
                    raise ValueError(f"table {index['table'][:40]!r} is no file of this folder")
                table = Columns(local_copy(url, index["table"], index["table_sha256"]), _A_TABLE, _AGAIN)
                names = ("key", "check", "shard", "first_token", "num_tokens")
                columns = {name: table.numbers(name) for name in names}
                _check_columns(columns, shards, index["num_texts"])
                store = cls(url, index["encoder"], index["dim"], shards, columns, indexed=True)
            store._check_shards()
        except DamagedFileError as error:
            raise TextStoreError(str(error)) from error
        except FileNotFoundError as error:
            raise TextStoreError(f"a file of {url} is gone ({error}); put it back, or {_AGAIN}") from error
        return store

    @classmethod
    def scan(cls, url: str | Path, encoder: Any) -> "EmbeddingStore":
        """What the shards at `url` hold of this encoder's; those of others are left alone, as are damaged ones.

        Each key counts once, where several processes encoded the same text.
        """
        url = str(url)
        found: list[_FoundShard] = []
        reader = RangeReader(url)
        for name in shard_names(url):
            try:
                with reading(f"{url}/{name}", _A_SHARD, _AGAIN):
                    found += _read_shard(reader, name, encoder)
            except DamagedFileError as error:
                _log.warning("%s; its texts are encoded again", error)
        shards = [shard for shard, _, _, _ in found]
        dim = found[0][3] if found else 0
        return cls(url, encoder, dim, shards, _columns([(keys, ends) for _, keys, ends, _ in found]))

    def __reduce__(self) -> tuple[Any, ...]:
        if self._indexed:
            return EmbeddingStore.open, (self.url,)
        return EmbeddingStore, (self.url, self.encoder, self.dim, self.shards, self._columns)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._columns["key"])

    @property
    def num_bytes(self) -> int:
        """Of all embeddings, on the disk and to be read."""
        sizes = [_DTYPES[shard.dtype].itemsize * shard.num_tokens for shard in self.shards]
        return self.dim * sum(sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings; float32 where there are none."""
        return _DTYPES[self.shards[0].dtype] if self.shards else torch.float32

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Rows `[N]` of the texts with these keys, -1 where a text is not there."""
        known = self._columns["key"].view(np.uint64)
        if not len(known):
            return np.full(len(keys), -1)
        rows = np.searchsorted(known, keys[:, 0]).clip(max=len(known) - 1)
        found = (known[rows] == keys[:, 0]) & (self._columns["check"].view(np.uint64)[rows] == keys[:, 1])
        return np.where(found, rows, -1)

    def read(self, row: int) -> Tensor:
        """The embedding `[S, Dc]` of a row; raises TextStoreError for one that is not finite, EOFError and OSError."""
        shard = self.shards[self._columns["shard"][row]]
        content = self._reader.read(*self._range(row))
        embedding = torch.frombuffer(content, dtype=_DTYPES[shard.dtype]).view(-1, self.dim)
        if not bool(embedding.isfinite().all()):
            raise TextStoreError(f"{self.url}/{shard.name} holds an embedding that is not finite; {_AGAIN}")
        return embedding

    def prefetch(self, texts: Sequence[str]) -> None:
        """Ask for the embeddings of texts that will be read next, together."""
        rows = self.find(np.concatenate([key_of(text) for text in texts]))
        if known := [self._range(int(row)) for row in np.unique(rows[rows >= 0])]:
            self._reader.prefetch(known)

    def _range(self, row: int) -> Range:
        shard = self.shards[self._columns["shard"][row]]
        width = self.dim * _DTYPES[shard.dtype].itemsize
        first, tokens = int(self._columns["first_token"][row]), int(self._columns["num_tokens"][row])
        return shard.name, shard.offset + first * width, tokens * width

    def get(self, text: str) -> Tensor | None:
        """The embedding `[S, Dc]` of a text, or None where the store has none; raises as `read` does."""
        row = int(self.find(key_of(text))[0])
        return None if row < 0 else self.read(row)

    def require(self, texts: Texts) -> None:
        """Raise TextStoreError, with their number and the first of them, unless all `texts` are there."""
        keys = text_keys(texts)
        order = np.argsort(keys[:, 0])  # neighbours are looked up in one place of the table
        absent = np.sort(order[self.find(keys[order]) < 0])
        if len(absent):
            first = ", ".join(repr(text) for text in dict.fromkeys(texts.take(absent[: 100 * _NAMED])))
            raise TextStoreError(
                f"{self.url} lacks the embeddings of {len(absent)} of {len(texts)} captions, such as {first[:200]}; "
                "foley encode-text with the same output_dir adds them"
            )

    def write_index(self) -> None:
        """Write the table and then the index: the store is finished."""
        table = save({name: torch.from_numpy(column) for name, column in self._columns.items()}, {"format": FORMAT})
        digest = sha256(table).hexdigest()
        name = f"table-{digest[:16]}.safetensors"  # the table of an index that is there stays until the new index is
        _write(self.url, name, table)
        index = {
            "format": FORMAT,
            "encoder": self.encoder,
            "dim": self.dim,
            "num_texts": len(self),
            "num_tokens": sum(shard.num_tokens for shard in self.shards),
            "table": name,
            "table_sha256": digest,
            "shards": [asdict(shard) for shard in self.shards],
        }
        _write(self.url, INDEX_FILE, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())

    def _check_shards(self) -> None:
        """Raise DamagedFileError unless each shard is the one of the index, to its end; headers alone are read."""
        for shard in self.shards:
            with reading(f"{self.url}/{shard.name}", _A_SHARD, f"put it back, or {_AGAIN}"):
                if TensorHeader.read(self._reader, shard.name).metadata["sha256"] != shard.sha256:
                    raise ValueError(f"{INDEX_FILE} describes another one")
                shard.require_end(self._reader, self.dim)


def pad_rows(rows: Sequence[Tensor], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings `[S_i, Dc]`, each of its own length, as one `[B, S, Dc]`, and their mask `[B, S]`, true where valid.

    S is the length of the longest, or the next multiple of `multiple`: few lengths, and few compiled graphs.

    >>> embeddings, mask = pad_rows([torch.ones(3, 8), torch.ones(1, 8)], multiple=4)
    >>> embeddings.shape, mask.sum(dim=1).tolist()
    (torch.Size([2, 4, 8]), [3, 1])
    """
    lengths = to_device(torch.tensor([len(row) for row in rows]), rows[0].device)
    embeddings = pad_sequence(list(rows), batch_first=True)  # zero beyond each length
    embeddings = pad(embeddings, (0, 0, 0, -embeddings.shape[1] % multiple))
    return embeddings, torch.arange(embeddings.shape[1], device=embeddings.device) < lengths[:, None]


def store_bytes(num_texts: int, tokens_per_text: float, dim: int) -> int:
    """What a store of that many texts takes in bfloat16, its keys and its table included.

    Of FLAN-T5-XL, in KB a caption, and in GB the second stage of EzAudio:

    >>> store_bytes(1, 25, 2048) / 1e3, store_bytes(270_000, 25, 2048) / 1e9
    (102.456, 27.66312)
    """
    key_and_end, row_of_table = 16 + 8, 8 + 8 + 4 + 8 + 4
    return round(num_texts * (2 * tokens_per_text * dim + key_and_end + row_of_table))


def shard_names(url: str) -> list[str]:
    """The shards at `url`, by name; none where it does not exist."""
    filesystem, root = filesystem_of(url, os.getpid())
    filesystem.invalidate_cache()  # others write there too
    found = filesystem.glob(f"{root}/text-*.safetensors")
    return sorted(str(path).rpartition("/")[2] for path in found)


def make_folder(url: str) -> None:
    """Make the folder of a store; raises TextStoreError where something else is in its place."""
    filesystem, root = filesystem_of(url, os.getpid())
    try:
        filesystem.makedirs(root, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise TextStoreError(
            f"{url} can be no folder, for a file is there ({error}); give another output_dir"
        ) from error


def is_finished(url: str | Path) -> bool:
    """Whether a store at `url` has its index."""
    filesystem, root = filesystem_of(str(url), os.getpid())
    return bool(filesystem.exists(f"{root}/{INDEX_FILE}"))


def _read_index(url: str) -> dict[str, Any]:
    filesystem, root = filesystem_of(url, os.getpid())
    where = f"{url}/{INDEX_FILE}"
    try:
        content = filesystem.cat_file(f"{root}/{INDEX_FILE}")
    except FileNotFoundError as error:
        raise TextStoreError(f"{where} does not exist: {url} is no finished text store; {_AGAIN}") from error
    with reading(where, _AN_INDEX, _AGAIN):
        index: dict[str, Any] = dict(parse_json(content.decode(), where, _AN_INDEX, _AGAIN))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, not {FORMAT!r}")
    return index


def _check_columns(columns: Mapping[str, NDArray[Any]], shards: Sequence[StoredShard], num_texts: int) -> None:
    """Raise ValueError for a table whose rows lie beyond their shards, or are not sorted."""
    if {len(column) for column in columns.values()} != {num_texts}:
        raise ValueError(f"the table has not the {num_texts} rows that the index names")
    if not num_texts:
        return
    shard, first, count = (columns[name] for name in ("shard", "first_token", "num_tokens"))
    sizes = np.array([shard.num_tokens for shard in shards])
    if shard.min() < 0 or shard.max() >= len(shards) or first.min() < 0 or count.min() < 1:
        raise ValueError("the table names places that no shard has")
    if bool((first + count > sizes[shard]).any()):
        raise ValueError("the table names tokens beyond the end of a shard")
    keys = columns["key"].view(np.uint64)
    if bool((keys[1:] <= keys[:-1]).any()):
        raise ValueError("the table is not sorted")


def _read_shard(reader: RangeReader, name: str, encoder: Any) -> Iterator[_FoundShard]:
    """What the shard says of itself; nothing of another encoder's."""
    header = TensorHeader.read(reader, name)
    if header.metadata["encoder"] != _plain(encoder):
        return
    dtype, (num_tokens, dim), offset = header.tensors["embedding"]
    keys, ends = (header.array(reader, key, name) for key in ("key", "end"))
    if dtype not in _DTYPES or len(keys) != len(ends) or (ends[-1] if len(ends) else 0) != num_tokens:
        raise ValueError("its tensors do not fit each other")
    shard = StoredShard(name, header.metadata["sha256"], dtype, offset, num_tokens)
    shard.require_end(reader, dim)
    yield shard, keys.view(np.uint64), ends, dim


def _columns(parts: Sequence[tuple[Keys, NDArray[np.int64]]]) -> dict[str, NDArray[Any]]:
    """The table of the texts of shards, of each its keys `[n, 2]` and ends `[n]`."""
    empty = np.empty(0, np.int64)
    keys = np.concatenate([np.empty((0, 2), np.uint64), *(keys for keys, _ in parts)])
    first = np.concatenate([empty, *(np.concatenate([[0], ends[:-1]]) for _, ends in parts)])
    count = np.concatenate([empty, *(np.diff(ends, prepend=0) for _, ends in parts)])
    shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(ends) for _, ends in parts])
    # The first of those with the same key: two texts that share 64 bits are not met in a hundred million stores.
    unique, rows = np.unique(keys[:, 0], return_index=True)
    return {
        "key": unique.view(np.int64),
        "check": keys[rows, 1].view(np.int64),
        "shard": shard[rows],
        "first_token": first[rows],
        "num_tokens": count[rows].astype(np.int32),
    }


def _plain(encoder: Any) -> str:
    return json.dumps(encoder, sort_keys=True)


def _write(url: str, name: str, content: bytes) -> None:
    """Write a file of a folder at any URL, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    publish(url, name, lambda path: atomic_write(path, write))
