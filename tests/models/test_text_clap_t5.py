"""Conditioning on a caption and its structured form, on tiny random encoders in the published layouts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clap_t5 import save_clap_t5
from tiny_t5 import DIM
from torch.nn.functional import gelu, layer_norm, linear
from transformers import BertModel, T5EncoderModel

from foley.core.columns import Texts
from foley.core.components import CheckpointError
from foley.core.embeddings import EmbeddingStore, TextStoreError
from foley.models.text import ClapT5Conditioner, StoredText, TextModelError
from foley.models.text.encoding import encode_texts

PROMPT = "a dog barks <dog barking& start>@<rain& all>"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_clap_t5(tmp_path_factory.mktemp("clap_t5"))


@torch.no_grad()
def by_hand(options: dict[str, Any], caption: str, structured: str) -> torch.Tensor:
    """The published computation: both padded to their longest, nothing masked, one after the other."""
    text, state = ClapT5Conditioner(**options), torch.load(options["weights"])["model"]
    to = {"truncation": True, "max_length": 20, "padding": "max_length", "return_tensors": "pt"}
    halves = zip(text.tokenizers, (caption, structured), strict=True)
    ids = [tokenizer(words, **to)["input_ids"] for tokenizer, words in halves]
    bert = BertModel(text.encoder.caption_encoder.base.config).eval()
    base = {name: value for name, value in state.items() if name.startswith("caption_encoder.base.")}
    base.pop("caption_encoder.base.embeddings.position_ids")
    bert.load_state_dict({name.removeprefix("caption_encoder.base."): value for name, value in base.items()})
    names = ("linear1.weight", "linear2.weight", "layer_norm.weight", "layer_norm.bias")
    first, second, *norm = (state[f"caption_encoder.projection.{name}"] for name in names)
    hidden = linear(bert(input_ids=ids[0]).last_hidden_state, first)
    projected = layer_norm(hidden + linear(gelu(hidden), second), (DIM,), *norm)
    t5 = T5EncoderModel.from_pretrained(options["name_or_path"]).eval()(input_ids=ids[1]).last_hidden_state
    return torch.cat([projected, t5], dim=1)[0]


@pytest.mark.parametrize(
    ("prompt", "caption", "structured"),
    [
        (PROMPT, "a dog barks", "<dog barking& start>@<rain& all>"),
        ("rain falls", "rain falls", "<rain falls& all>"),
        ("", "", ""),
        ("rain " * 30, "rain " * 30, f"<{'rain ' * 30}& all>"),
    ],
)
def test_it_is_the_published_computation(options: dict, prompt: str, caption: str, structured: str) -> None:
    result = ClapT5Conditioner(**options, dtype="auto")(["a dog barks on a roof", prompt])
    assert result.embeddings.shape == (2, 40, DIM)
    assert bool(result.mask.all())
    torch.testing.assert_close(result.embeddings[1], by_hand(options, caption, structured), rtol=1e-5, atol=1e-5)


def test_padding_can_be_left_out(options: dict) -> None:
    text = ClapT5Conditioner(**options, pad_to_max_length=False)
    alone, together = text.encode([PROMPT])[0], text.encode(["rain", PROMPT, ""])
    torch.testing.assert_close(together[1], alone, rtol=1e-5, atol=1e-5)
    halves = [tokenizer(part)["input_ids"] for tokenizer, part in zip(text.tokenizers, ("", ""), strict=True)]
    assert len(together[2]) == sum(map(len, halves)) == 3  # [CLS], [SEP] and T5's end
    with torch.no_grad():
        tokens = text.tokenizers[1](["<rain& all>"], return_tensors="pt")["input_ids"]
        expected = text.encoder.t5_transformer(input_ids=tokens).last_hidden_state[0]
    torch.testing.assert_close(together[0][-len(expected) :], expected, rtol=1e-5, atol=1e-5)


def test_a_published_checkpoint_brings_its_t5(options: dict, tmp_path: Path) -> None:
    of_checkpoint = ClapT5Conditioner(**save_clap_t5(tmp_path, with_t5=True))
    of_clap = ClapT5Conditioner(**options)
    pairs = zip(of_checkpoint.encoder.state_dict().items(), of_clap.encoder.state_dict().items(), strict=True)
    trained_on = {name.split(".")[0] for (name, left), (_, right) in pairs if not torch.equal(left, right)}
    assert trained_on == {"t5_transformer"}


def change(weights: str, path: Path, remove: str = "", add: str = "") -> str:
    content = torch.load(weights)
    content["model"] = {name: value for name, value in content["model"].items() if not remove or remove not in name}
    torch.save({"model": content["model"] | ({add: torch.zeros(1)} if add else {})}, path)
    return str(path)


def test_weights_must_fit_in_both_directions(options: dict, tmp_path: Path) -> None:
    changes = {"remove": "projection.linear2"}, {"add": "caption_encoder.base.more"}
    for number, (more, named) in enumerate(zip(changes, ("linear2.weight", "base.more"), strict=True)):
        weights = change(options["weights"], tmp_path / f"{number}.pth", **more)
        with pytest.raises(CheckpointError, match=named):
            ClapT5Conditioner(**{**options, "weights": weights})
    weights = change(options["weights"], tmp_path / "none.pth", remove="caption_encoder")
    with pytest.raises(TextModelError, match=r"holds no caption_encoder.*CLAP_weights_2022\.pth"):
        ClapT5Conditioner(**{**options, "weights": weights})


def test_what_does_not_fit_is_refused(options: dict) -> None:
    with pytest.raises(TextModelError, match=r"no/where is no file.*hf download no/where CLAP_weights_2022\.pth"):
        ClapT5Conditioner(**{**options, "weights": "no/where"})
    with pytest.raises(TextModelError, match="has width 16, but `dim` is 8"):
        ClapT5Conditioner(**{**options, "dim": 8})
    with pytest.raises(ValueError, match="even number"):
        ClapT5Conditioner(**{**options, "max_length": 41})
    with pytest.raises(ValueError, match=r"text\.dtype=half"):
        ClapT5Conditioner(**options, dtype="half")


def test_stores_and_caches_hold_both_captions(options: dict, tmp_path: Path) -> None:
    config = {"_target_": "foley.models.text.ClapT5Conditioner", **options}
    text = ClapT5Conditioner(**options, cache_dir=str(tmp_path / "cache"))
    encode_texts(text, config, Texts.of([PROMPT, "a dog barks"]), str(tmp_path / "store"))
    stored = StoredText(str(tmp_path / "store"), config)
    result, expected = stored([PROMPT, "a dog barks", ""]), text([PROMPT, "a dog barks", ""])
    assert torch.equal(result.mask, expected.mask)
    torch.testing.assert_close(result.embeddings.float(), expected.embeddings, rtol=1e-2, atol=1e-2)
    assert not torch.equal(result.embeddings[0], result.embeddings[1])  # the structured forms differ
    assert EmbeddingStore.open(str(tmp_path / "store")).dim == DIM
    text.cache.flush()
    again = ClapT5Conditioner(**options, cache_dir=str(tmp_path / "cache"))
    again.encode = lambda prompts: pytest.fail(f"encoded {prompts} again")  # type: ignore[method-assign]
    assert torch.equal(again([PROMPT]).embeddings, expected.embeddings[:1])
    with pytest.raises(TextStoreError, match="pad_to_max_length: True in the store, False in the run"):
        StoredText(str(tmp_path / "store"), {**config, "pad_to_max_length": False})


def test_the_encoders_are_frozen_and_in_no_checkpoint(options: dict) -> None:
    text = ClapT5Conditioner(**options, dtype="bfloat16").train()
    assert not text.state_dict()
    assert not text.encoder.training
    assert not any(weight.requires_grad for weight in text.encoder.parameters())
    assert text(["rain"]).embeddings.dtype == torch.bfloat16
