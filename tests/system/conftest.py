"""A hub folder that holds a small published EzAudio."""

from pathlib import Path

import pytest
import torch
from published_files import CODEC, DENOISER, read_published
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from foley.models.text.small import train_tokenizer


def save_t5(directory: Path, width: int) -> None:
    tokenizer = train_tokenizer(["a dog barks", "rain falls on a roof"], 300)
    tokenizer.post_processor = TemplateProcessing(single="$0 [BOS]", special_tokens=[("[BOS]", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[BOS]")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(fast), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(directory)


@pytest.fixture
def hub_dir(shared: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "hub"
    checkpoints = directory / "OpenSound" / "EzAudio" / "ckpts"
    for folder in ("s3", "vae"):
        (checkpoints / folder).mkdir(parents=True)
    denoiser, config = read_published(shared, DENOISER)
    torch.save({"model": denoiser}, checkpoints / "s3" / "ezaudio_s3_l.pt")
    codec, _ = read_published(shared, CODEC)
    save = {f"autoencoder.{key}": value for key, value in codec.items()}
    torch.save({"state_dict": save}, checkpoints / "vae" / "1m.pt")
    save_t5(directory / "google" / "flan-t5-large", config["context_dim"])
    return directory


@pytest.fixture
def tiny() -> list[str]:
    """Overrides that bring the description of ezaudio_l to the size of the files in `hub_dir`."""
    denoiser = ["model.width=48", "model.depth=4", "model.num_heads=4", "model.modulation.rank=4", "text.dim=24"]
    return [*denoiser, "codec.channels=6", "codec.multipliers=[1,2,3,4]", "codec.latent_channels=8"]
