"""Word vectors under the small text encoder: which words, what the file holds, and what an encoder makes of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stirring_parts import stir

from foley.core.components import load_component, save_component
from foley.core.config import PROJECT_ROOT
from foley.models.text import SmallTextEncoder
from foley.models.text.words import (
    BEGINNING,
    PADDING,
    PIECES,
    UNKNOWN,
    WordEmbedding,
    choose_words,
    drawn_from,
    read_vectors,
    word_tokenizer,
    words_of,
    write_word_vectors,
)

WORDS = PROJECT_ROOT / "data" / "words"
VECTORS = {"the": [1.0, 0.0], "dog": [0.0, 2.0], "hound": [0.1, 2.0], "tax": [-1.0, 0.1], "rain": [2.0, -1.0]}


@pytest.fixture
def text(tmp_path: Path) -> SmallTextEncoder:
    words = write_word_vectors(tmp_path / "vectors.safetensors", VECTORS, ["dog", "plip"], ["the", "hound", "rain"])
    word_tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    files = {"tokenizer_file": str(tmp_path / "tokenizer.json"), "vectors_file": str(tmp_path / "vectors.safetensors")}
    encoder = SmallTextEncoder(**files, dim=16, depth=1, num_heads=2, max_length=8)
    stir(encoder)  # blocks begin by giving nothing
    return encoder


def test_the_words_of_captions_are_without_case_and_marks_stand_alone() -> None:
    assert words_of(["A dog barks, twice.", "a DOG"]) == [",", ".", "a", "barks", "dog", "twice"]


def test_frequent_words_come_first_then_named_ones_then_the_nearest() -> None:
    assert choose_words(VECTORS, ["dog", "unheard"], common=1, size=3) == ["the", "dog", "hound"]
    assert choose_words(VECTORS, ["dog"], common=1, size=9) == ["the", "dog", "hound", "tax", "rain"]


def test_both_kinds_of_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_text("the 1.0 0.0\ndog 0.0 2.0\n")
    table = {"dimensions": 2, "words": ["the", "dog"], "vectors": {"the": [1.0, 0.0, 1, 0], "dog": [0.0, 2.0, 2, 1]}}
    (tmp_path / "wink.json").write_text(json.dumps(table))
    expected = {"the": [1.0, 0.0], "dog": [0.0, 2.0]}
    assert read_vectors(tmp_path / "glove.txt") == read_vectors(tmp_path / "wink.json") == expected


@pytest.mark.parametrize(("name", "content", "complaint"), [("a.json", "{}", "no vectors"), ("a.txt", "a b", "line 1")])
def test_another_file_is_refused(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_vectors(tmp_path / name)


def test_vectors_are_directions_from_their_centre_in_bytes(tmp_path: Path) -> None:
    words = write_word_vectors(tmp_path / "v.safetensors", VECTORS, ["plip", "dog"], ["dog", "rain"])
    assert words == [PADDING, BEGINNING, UNKNOWN, "plip", "dog", "rain", *PIECES]
    held = load_file(tmp_path / "v.safetensors")
    assert held["num_own"] == 5
    table = held["vectors"].float() * held["scales"].float()[:, None]
    assert not table[:4].any()  # marks, and a word that has no vector
    torch.testing.assert_close(table[4], -table[5], rtol=1e-2, atol=1e-2)  # two words lie across their centre
    assert table[4].square().mean().sqrt().item() == pytest.approx(1.0, abs=0.01)


def test_a_word_of_no_caption_is_its_vector_alone(text: SmallTextEncoder) -> None:
    text.eval()
    dog, hound, rain = (text([word]).embeddings[0, 1] for word in ("dog", "hound", "rain"))
    assert torch.dist(dog, hound) < torch.dist(rain, hound)
    with torch.no_grad():
        text.tokens.own.weight[text.tokenizer.token_to_id("dog")] *= -1  # type: ignore[union-attr, operator]
    assert torch.equal(text(["hound"]).embeddings[0, 1], hound)
    assert not torch.equal(text(["dog"]).embeddings[0, 1], dog)


def test_what_a_caption_has_beside_its_vectors_is_left_out_at_random_in_training(tmp_path: Path) -> None:
    write_word_vectors(tmp_path / "v.safetensors", VECTORS, list(VECTORS), [])
    embedding = WordEmbedding(str(tmp_path / "v.safetensors"), dim=4, own_dropout=0.25)
    ids = torch.arange(3, 8).repeat(400, 1).flatten()[torch.randperm(2000)].view(400, 5)
    vectors_alone = embedding.projection(embedding.vectors[ids].float() * embedding.scales[ids][..., None])
    bare = (embedding(ids) - vectors_alone).abs().amax(-1) < 1e-6
    assert bare.float().mean().item() == pytest.approx(0.25, abs=0.04)  # four deviations
    assert torch.equal(embedding(ids), embedding(ids))  # of one batch always the same, so a run that goes on repeats it
    embedding.requires_grad_(False)  # as the encoder of a teacher
    assert torch.equal(embedding(ids), embedding.eval()(ids))


def test_what_is_drawn_from_a_batch_is_even_and_another_ones_is_another() -> None:
    draws = torch.stack([drawn_from(torch.arange(256).view(16, 16) + batch) for batch in range(500)])
    counts = torch.histc(draws, 10, 0, 1) / draws.numel()
    assert (counts - 0.1).abs().max() < 0.005
    assert abs(torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))[0, 1].item()) < 0.01


def test_two_words_that_nobody_knows_are_two(text: SmallTextEncoder) -> None:
    """So that adapters can teach the one and the other."""
    tokens = [
        text.tokenizer.encode(word, add_special_tokens=False).tokens for word in ("zorble", "dogbert", "zorb\u00e9")
    ]
    assert tokens == [
        ["z", *(f"##{letter}" for letter in "orble")],
        ["dog", *(f"##{letter}" for letter in "bert")],
        [UNKNOWN],
    ]
    first, second = text.eval()(["zorble", "zorbel"]).embeddings
    assert not torch.allclose(first, second)


def test_every_parameter_learns_and_the_vectors_stay(text: SmallTextEncoder) -> None:
    (text(["the dog plip", "rain"]).embeddings * torch.randn(16)).sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in text.parameters())
    assert not any("vectors" in name or "scales" in name for name in text.state_dict())


def test_the_files_travel_with_the_encoder(text: SmallTextEncoder, tmp_path: Path) -> None:
    files = {
        name: tmp_path / f"{name.removesuffix('_file')}{end}"
        for name, end in (("tokenizer_file", ".json"), ("vectors_file", ".safetensors"))
    }
    config = {
        "_target_": "foley.models.text.SmallTextEncoder",
        **{name: str(file) for name, file in files.items()},
        **{"dim": 16, "depth": 1, "num_heads": 2, "max_length": 8},
    }
    save_component(text, config, tmp_path / "a", assets=files)
    for file in files.values():
        file.unlink()
    loaded = load_component(tmp_path / "a").eval()
    prompts = ["The dog", "hound", ""]
    torch.testing.assert_close(loaded(prompts).embeddings, text.eval()(prompts).embeddings)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make_word_vectors"):
        WordEmbedding(str(tmp_path / "nowhere.safetensors"), dim=4)


def test_words_that_are_close_in_meaning_lie_close_in_the_file_that_ships() -> None:
    tokenizer_file, vectors_file = str(WORDS / "tokenizer.json"), str(WORDS / "vectors.safetensors")
    text = SmallTextEncoder(tokenizer_file, 16, 1, 2, 16, vectors_file=vectors_file)
    held = load_file(vectors_file)

    def nearness(first: str, second: str) -> float:
        rows = [held["vectors"][text.tokenizer.token_to_id(word)].float() for word in (first, second)]
        return float(torch.cosine_similarity(rows[0], rows[1], dim=0))

    assert nearness("dog", "hound") > nearness("dog", "engine") + 0.3
    assert nearness("rain", "downpour") > nearness("rain", "violin") + 0.3
    assert text.tokenizer.get_vocab_size() == len(held["vectors"])
