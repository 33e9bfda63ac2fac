"""A small text encoder that trains with the denoiser, and its tokenizer."""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from foley.core.config import locate
from foley.core.devices import to_device
from foley.models.text.base import TextConditioner, TextEmbedding, bounded, warn_truncated
from foley.models.text.words import BEGINNING, PADDING, WordEmbedding, begun, plain_text
from foley.nn.attention import Attention
from foley.nn.embedding import LearnedPositions
from foley.nn.feedforward import GegluFeedForward
from foley.nn.norm import without_autocast


def train_tokenizer(captions: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A tokenizer that knows every byte, so no prompt is unknown, and starts each prompt with `[BOS]`.

    Padding has id 0. Letters are lower-cased and compatibility forms unified (NFKC).
    """
    tokenizer = Tokenizer(models.BPE())  # merges frequent pairs of bytes
    tokenizer.normalizer = plain_text()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PADDING, BEGINNING],  # ids 0 and 1
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, whether captions hold it or not
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = begun(tokenizer)
    return tokenizer


class _Block(nn.Module):
    """Pre-norm self-attention and feed-forward, without dropout.

    Both begin by giving nothing, so that each token begins as its own embedding, and not as what all prompts share.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, zero_output=True)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = GegluFeedForward(width, 2 * width)
        # As adaLN-zero begins the blocks of DiT: at first x_0 is all that is heard.
        nn.init.zeros_(self.feed_forward.output.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, S, Dc]` to `[B, S, Dc]`; `mask [B, 1, 1, S]` is true on keys that count."""
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class SmallTextEncoder(TextConditioner):
    """Tokens of a `tokenizers` file through `depth` pre-norm transformer blocks with learned positions.

    The tokenizer must put a beginning-of-text token before every prompt, so that the empty one has a token too.

    Args:
        tokenizer_file: written by `scripts/train_tokenizer.py`; absolute, or relative to the checkout.
        dim: width Dc.
        depth: number of blocks.
        num_heads: heads per block.
        max_length: longest prompt in tokens; what lies beyond is dropped with a warning.
        length_multiple: batches are padded to the next multiple of it, see `TextConditioner`.
        vectors_file: vectors of the words that `tokenizer_file` knows, both written by `scripts/make_word_vectors.py`:
            so the encoder is open to words that no caption of its training has. None: each token's embedding is
            learnt.

    Raises:
        ValueError: where a file is missing, or the tokenizer gives the empty prompt no token.

    Example:
        >>> encoder = SmallTextEncoder("data/tokenizer/audiocaps.json", dim=16, depth=1, num_heads=2, max_length=32)
        >>> text = encoder(["a dog barks", ""])
        >>> text.embeddings.shape[::2], text.mask[1].sum().item()  # the empty prompt has its beginning alone
        (torch.Size([2, 16]), 1)
    """

    trainable = True
    asset_options = ("tokenizer_file", "vectors_file")  # files that an export copies along

    def __init__(
        self,
        tokenizer_file: str,
        dim: int,
        depth: int,
        num_heads: int,
        max_length: int,
        length_multiple: int = 1,
        vectors_file: str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.max_length, self.length_multiple = max_length, length_multiple
        self.tokenizer = _load_tokenizer(tokenizer_file, max_length, length_multiple)
        self.tokens: nn.Module
        if vectors_file is None:
            self.tokens = nn.Embedding(self.tokenizer.get_vocab_size(), dim)
            nn.init.normal_(self.tokens.weight, std=0.02)
        else:
            self.tokens = WordEmbedding(vectors_file, dim)
        self.positions = LearnedPositions(max_length, dim)
        self.blocks = nn.ModuleList(_Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def tokenise(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """B prompts to token ids `[B, S]` and mask `[B, S]`, on the CPU."""
        short = [bounded(prompt, self.max_length) for prompt in prompts]
        encodings: Sequence[Encoding] = self.tokenizer.encode_batch(short)
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:  # tokens that were cut off
                warn_truncated(prompt, self.max_length)
        ids = torch.tensor([encoding.ids for encoding in encodings])  # [B, S], padded from the longest on
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
        return ids[:, : self.max_length], mask[:, : self.max_length]  # where a multiple is longer, padding alone

    def forward(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`."""
        ids, mask = (to_device(tensor, self.norm.weight.device) for tensor in self.tokenise(prompts))
        return TextEmbedding(self.embed(ids, mask), mask)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids `[B, S]` and their mask `[B, S]` to `[B, S, Dc]`.

        Under autocast, too, in the type of its weights: half precision rounds off what tells one word from another of a
        kind, and leaves noise of its gradients. A prompt is short, and costs little beside a latent.
        """
        with without_autocast(self.norm.weight):
            x = self.positions(self.tokens(ids))  # [B, S, Dc]
            for block in self.blocks:
                x = block(x, mask[:, None, None])  # in both directions: nothing is generated here
            return self.norm(x)


def _load_tokenizer(tokenizer_file: str, max_length: int, length_multiple: int) -> Tokenizer:
    path = locate(tokenizer_file)
    if not path.is_file():
        raise ValueError(
            f"tokenizer file {tokenizer_file} does not exist; write one with scripts/train_tokenizer.py "
            "or point `text.tokenizer_file` at data/tokenizer/audiocaps.json"
        )
    tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_to_multiple_of=length_multiple)  # from the longest of a batch on
    if not tokenizer.encode("").ids:
        raise ValueError(f"{tokenizer_file}: the empty prompt has no token; the tokenizer must add a beginning token")
    return tokenizer
