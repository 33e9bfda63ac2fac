"""A tiny random T5 encoder with its tokenizer, in a folder that is read as a published one's."""

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from foley.models.text.small import train_tokenizer

DIM = 16


def save_t5(directory: Path, vocabulary_size: int | None = None) -> Path:
    """Write it to `directory`, which is returned."""
    tokenizer = train_tokenizer(["a dog barks", "rain falls on a roof"], 300)
    tokenizer.post_processor = TemplateProcessing(single="$0 [BOS]", special_tokens=[("[BOS]", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[BOS]")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = T5Config(vocab_size=vocabulary_size or len(fast), d_model=DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(directory)
    return directory
