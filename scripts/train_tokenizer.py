"""Train the small text encoder's tokenizer on a column of captions in a CSV file."""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger

logger = get_logger(__name__)


@command("script/train_tokenizer")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.files import atomic_write
    from foley.generation.prompts import PromptColumns, read_prompt_rows
    from foley.models.text.small import train_tokenizer

    captions = [row["caption"] for row in read_prompt_rows(Path(cfg.captions_file), PromptColumns(cfg.caption_column))]
    tokenizer = train_tokenizer(captions, cfg.vocabulary_size)
    atomic_write(Path(cfg.tokenizer_file), lambda temporary: tokenizer.save(str(temporary), pretty=False))
    logger.info("%s: %d tokens from %d captions", cfg.tokenizer_file, tokenizer.get_vocab_size(), len(captions))


if __name__ == "__main__":
    main()
