"""Choose words of a table of word vectors for a small text encoder, and write its tokenizer and its vectors."""

from itertools import chain
from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger

logger = get_logger(__name__)


@command("script/make_word_vectors")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.files import atomic_write
    from foley.data.latents import read_captions
    from foley.models.text.words import choose_words, read_vectors, word_tokenizer, words_of, write_word_vectors

    folder = Path(cfg.output_dir)
    vectors = read_vectors(Path(cfg.source))
    own = words_of(chain.from_iterable(read_captions(source) for source in cfg.captions))
    near = words_of(chain.from_iterable(read_captions(source, cfg.caption_column) for source in cfg.near))
    chosen = choose_words(vectors, [*own, *near], cfg.num_common, cfg.num_words)
    words = write_word_vectors(folder / "vectors.safetensors", vectors, own, chosen)
    tokenizer = word_tokenizer(words)
    atomic_write(folder / "tokenizer.json", lambda temporary: tokenizer.save(str(temporary), pretty=False))
    unknown = [word for word in own if word not in vectors]
    logger.info("%s: %d words, %d of them of captions", folder, len(words), len(own))
    logger.info("words of captions without a vector: %s", ", ".join(unknown) or "none")


if __name__ == "__main__":
    main()
