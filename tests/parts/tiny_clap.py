"""A CLAP model of a few thousand parameters in the layout of the published repository."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ClapConfig, ClapModel, PreTrainedTokenizerFast

WORDS = (
    *("a", "dog", "barks", "rain", "falls", "on", "metal", "roof", "an", "opera", "singer", "practises", "scales"),
    *("siren", "wails", "bell"),
)


def save_clap(directory: Path, fusion: bool = False, words: Sequence[str] = WORDS) -> Path:
    """Write the model and a tokenizer that knows `words`; captions that differ in them have different embeddings."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $0 </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    model = ClapModel(tiny_config(len(fast), fusion))
    with torch.no_grad():  # a fresh model is nearly constant: let words outweigh what all captions share
        for part in (model.text_model, model.text_projection):
            for parameter in part.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=1.5)
    model.save_pretrained(directory)
    return directory


def tiny_config(vocabulary_size: int, fusion: bool) -> ClapConfig:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    audio = {
        "patch_embeds_hidden_size": 8,
        "hidden_size": 64,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "enable_fusion": fusion,
    }
    return ClapConfig(
        text_config={**text, "vocab_size": vocabulary_size, "max_position_embeddings": 40},
        audio_config=audio,
        projection_dim=12,
    )
