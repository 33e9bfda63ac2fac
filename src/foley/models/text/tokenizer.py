"""Training of the small encoder's tokenizer: lower-cased byte-level pairs (Sennrich et al. 2016) over captions."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PADDING, BEGINNING = "[PAD]", "[BOS]"


def train_tokenizer(captions: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A tokenizer that knows every byte, so no prompt is unknown, and starts each prompt with `[BOS]`.

    Padding has id 0. Letters are lower-cased and compatibility forms unified (NFKC).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PADDING, BEGINNING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    beginning = (BEGINNING, tokenizer.token_to_id(BEGINNING))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGINNING} $0", special_tokens=[beginning])
    return tokenizer
