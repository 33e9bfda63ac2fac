"""The small trainable text encoder and its tokenizer."""

import csv
import logging
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from stirring_parts import stir
from tokenizers import Tokenizer

from foley.core.components import load_component, save_component
from foley.core.config import PROJECT_ROOT
from foley.models.text import CachedText, SmallTextEncoder
from foley.models.text.small import BEGINNING, train_tokenizer

TOKENIZER = PROJECT_ROOT / "data" / "tokenizer" / "audiocaps.json"


@pytest.fixture
def text() -> SmallTextEncoder:
    torch.manual_seed(0)
    encoder = SmallTextEncoder(str(TOKENIZER), dim=32, depth=2, num_heads=4, max_length=16)
    stir(encoder)  # blocks begin by giving nothing
    return encoder


def test_each_token_begins_as_its_own_embedding() -> None:
    encoder = SmallTextEncoder(str(TOKENIZER), dim=32, depth=2, num_heads=4, max_length=16)
    ids, mask = encoder.tokenise(["a dog barks"])
    own = encoder.tokens(ids) + encoder.positions.table[: ids.shape[1]]
    torch.testing.assert_close(encoder.embed(ids, mask), encoder.norm(own))


def test_shapes_and_the_empty_prompt(text: SmallTextEncoder) -> None:
    result = text(["A dog barks, then rain falls", "", "rain"])
    assert text.trainable
    assert result.embeddings.shape == (3, 8, 32)
    assert result.mask.sum(1).tolist() == [8, 1, 2]
    assert bool(torch.isfinite(result.embeddings).all())


def test_half_precision_of_training_does_not_reach_the_words(text: SmallTextEncoder) -> None:
    """Rounded, what tells one word of a kind from another is lost, and of its gradients noise is left."""
    exact = text(["a dog barks", "a dog howls"]).embeddings
    exact.square().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in text.named_parameters() if parameter.grad is not None}
    text.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = text(["a dog barks", "a dog howls"]).embeddings
    found.square().sum().backward()
    assert torch.equal(found, exact)
    assert all(torch.equal(text.get_parameter(name).grad, gradient) for name, gradient in wanted.items())  # type: ignore[arg-type]


def test_padding_does_not_change_a_prompt(text: SmallTextEncoder) -> None:
    alone = text(["rain"]).embeddings[0]
    batched = text(["rain", "a dog barks while rain falls on a roof"]).embeddings[0, : len(alone)]
    torch.testing.assert_close(batched, alone, rtol=1e-5, atol=1e-6)


def test_case_does_not_count_and_words_and_order_do(text: SmallTextEncoder) -> None:
    assert torch.equal(text(["A Dog BARKS"]).embeddings, text(["a dog barks"]).embeddings)
    assert not torch.allclose(text(["a cat barks"]).embeddings, text(["a dog barks"]).embeddings)
    assert not torch.allclose(text(["dog a barks"]).embeddings[:, -1], text(["a dog barks"]).embeddings[:, -1])


def test_every_parameter_learns(text: SmallTextEncoder) -> None:
    (text(["a dog barks", "rain"]).embeddings * torch.randn(32)).sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in text.parameters())


def test_a_huge_prompt_is_cut_with_a_warning(text: SmallTextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = text(["rain " * 200_000, "\ud800 🎉\x00\n"])
    assert result.mask[0].sum() == 16
    assert "1000000 characters" in caplog.text
    caplog.clear()
    text(["rain"])
    assert not caplog.records


def test_round_trip_as_a_portable_component(text: SmallTextEncoder, tmp_path: Path) -> None:
    config = {
        "_target_": "foley.models.text.SmallTextEncoder",
        "tokenizer_file": str(TOKENIZER),
        "dim": 32,
        "depth": 2,
        "num_heads": 4,
        "max_length": 16,
    }
    save_component(text, config, tmp_path / "a", assets={"tokenizer_file": TOKENIZER})
    assert str(PROJECT_ROOT) not in (tmp_path / "a" / "config.json").read_text()
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    loaded = load_component(tmp_path / "elsewhere")
    assert torch.equal(loaded(["a dog barks", ""]).embeddings, text(["a dog barks", ""]).embeddings)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist.*train_tokenizer"):
        SmallTextEncoder(str(tmp_path / "nowhere.json"), 32, 1, 4, 16)


def test_a_tokenizer_without_a_beginning_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a dog barks"], 300)
    tokenizer.post_processor = None  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match="empty prompt"):
        SmallTextEncoder(str(tmp_path / "bare.json"), 32, 1, 4, 16)


def test_the_tokenizer_knows_every_byte() -> None:
    tokenizer = train_tokenizer(["a dog barks"], 300)
    for prompt in ("a dog barks", "čeština 🎉 雨", "tab\tnull\x00"):
        assert tokenizer.decode(tokenizer.encode(prompt).ids).strip() == prompt


def test_the_shipped_tokenizer_is_what_the_script_trains(shared: Path) -> None:
    with (shared / "data" / "audiocaps" / "train.csv").open(encoding="utf-8-sig", newline="") as stream:
        captions = [row["caption"] for row in csv.DictReader(stream)]
    shipped = Tokenizer.from_file(str(TOKENIZER))
    trained = train_tokenizer(captions, shipped.get_vocab_size())
    assert trained.get_vocab() == shipped.get_vocab()
    assert shipped.encode("").tokens == [BEGINNING]


def test_every_text_config_composes() -> None:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        for file in sorted((PROJECT_ROOT / "configs" / "text").glob("*.yaml")):
            config = compose(overrides=[f"+text={file.stem}"]).text
            assert config._target_.startswith("foley.models.text.")
            # A long caption, or ten seconds of features.
            assert config.max_length >= (40 if "feature_dim" in config else 64)


def test_a_cached_encoder_sees_each_prompt_once(text: SmallTextEncoder) -> None:
    calls: list[list[str]] = []
    hook = text.register_forward_hook(lambda _, arguments, __: calls.append(list(arguments[0])))
    cached = CachedText(text.eval())
    first, again = cached(["a dog barks", "", "rain", ""]), cached(["", "a dog barks"])
    hook.remove()
    assert calls == [["a dog barks", "", "rain"]]
    expected = text(["a dog barks", "", "rain", ""])
    assert torch.equal(first.mask, expected.mask)
    torch.testing.assert_close(first.embeddings[first.mask], expected.embeddings[expected.mask])
    assert torch.equal(again.embeddings[1][again.mask[1]], first.embeddings[0][first.mask[0]])


def test_masked_tokens_fill_up_to_a_multiple_and_no_further_than_the_longest_prompt() -> None:
    plain, padded = (
        SmallTextEncoder("data/tokenizer/audiocaps.json", 16, 1, 2, max_length=20, length_multiple=n) for n in (1, 8)
    )
    padded.load_state_dict(plain.state_dict())
    for prompts, length in ((["rain", ""], 8), (["rain " * 50, "a dog"], 20)):
        expected, found = plain.eval()(prompts), padded.eval()(prompts)
        assert found.mask.shape == (2, length)
        assert expected.mask.sum(dim=1).tolist() == found.mask.sum(dim=1).tolist()
        torch.testing.assert_close(found.embeddings[found.mask], expected.embeddings[expected.mask])
    assert CachedText(padded)(["rain"]).mask.shape == (1, 8)
