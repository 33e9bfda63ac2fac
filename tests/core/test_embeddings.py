"""Stores of embeddings: found by text, read by offset, described by their shards alone."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from foley.core.columns import Texts
from foley.core.embeddings import (
    INDEX_FILE,
    EmbeddingStore,
    TextStoreError,
    is_finished,
    key_of,
    pad_rows,
    shard_names,
    text_keys,
    write_shard,
)

ENCODER = {"kind": "T5", "dim": 4}
WORDS = ("rain", "", "a dog barks 🐕", "wind")


def rows_of(texts, dtype=torch.bfloat16):
    """As many tokens as the text has characters, and one more; their values tell texts and tokens apart."""
    return [
        torch.arange(len(text) + 1, dtype=dtype)[:, None] + torch.full((1, 4), len(text), dtype=dtype) for text in texts
    ]


def fill(url, *parts, encoder=ENCODER, dtype=torch.bfloat16):
    for texts in parts:
        write_shard(str(url), text_keys(Texts.of(texts)), rows_of(texts, dtype), encoder)
    EmbeddingStore.scan(url, encoder).write_index()
    return EmbeddingStore.open(url)


def test_keys_are_of_the_text_alone() -> None:
    keys = text_keys(Texts.of(WORDS))
    assert len(np.unique(keys)) == 2 * len(WORDS)
    assert all(np.array_equal(key_of(word)[0], key) for word, key in zip(WORDS, keys, strict=True))
    assert np.array_equal(key_of("\ud800"), key_of("?"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    store = fill(tmp_path, WORDS[:2], WORDS[2:], dtype=dtype)
    assert (len(store), store.dim, store.dtype, store.encoder) == (4, 4, dtype, ENCODER)
    for word, row in zip(WORDS, rows_of(WORDS, dtype), strict=True):
        assert torch.equal(store.get(word), row)
    assert store.get("snow") is None
    assert store.num_bytes == sum(row.nbytes for row in rows_of(WORDS, dtype))
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.get("rain"), store.get("rain"))
    assert len(pickle.dumps(store)) < 300  # by its URL: no loader process gets a copy


def test_any_url_holds_a_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path))
    store = fill("memory://embeddings/here", WORDS)
    assert torch.equal(store.get("wind"), rows_of(["wind"])[0])
    assert is_finished(store.url)
    assert not is_finished("memory://embeddings/there")
    assert shard_names("memory://embeddings/there") == []


def test_a_text_that_two_processes_encoded_counts_once_and_other_encoders_are_left_alone(tmp_path: Path) -> None:
    write_shard(str(tmp_path), text_keys(Texts.of(["rain"])), [torch.zeros(1, 4)], {"kind": "other"})
    store = fill(tmp_path, ["rain", "wind"], ["wind", ""])
    assert len(store) == 3
    assert store.get("rain").shape == (5, 4)


def test_what_is_missing_is_counted_and_named(tmp_path: Path) -> None:
    store = fill(tmp_path, WORDS)
    store.require(Texts.of([*WORDS, *WORDS]))
    with pytest.raises(TextStoreError, match=r"lacks the embeddings of 3 of 5 captions, such as 'snow', 'hail'; foley"):
        store.require(Texts.of(["rain", "snow", "hail", "snow", ""]))


def test_a_damaged_store_is_one_named_error(tmp_path: Path) -> None:
    with pytest.raises(TextStoreError, match=r"index\.json does not exist: .* is no finished text store"):
        EmbeddingStore.open(tmp_path)
    fill(tmp_path, WORDS)
    index = tmp_path / INDEX_FILE
    (shard,), (table,) = (list(tmp_path.glob(f"{kind}-*.safetensors")) for kind in ("text", "table"))
    for file in (index, table, shard):
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 3], whole[:-2], b"{}", b""):
            file.write_bytes(damaged)
            with pytest.raises(TextStoreError, match=file.name):
                EmbeddingStore.open(tmp_path)
        file.unlink()
        with pytest.raises(TextStoreError, match=file.name):
            EmbeddingStore.open(tmp_path)
        file.write_bytes(whole)
    stored = json.loads(index.read_text())
    faults = ({"num_tokens": 2}, {"name": "../x"}, {"dtype": "I8"}, {"offset": -1})
    shards = [{"shards": [{**stored["shards"][0], **fault}]} for fault in faults]
    for changed in ({"num_texts": 3}, {"format": "other"}, *shards):
        index.write_text(json.dumps({**stored, **changed}))
        with pytest.raises(TextStoreError, match=r"index\.json is damaged"):
            EmbeddingStore.open(tmp_path)
    index.write_text(json.dumps({**stored, "shards": [{**stored["shards"][0], "sha256": "of another"}]}))
    with pytest.raises(
        TextStoreError, match=rf"{shard.name} is damaged .*index\.json describes another one; put it back"
    ):
        EmbeddingStore.open(tmp_path)


def test_a_store_that_grows_stays_whole_until_its_index_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path, WORDS)
    before = (tmp_path / INDEX_FILE).read_bytes()
    assert len(fill(tmp_path, ["snow"])) == len(WORDS) + 1
    (tmp_path / INDEX_FILE).write_bytes(before)  # as if the process had been killed before it wrote the index
    assert len(EmbeddingStore.open(tmp_path)) == len(WORDS)


def test_an_embedding_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    write_shard(str(tmp_path), key_of("rain"), [torch.full((2, 4), float("nan"))], ENCODER)
    with pytest.raises(TextStoreError, match="not finite"):
        EmbeddingStore.scan(tmp_path, ENCODER).get("rain")


def test_masked_tokens_fill_up_to_a_multiple() -> None:
    rows = [torch.ones(3, 2), torch.ones(5, 2)]
    for multiple, length in ((1, 5), (4, 8), (5, 5)):
        embeddings, mask = pad_rows(rows, multiple)
        assert embeddings.shape == (2, length, 2)
        assert mask.sum(dim=1).tolist() == [3, 5]
        assert bool((embeddings[~mask] == 0).all())


def test_a_hundred_thousand_texts_take_a_few_bytes_each(tmp_path: Path) -> None:
    """The table is mapped: what a process holds itself does not grow with the texts."""
    texts = Texts.of(f"sound number {index}" for index in range(100_000))
    keys = text_keys(texts)
    token = torch.zeros(1, 2, dtype=torch.bfloat16)
    for first in range(0, 100_000, 50_000):
        write_shard(str(tmp_path), keys[first : first + 50_000], [token] * 50_000, ENCODER)
    EmbeddingStore.scan(tmp_path, ENCODER).write_index()
    (table,) = tmp_path.glob("table-*.safetensors")
    assert table.stat().st_size < 33 * 100_000
    assert (tmp_path / INDEX_FILE).stat().st_size < 2000
    store = EmbeddingStore.open(tmp_path)
    assert len(store) == 100_000
    assert not any(column.flags.owndata for column in store._columns.values())
    assert len(pickle.dumps(store)) < 300
    store.require(texts)
    assert (store.find(keys[::1000]) >= 0).all()
    assert store.find(key_of("sound number 100000")).tolist() == [-1]
