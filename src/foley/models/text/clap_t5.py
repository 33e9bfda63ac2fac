"""Conditioning on a caption and its structured form, as Make-An-Audio 2 and so AudioLCM's teacher have it.

    context = [projection(BERT(caption)), T5(structured caption)]          tokens of the two, one after the other

BERT and its projection are the text encoder of Microsoft's CLAP (Elizalde et al. 2022), of which all tokens are taken,
not the first alone. The published code pads both parts to 77 tokens and masks nothing, neither in the encoders nor in
the denoiser.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn.functional import gelu

from foley.core.captions import split_caption
from foley.core.components import load_state, read_pickle
from foley.core.devices import to_device
from foley.core.hub import load_pretrained
from foley.models.text.frozen_t5 import (
    MEND,
    FrozenEncoder,
    TextModelError,
    check_vocabulary,
    token_ids,
    torch_dtype,
)
from foley.models.text.kept import MEMORY_GIB

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLAP_REPOSITORY, CLAP_FILE = "microsoft/msclap", "CLAP_weights_2022.pth"
_WRAPPERS = ("model", "state_dict")  # of CLAP's file, and of training checkpoints
_IN_CHECKPOINTS = "cond_stage_model."
_CLAP, _T5 = "caption_encoder.", "t5_transformer."
_DERIVED = ("base.embeddings.position_ids",)  # saved by older versions of transformers, and not learned


class ClapProjection(nn.Module):
    """CLAP's projection of each token `[..., d_in]` to `[..., d_out]`, without its dropout."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_in, d_out, bias=False)
        self.linear2 = nn.Linear(d_out, d_out, bias=False)
        self.layer_norm = nn.LayerNorm(d_out)

    def forward(self, x: Tensor) -> Tensor:
        """`layer_norm(a + linear2(gelu(a)))` with `a = linear1(x)`."""
        first = self.linear1(x)
        return self.layer_norm(first + self.linear2(gelu(first)))


class ClapTextEncoder(nn.Module):
    """BERT and its projection, under the published names."""

    def __init__(self, base: "PreTrainedModel", dim: int) -> None:
        super().__init__()
        self.base = base
        self.projection = ClapProjection(int(base.config.hidden_size), dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`[B, S]` to `[B, S, Dc]`."""
        return self.projection(self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)


class ClapT5Encoder(nn.Module):
    """Both encoders, under the names that the published checkpoints have for them."""

    def __init__(self, caption_encoder: ClapTextEncoder, t5_transformer: "PreTrainedModel") -> None:
        super().__init__()
        self.caption_encoder = caption_encoder
        self.t5_transformer = t5_transformer

    def forward(self, caption: Mapping[str, Tensor], structured: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens of the two, each `input_ids [B, S]` and perhaps `attention_mask`, to `[B, S, Dc]` each."""
        of_caption = self.caption_encoder(caption["input_ids"], caption.get("attention_mask"))
        return of_caption, self.t5_transformer(**structured).last_hidden_state


class ClapT5Conditioner(FrozenEncoder):
    """Tokens of a caption by CLAP and of its structured form by T5, see this module and `foley.core.captions`.

    A prompt holds both, `a dog barks, then rain <dog barking& start>@<rain& end>`; without a structured form the clip
    is heard as the caption says, `<a dog barks& all>`. The empty prompt is empty in both.

    Args:
        name_or_path: T5, on the Hugging Face Hub or a local directory.
        bert: configuration and tokenizer of CLAP's BERT, likewise.
        weights: of CLAP: its published file, or a checkpoint of Make-An-Audio 2 or AudioLCM, whose T5 is taken, too; or
            the repository on the Hub that holds `CLAP_weights_2022.pth`.
        dim: width Dc of the projection and of T5.
        max_length: longest prompt in tokens, half of them for each encoder; what lies beyond is dropped with a warning.
        pad_to_max_length: pad each half and let all tokens count, as published; false leaves padding out.
        device, revision, download: as for `FrozenT5Conditioner`; the revision is T5's.
        dtype, cache_dir, memory_gib, length_multiple: as for `FrozenEncoder`.

    Raises:
        TextModelError: where files are missing, or a tokenizer or `dim` does not fit its model.
        CheckpointError: weights that cannot be read, or of which keys or shapes are left over on either side.
        ValueError: for an unknown dtype, or a `max_length` that is odd or below 4.
    """

    def __init__(
        self,
        name_or_path: str = "google/t5-v1_1-large",
        bert: str = "google-bert/bert-base-uncased",
        weights: str = CLAP_REPOSITORY,
        dim: int = 1024,
        max_length: int = 154,
        pad_to_max_length: bool = True,
        dtype: str = "float32",
        device: str = "cpu",
        revision: str = "main",
        cache_dir: str | None = None,
        download: bool = False,
        memory_gib: float = MEMORY_GIB,
        length_multiple: int = 1,
    ) -> None:
        from transformers import AutoTokenizer

        if max_length % 2 or max_length < 4:
            raise ValueError(f"text.max_length={max_length}: half of it is for each encoder, give an even number >= 4")
        named = {"name_or_path": name_or_path, "bert": bert, "weights": weights, "revision": revision}
        lengths = {"dim": dim, "max_length": max_length, "pad_to_max_length": pad_to_max_length}
        load = partial(load_pretrained, error_type=TextModelError, mend=MEND)
        sources: tuple[dict[str, Any], dict[str, Any]] = (
            {"name_or_path": bert, "options": {"local_files_only": not download}},
            {"name_or_path": name_or_path, "options": {"local_files_only": not download, "revision": revision}},
        )
        read = partial(_load, load, sources, weights, dim, torch_dtype(dtype))
        super().__init__(read, {**named, **lengths}, dtype, cache_dir, memory_gib, length_multiple)
        self.dim, self.max_length, self.pad_to_max_length = dim, max_length, pad_to_max_length
        self.tokenizers: list[PreTrainedTokenizerBase] = []  # BERT's and T5's
        for source, part in zip(sources, (self.encoder.caption_encoder.base, self.encoder.t5_transformer), strict=True):
            tokenizer = load(AutoTokenizer.from_pretrained, **source)
            check_vocabulary(tokenizer, part.config.vocab_size, str(source["name_or_path"]))
            self.tokenizers.append(tokenizer)
        self.to(device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Unpadded embeddings `[S, Dc]`, one per prompt, in one batch; nothing is remembered."""
        halves = zip(self.tokenizers, zip(*map(split_caption, prompts), strict=True), strict=True)
        inputs, lengths = zip(*(self._inputs(tokenizer, texts) for tokenizer, texts in halves), strict=True)
        with self._computing():
            hidden = self.encoder(*inputs)  # two [B, S, Dc]
        parts = [
            [row[:length] for row, length in zip(rows, counted, strict=True)]
            for rows, counted in zip(hidden, lengths, strict=True)
        ]
        return [torch.cat(pair) for pair in zip(*parts, strict=True)]

    def _inputs(
        self, tokenizer: "PreTrainedTokenizerBase", texts: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], list[int]]:
        """What an encoder takes of `texts`, and how many tokens of each count."""
        longest = self.max_length // 2
        ids = [token_ids(tokenizer, text, longest) for text in texts]
        to = {"padding": "max_length", "max_length": longest} if self.pad_to_max_length else {"padding": True}
        padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt", **to)
        names = ("input_ids",) if self.pad_to_max_length else ("input_ids", "attention_mask")
        inputs = {name: to_device(padded[name], self._weight.device) for name in names}
        return inputs, [longest] * len(ids) if self.pad_to_max_length else [len(row) for row in ids]


def _load(
    load: Any, sources: tuple[Mapping[str, Any], Mapping[str, Any]], weights: str, dim: int, dtype: torch.dtype
) -> ClapT5Encoder:
    """The two encoders; T5 by itself where `weights` are CLAP's alone."""
    from transformers import AutoConfig, BertModel, T5EncoderModel

    bert, t5 = sources
    state = conditioning_state(_weights_file(weights, download=not bert["options"]["local_files_only"]))
    base = BertModel(load(AutoConfig.from_pretrained, **bert))
    if any(name.startswith(_T5) for name in state):
        encoder = T5EncoderModel(load(AutoConfig.from_pretrained, **t5))
    else:
        encoder = load(T5EncoderModel.from_pretrained, **t5)
        state |= {f"{_T5}{name}": value for name, value in encoder.state_dict().items()}
    if encoder.config.d_model != dim:
        width = encoder.config.d_model
        raise TextModelError(f"{t5['name_or_path']} has width {width}, but `dim` is {dim}: set it so")
    both = ClapT5Encoder(ClapTextEncoder(base, dim), encoder)
    load_state(both, state, weights)
    return both.to(dtype)


def conditioning_state(path: Path) -> dict[str, Tensor]:
    """The text encoders in a published file, by the names of `ClapT5Encoder`.

    CLAP's file has its text encoder beside that for sound; a checkpoint of Make-An-Audio 2 or AudioLCM has both
    encoders of text below `cond_stage_model`, T5 perhaps trained on. Whatever is there for text is returned, so that a
    strict load says what is left over.

    Raises CheckpointError where the file cannot be read, TextModelError where it holds no such encoder.
    """
    content = read_pickle(path, mmap=True)
    content = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), content)
    prefix = _IN_CHECKPOINTS if any(name.startswith(_IN_CHECKPOINTS) for name in content) else ""
    of_text = prefix or _CLAP  # all of a checkpoint's conditioning, and of CLAP the text encoder alone
    state = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(of_text)}
    if not state:
        raise TextModelError(
            f"text.weights={path} holds no {_CLAP}* and no {_IN_CHECKPOINTS}*: give {CLAP_FILE} of "
            f"https://huggingface.co/{CLAP_REPOSITORY}, or a checkpoint of Make-An-Audio 2 or AudioLCM"
        )
    return {name: value for name, value in state.items() if name.removeprefix(_CLAP) not in _DERIVED}


def _weights_file(weights: str, download: bool) -> Path:
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    try:
        return Path(hf_hub_download(weights, CLAP_FILE, local_files_only=not download))
    except (OSError, ValueError) as error:
        raise TextModelError(
            f"text.weights={weights} is no file, and {CLAP_FILE} of it is not on this machine. Fetch it where there is "
            f"a network (`hf download {weights} {CLAP_FILE}`), set `text.download=true`, or give the file. "
            f"Cause: {error}"
        ) from error
