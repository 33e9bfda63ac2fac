"""Frozen T5 conditioning on a tiny random model that takes the same path as a published one."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from foley.core.components import load_component, save_component
from foley.models.text import EmbeddingCache, FrozenT5Conditioner, TextModelError
from foley.models.text.small import train_tokenizer

DIM = 16


def _save_t5(directory: Path, vocabulary_size: int | None = None) -> Path:
    tokenizer = train_tokenizer(["a dog barks", "rain falls on a roof"], 300)
    tokenizer.post_processor = TemplateProcessing(single="$0 [BOS]", special_tokens=[("[BOS]", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[BOS]")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = T5Config(vocab_size=vocabulary_size or len(fast), d_model=DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(_save_t5(tmp_path_factory.mktemp("t5")))


def test_shapes_masks_and_padding(t5: str) -> None:
    text = FrozenT5Conditioner(t5, DIM)
    result = text(["a dog barks", "", "rain"])
    assert text.dim == DIM
    assert not text.trainable
    assert result.embeddings.shape == (3, result.mask.shape[1], DIM)
    assert result.mask.dtype == torch.bool
    assert result.mask.sum(1).tolist() == [len(text.tokenizer(p)["input_ids"]) for p in ("a dog barks", "", "rain")]
    assert result.mask[1].sum() == 1
    assert bool((result.embeddings[~result.mask] == 0).all())


def test_matches_the_encoder_called_directly(t5: str) -> None:
    text = FrozenT5Conditioner(t5, DIM)
    tokens = text.tokenizer(["rain falls"], return_tensors="pt")
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(t5).eval()(input_ids=tokens["input_ids"]).last_hidden_state
    result = text(["a dog barks on a roof", "rain falls"])
    torch.testing.assert_close(result.embeddings[1][result.mask[1]], expected[0], rtol=1e-5, atol=1e-6)


def test_autocast_does_not_reach_what_is_kept(t5: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = FrozenT5Conditioner(t5, DIM)(["rain falls"])
    assert torch.equal(kept.embeddings, FrozenT5Conditioner(t5, DIM)(["rain falls"]).embeddings)


def test_frozen_in_eval_and_out_of_checkpoints(t5: str) -> None:
    owner = nn.ModuleDict({"text": FrozenT5Conditioner(t5, DIM), "denoiser": nn.Linear(2, 2)}).train()
    encoder = owner["text"].encoder
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not owner["text"](["rain"]).embeddings.requires_grad
    assert set(owner.state_dict()) == {"denoiser.weight", "denoiser.bias"}
    assert copy.deepcopy(owner)["text"].encoder is encoder
    owner.to(torch.float64)
    assert owner["text"].encoder.dtype == torch.float64


def test_the_configured_type_is_used(t5: str) -> None:
    assert FrozenT5Conditioner(t5, DIM, dtype="bfloat16")(["rain"]).embeddings.dtype == torch.bfloat16


def test_each_prompt_is_encoded_once(t5: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = FrozenT5Conditioner(t5, DIM)
    encoded: list[list[str]] = []
    original = text._encode
    monkeypatch.setattr(text, "_encode", lambda prompts: encoded.append(prompts) or original(prompts))
    first = text(["", "rain", ""])
    second = text(["rain", ""])
    assert encoded == [["", "rain"]]
    assert torch.equal(first.embeddings[[1, 2]], second.embeddings)


def test_embeddings_on_disk_serve_the_next_run(t5: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FrozenT5Conditioner(t5, DIM, cache_dir=str(tmp_path))(["rain", "../x\n🎉"])
    assert len(list(tmp_path.rglob("*"))) == 4
    again = FrozenT5Conditioner(t5, DIM, cache_dir=str(tmp_path))
    monkeypatch.setattr(again, "_encode", lambda prompts: pytest.fail(f"encoded {prompts} again"))
    assert torch.equal(again(["rain", "../x\n🎉"]).embeddings, first.embeddings)


def test_a_damaged_cache_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, cpu = EmbeddingCache("model", tmp_path), torch.device("cpu")
    cache.put("rain", torch.ones(2, 3))
    path = cache.path("rain")
    assert path is not None
    assert path != EmbeddingCache("other model", tmp_path).path("rain")
    path.write_bytes(b"half a file")
    with caplog.at_level(logging.WARNING):
        assert EmbeddingCache("model", tmp_path).get("rain", cpu) is None
    assert str(path) in caplog.text


def test_memory_is_bounded_and_keeps_what_is_used() -> None:
    cache, cpu = EmbeddingCache("model", memory_items=2), torch.device("cpu")
    for prompt in ("", "a"):
        cache.put(prompt, torch.zeros(1, 1))
    assert cache.get("", cpu) is not None
    cache.put("b", torch.zeros(1, 1))
    assert cache.get("a", cpu) is None
    assert cache.get("", cpu) is not None


def test_a_huge_prompt_is_cut_with_a_warning(t5: str, caplog: pytest.LogCaptureFixture) -> None:
    text = FrozenT5Conditioner(t5, DIM, max_length=12)
    with caplog.at_level(logging.WARNING):
        result = text(["rain " * 200_000, "\ud800"])
    assert result.mask[0].sum() == 12
    assert "1000000 characters" in caplog.text


def test_absent_weights_fail_naming_the_model_and_the_mend(tmp_path: Path) -> None:
    with pytest.raises(TextModelError, match=r"no-one/no-model.*model\.safetensors.*hf download no-one/no-model"):
        FrozenT5Conditioner("no-one/no-model", DIM)
    with pytest.raises(TextModelError, match="absent"):
        FrozenT5Conditioner(str(tmp_path / "absent"), DIM)


def test_another_width_is_refused(t5: str) -> None:
    with pytest.raises(TextModelError, match="width 16, but `dim` is 1024"):
        FrozenT5Conditioner(t5, 1024)


def test_a_near_empty_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextModelError, match="32128"):
        FrozenT5Conditioner(str(_save_t5(tmp_path, vocabulary_size=32128)), DIM)


def test_round_trip_as_a_component(t5: str, tmp_path: Path) -> None:
    config = {"_target_": "foley.models.text.FrozenT5Conditioner", "name_or_path": t5, "dim": DIM}
    text = FrozenT5Conditioner(t5, DIM)
    save_component(text, config, tmp_path / "text")
    loaded = load_component(tmp_path / "text")
    assert torch.equal(loaded(["rain"]).embeddings, text(["rain"]).embeddings)
