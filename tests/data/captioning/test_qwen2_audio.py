"""Qwen2-Audio with random weights of a few thousand parameters, loaded from a folder as the published one is."""

import json
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from foley.data.annotating import AnnotationError, Fault, annotate, read_results
from foley.data.captioning.qwen2_audio import Qwen2AudioCaptioner, load_qwen2_audio

SPECIAL = ["<|endoftext|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["<unk>", "generate", "the", "caption", "dog", "barks", "loudly", "rain", "falls"]
INSTRUCTION = "generate the caption"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The layout of the published repository."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[0], "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[1:], **names)
    path = tmp_path_factory.mktemp("qwen2_audio")
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=2), fast).save_pretrained(path)
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "num_mel_bins": 16, "max_source_positions": 100, **audio},
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(vocabulary),
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **text,
        },
        audio_token_index=1,
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config)
    with torch.no_grad():  # only words come out: weights at random would mostly say special tokens
        model.lm_head.weight[: len(SPECIAL) + 1] = 0.0
        model.lm_head.weight.mul_(100.0)
    model.save_pretrained(path)
    return path


@pytest.fixture
def captioner(folder, tmp_path, write_clip) -> Qwen2AudioCaptioner:
    for number, rate in enumerate((16000, 24000, 8000)):
        write_clip(f"{number}{'-' * number}.wav", frames=12000, rate=rate)
    return load_qwen2_audio(str(folder), str(tmp_path), dtype="float32", instruction=INSTRUCTION, max_new_tokens=6)


def rows(*names: str) -> list[dict]:
    return [{"id": name, "path": name, "caption": "x"} for name in names]


def test_captions_are_the_models_words_and_do_not_depend_on_the_batch(captioner):
    names = ("0.wav", "1-.wav", "2--.wav")
    together = [answer["caption"] for answer in captioner.annotate(rows(*names))]
    alone = [captioner.annotate(rows(name))[0]["caption"] for name in names]
    assert together == alone
    assert all(set(caption.split()) <= set(WORDS[1:]) for caption in together)


def test_captions_are_those_of_generate(captioner, tmp_path):
    from foley.data.audio import read_audio

    audio = read_audio(tmp_path / "1-.wav", 16000)
    prompt = f"<|audio_bos|><|AUDIO|><|audio_eos|>{INSTRUCTION}"
    inputs = captioner.processor(text=prompt, audio=[audio], sampling_rate=16000, return_tensors="pt")
    tokens = captioner.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = captioner.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert captioner.annotate(rows("1-.wav"))[0]["caption"] == expected


def test_a_clip_that_cannot_be_read_is_a_fault_and_the_others_go_on(captioner, tmp_path):
    (tmp_path / "empty.wav").touch()
    first, second, third = captioner.annotate(rows("0.wav", "empty.wav", "absent.wav"))
    assert first["model"] == captioner.identity["model"]
    assert isinstance(second, Fault)
    assert "is empty" in second.reason
    assert isinstance(third, Fault)
    assert isinstance(captioner.annotate(rows("absent.wav"))[0], Fault)


def test_predict_writes_every_caption_once(captioner, tmp_path, write_jsonl):
    manifest = write_jsonl(*rows("0.wav", "1-.wav", "2--.wav", "absent.wav"))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    for _ in range(2):
        annotate(captioner, manifest, tmp_path / "out", Trainer(**options, devices=1), batch_size=2)
    assert [result["id"] for result in read_results(tmp_path / "out")] == ["0.wav", "1-.wav", "2--.wav"]
    (fault,) = (tmp_path / "out" / "faults-rank0000.jsonl").read_text().splitlines()
    assert json.loads(fault)["line"] == 4


def test_the_chat_template_is_another_prompt(folder, captioner, tmp_path):
    options = {"dtype": "float32", "instruction": INSTRUCTION, "max_new_tokens": 3, "chat": True}
    chat = load_qwen2_audio(str(folder), str(tmp_path), **options)
    assert "caption" in chat.annotate(rows("0.wav"))[0]
    assert chat.identity["prompt_sha256"] != captioner.identity["prompt_sha256"]


def test_absent_weights_fail_with_their_name(tmp_path):
    with pytest.raises(AnnotationError, match=r"'Qwen/Absent' cannot be loaded: .*hf download Qwen/Absent"):
        load_qwen2_audio("Qwen/Absent", str(tmp_path), instruction="x")
