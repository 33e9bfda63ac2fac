"""Tiny random encoders of `ClapT5Conditioner`, in files of the published layouts."""

from pathlib import Path
from typing import Any

import torch
from tiny_t5 import DIM, save_t5
from transformers import BertConfig, BertModel, BertTokenizerFast, T5EncoderModel

from foley.models.text.clap_t5 import ClapT5Encoder, ClapTextEncoder

WORDS = ("a", "dog", "barks", "rain", "falls", "on", "roof", "##s", ",")


def save_clap_t5(directory: Path, with_t5: bool = False) -> dict[str, Any]:
    """Write T5, BERT's configuration and tokenizer, and CLAP's file, or a checkpoint that has T5, too.

    Returns the options of a conditioner.
    """
    save_t5(directory / "t5")
    (directory / "bert").mkdir()
    (directory / "bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(directory / "bert/vocab.txt"))
    tokenizer.save_pretrained(directory / "bert")
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), **sizes)
    config.save_pretrained(directory / "bert")
    encoders = ClapT5Encoder(ClapTextEncoder(BertModel(config), DIM), T5EncoderModel.from_pretrained(directory / "t5"))
    state = encoders.state_dict()
    state["caption_encoder.base.embeddings.position_ids"] = torch.arange(512)[None]  # as older versions save it
    if with_t5:
        state |= {name: value + 0.5 for name, value in state.items() if name.startswith("t5") and value.ndim == 1}
        content = {"state_dict": {f"cond_stage_model.{name}": value for name, value in state.items()}, "epoch": 3}
        content["state_dict"]["model.diffusion_model.final.weight"] = torch.zeros(2)
    else:
        clap = {name: value for name, value in state.items() if name.startswith("caption_encoder.")}
        content = {"model": {**clap, "audio_encoder.base.fc1.weight": torch.zeros(2), "logit_scale": torch.ones([])}}
    torch.save(content, directory / "weights.pth")
    return {
        **{"name_or_path": str(directory / "t5"), "bert": str(directory / "bert")},
        **{"weights": str(directory / "weights.pth"), "dim": DIM, "max_length": 40},
    }
