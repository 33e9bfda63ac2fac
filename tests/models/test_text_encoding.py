"""Captions are encoded once: duplicates together, over any number of processes, on where one has stopped."""

from pathlib import Path

import pytest
import torch
from tiny_t5 import DIM, save_t5

from foley.core.columns import Texts
from foley.core.embeddings import EmbeddingStore, TextStoreError, is_finished, shard_names
from foley.core.sharding import Shard
from foley.models.text import FrozenT5Conditioner, SmallTextEncoder, StoredText, TextEmbedding, encoder_identity, kept
from foley.models.text.encoding import encode_texts

CAPTIONS = Texts.of(["a dog barks", "rain", "a dog barks on a roof", "rain falls", "rain", "a roof"])


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_t5(tmp_path_factory.mktemp("t5")))


@pytest.fixture
def config(t5: str) -> dict:
    return {"_target_": "foley.models.text.FrozenT5Conditioner", "name_or_path": t5, "dim": DIM, "length_multiple": 4}


@pytest.fixture
def text(t5: str) -> FrozenT5Conditioner:
    return FrozenT5Conditioner(t5, DIM, length_multiple=4)


def test_each_distinct_caption_and_the_empty_prompt_are_stored_once(text, config, tmp_path: Path, monkeypatch) -> None:
    encoded: list[str] = []
    original = text.encode
    monkeypatch.setattr(text, "encode", lambda prompts: encoded.extend(prompts) or original(prompts))
    store = encode_texts(text, config, CAPTIONS, str(tmp_path), batch_size=2)
    assert sorted(encoded) == sorted({*CAPTIONS, ""})
    assert [len(caption) for caption in encoded] == sorted(map(len, encoded), reverse=True)
    for caption in (*CAPTIONS, ""):
        expected = original([caption])[0]
        assert store.get(caption).dtype == torch.bfloat16
        torch.testing.assert_close(store.get(caption).float(), expected, rtol=8e-3, atol=1e-5)  # of bfloat16
    tokens = sum(len(row) for row in original(sorted({*CAPTIONS, ""})))
    assert store.num_bytes == tokens * DIM * 2
    encoded.clear()
    assert len(encode_texts(text, config, CAPTIONS, str(tmp_path))) == 6
    assert encoded == []
    assert len(encode_texts(text, config, Texts.of(["a dog"]), str(tmp_path))) == 7  # a finished store grows
    assert encoded == ["a dog"]


def test_ranks_share_the_captions_and_the_last_one_writes_the_index(text, config, tmp_path: Path, monkeypatch) -> None:
    counts: list[int] = []
    original = text.encode
    monkeypatch.setattr(text, "encode", lambda prompts: counts.append(len(prompts)) or original(prompts))
    for rank in (2, 0):
        assert encode_texts(text, config, CAPTIONS, str(tmp_path), share=Shard(rank, 3)) is None
        assert not is_finished(tmp_path)
    store = encode_texts(text, config, CAPTIONS, str(tmp_path), share=Shard(1, 3))
    assert sum(counts) == len(store) == 6


def test_a_run_that_was_killed_goes_on_with_what_is_missing(text, config, tmp_path: Path, monkeypatch) -> None:
    calls: list[list[str]] = []
    original = text.encode

    def failing(prompts: list[str]) -> list[torch.Tensor]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(prompts)
        return original(prompts)

    monkeypatch.setattr(text, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        encode_texts(text, config, CAPTIONS, str(tmp_path), batch_size=1, shard_bytes=1)
    assert not is_finished(tmp_path)
    done = len(shard_names(str(tmp_path)))
    assert done >= 2  # the shard that was being written may be lost, or not
    monkeypatch.setattr(text, "encode", lambda prompts: calls.append(prompts) or original(prompts))
    store = encode_texts(text, config, CAPTIONS, str(tmp_path), batch_size=1)
    assert len(store) == 6
    assert len(calls) == 3 + 6 - done


def test_a_folder_that_cannot_be_is_refused_before_anything_is_encoded(config, text, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("rain")
    text.encode = None
    with pytest.raises(TextStoreError, match=r"captions\.txt/text can be no folder, .* give another output_dir"):
        encode_texts(text, config, CAPTIONS, str(tmp_path / "captions.txt/text"))


@pytest.mark.parametrize("damage", ["gone", "cut"])
@pytest.mark.parametrize("kind", ["text-*", "table-*", "index.json"])
def test_a_damaged_store_is_mended_by_the_command_that_made_it(text, config, tmp_path: Path, kind, damage) -> None:
    encode_texts(text, config, CAPTIONS, str(tmp_path), batch_size=2, shard_bytes=1)
    file = min(tmp_path.glob(kind))
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[:-10])
    store = encode_texts(text, config, CAPTIONS, str(tmp_path), batch_size=2, shard_bytes=1)
    for caption in (*CAPTIONS, ""):
        assert store.get(caption) is not None
    assert len(EmbeddingStore.open(tmp_path)) == 6


def test_another_encoder_or_one_that_trains_is_refused(text, config, t5: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode_texts(text, config, CAPTIONS, str(store))
    with pytest.raises(TextStoreError, match="max_length: 100 in the store, 12 in the run"):
        encode_texts(text, {**config, "max_length": 12}, CAPTIONS, str(store))
    small = SmallTextEncoder("data/tokenizer/audiocaps.json", dim=16, depth=1, num_heads=2, max_length=32)
    with pytest.raises(ValueError, match="SmallTextEncoder is trained with the denoiser"):
        encode_texts(small, config, CAPTIONS, str(store))
    # Where and how it computes is not what it is; a copy of its files is the same encoder, other weights are not.
    incidental = {
        "device": "cuda",
        "dtype": "auto",
        "download": True,
        "cache_dir": "x",
        "memory_gib": 2.0,
        "length_multiple": 1,
    }
    assert encoder_identity({**config, **incidental}) == encoder_identity(config)
    other = save_t5(tmp_path / "copy")
    assert encoder_identity({**config, "name_or_path": str(other)}) == encoder_identity(config)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert encoder_identity({**config, "name_or_path": str(other)}) != encoder_identity(config)


def test_stored_text_is_the_encoder_within_bfloat16_and_loads_it_for_strangers_alone(
    text, config, tmp_path: Path, monkeypatch, caplog
) -> None:
    encode_texts(text, config, CAPTIONS, str(tmp_path))
    built: list[dict] = []
    monkeypatch.setattr(kept, "build_component", lambda options: built.append(options) or text)
    stored = StoredText(str(tmp_path), config).to(torch.float32)
    assert (stored.dim, stored.trainable, stored.length_multiple) == (DIM, False, 4)
    assert stored.state_dict() == {}
    prompts = ["rain", "", "a dog barks on a roof"]
    expected, found = text(prompts), stored(prompts)
    assert found.embeddings.dtype == torch.bfloat16
    assert torch.equal(found.mask, expected.mask)
    assert found.mask.shape[1] % 4 == 0
    torch.testing.assert_close(found.embeddings.float(), expected.embeddings, rtol=8e-3, atol=1e-5)
    assert built == []
    for _ in range(2):
        strange = stored(["rain", "snow"])
        assert strange.mask.sum(dim=1).tolist() == text(["rain", "snow"]).mask.sum(dim=1).tolist()
    assert len(built) == 1
    assert "lacks 1 prompts, such as 'snow': the text encoder is loaded" in caplog.text


def test_a_store_without_the_empty_prompt_is_refused(text, config, tmp_path: Path) -> None:
    from foley.core.embeddings import text_keys, write_shard

    write_shard(str(tmp_path), text_keys(Texts.of(["rain"])), text.encode(["rain"]), encoder_identity(config))
    EmbeddingStore.scan(tmp_path, encoder_identity(config)).write_index()
    with pytest.raises(TextStoreError, match="lacks the empty prompt"):
        StoredText(str(tmp_path), config)


def test_rows_are_replaced_by_the_empty_prompt_whatever_their_lengths() -> None:
    own = TextEmbedding(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    for length in (1, 5):
        empty = TextEmbedding(torch.full((1, length, 4), 2.0), torch.ones(1, length, dtype=torch.bool))
        mixed = own.replaced(torch.tensor([True, False]), empty)
        assert mixed.mask.sum(dim=1).tolist() == [length, 3]
        assert mixed.embeddings[mixed.mask].flatten(1)[:, 0].tolist() == [2.0] * length + [1.0] * 3
