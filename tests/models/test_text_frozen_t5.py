"""Frozen T5 conditioning on a tiny random model that takes the same path as a published one."""

import copy
import gc
import logging
from pathlib import Path

import pytest
import torch
from tiny_t5 import DIM, save_t5
from torch import nn
from transformers import T5EncoderModel

from foley.core.components import load_component, save_component
from foley.core.embeddings import shard_names
from foley.models.text import EmbeddingCache, FrozenT5Conditioner, TextModelError, frozen_t5
from foley.models.text.frozen_t5 import fast_dtype


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_t5(tmp_path_factory.mktemp("t5")))


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
    original = text.encode
    monkeypatch.setattr(text, "encode", lambda prompts: encoded.append(prompts) or original(prompts))
    first = text(["", "rain", ""])
    second = text(["rain", ""])
    assert encoded == [["", "rain"]]
    assert torch.equal(first.embeddings[[1, 2]], second.embeddings)


def test_embeddings_on_disk_serve_the_next_run(t5: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FrozenT5Conditioner(t5, DIM, cache_dir=str(tmp_path))
    kept = [first(["rain", "../x\n🎉"]), first(["\ud800"])][0]
    assert not list(tmp_path.iterdir())  # nothing is written while a step waits
    first.cache.flush()
    assert len(list(tmp_path.iterdir())) == 1  # of three prompts
    again = FrozenT5Conditioner(t5, DIM, cache_dir=str(tmp_path))
    monkeypatch.setattr(again, "encode", lambda prompts: pytest.fail(f"encoded {prompts} again"))
    assert torch.equal(again(["rain", "../x\n🎉"]).embeddings, kept.embeddings)


def test_what_waits_is_written_when_its_owner_goes(t5: str, tmp_path: Path) -> None:
    text = FrozenT5Conditioner(t5, DIM, cache_dir=str(tmp_path))
    text(["rain"])
    del text
    gc.collect()
    assert len(shard_names(str(tmp_path))) == 1


def test_a_damaged_cache_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, cpu = EmbeddingCache("model", tmp_path), torch.device("cpu")
    cache.put("rain", torch.ones(2, 3))
    cache.flush()
    assert EmbeddingCache("other model", tmp_path).get("rain", cpu) is None
    assert torch.equal(EmbeddingCache("model", tmp_path).get("rain", cpu), torch.ones(2, 3))
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"half a file")
    with caplog.at_level(logging.WARNING):
        assert EmbeddingCache("model", tmp_path).get("rain", cpu) is None
    assert str(file) in caplog.text


def test_memory_is_bounded_in_bytes_and_keeps_what_is_used() -> None:
    one = torch.zeros(2, 4)
    cache, cpu = EmbeddingCache("model", memory_gib=2 * one.nbytes / (1 << 30)), torch.device("cpu")
    for prompt in ("", "a"):
        cache.put(prompt, one)
    assert cache.get("", cpu) is not None
    cache.put("b", one)
    assert cache.get("a", cpu) is None
    assert cache.get("", cpu) is not None
    cache.put("long", torch.zeros(4, 4))
    assert [prompt for prompt in ("", "a", "b", "long") if cache.get(prompt, cpu) is not None] == ["long"]


def test_auto_is_bfloat16_on_a_gpu_that_computes_in_it_and_the_cache_knows(
    t5: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = FrozenT5Conditioner(t5, DIM, dtype="auto")
    exact = text(["rain"]).embeddings
    assert exact.dtype == torch.float32
    assert text.cache.identity["dtype"] == "float32"
    for native in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert fast_dtype(torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)
    assert fast_dtype(torch.device("mps")) == fast_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(frozen_t5, "fast_dtype", lambda device: torch.bfloat16)
    text.to("cpu")
    assert {parameter.dtype for parameter in text.encoder.parameters()} == {torch.bfloat16}
    assert text.cache.identity["dtype"] == "bfloat16"
    rounded = text(["rain"]).embeddings
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=3e-2, atol=3e-2)


def test_what_must_be_exact_reads_rounded_weights_again_and_the_cache_knows(
    t5: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = FrozenT5Conditioner(t5, DIM, dtype="float32")(["rain"]).embeddings
    monkeypatch.setattr(frozen_t5, "fast_dtype", lambda device: torch.bfloat16)
    text = FrozenT5Conditioner(t5, DIM, dtype="auto")
    other = copy.deepcopy(text)
    text(["rain"])
    text.compute_exactly(True)
    assert text.cache.identity["dtype"] == "float32"
    assert torch.equal(text(["rain"]).embeddings, expected)
    assert text.to("cpu").encoder.dtype == torch.float32
    assert other.encoder.dtype == torch.bfloat16
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(T5EncoderModel, "device", torch.device("cuda"))
        assert text._computes_in == "float32"
    text.compute_exactly(False)
    assert text.cache.identity["dtype"] == "bfloat16"
    assert text(["rain"]).embeddings.dtype == torch.bfloat16
    chosen = FrozenT5Conditioner(t5, DIM, dtype="bfloat16")
    chosen.compute_exactly(True)
    assert chosen.encoder.dtype == torch.bfloat16


def test_products_of_float32_are_exact_unless_tf32_is_chosen(t5: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    for name, precision in (("tf32", "high"), ("float32", "highest")):
        with frozen_t5._products(name):
            assert torch.get_float32_matmul_precision() == precision
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match=r"text\.dtype=int8: give auto, float32, tf32, bfloat16"):
        FrozenT5Conditioner(t5, DIM, dtype="int8")


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
        FrozenT5Conditioner(str(save_t5(tmp_path, vocabulary_size=32128)), DIM)


def test_round_trip_as_a_component(t5: str, tmp_path: Path) -> None:
    config = {"_target_": "foley.models.text.FrozenT5Conditioner", "name_or_path": t5, "dim": DIM}
    text = FrozenT5Conditioner(t5, DIM)
    save_component(text, config, tmp_path / "text")
    loaded = load_component(tmp_path / "text")
    assert torch.equal(loaded(["rain"]).embeddings, text(["rain"]).embeddings)
