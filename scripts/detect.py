"""Say of an audio file what made it: software, model, prompt and seed by its tags, and a watermark in its sound."""

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger

if TYPE_CHECKING:
    from foley.generation.marking import Marks

_log = get_logger(__name__)


def in_words(marks: "Marks", looked: bool) -> str:
    """What was found, as a sentence."""
    if marks.origin is None:
        origin = "no tags of ours"
    else:
        known = {name: marks.origin.get(name) for name in ("software", "model_hash", "seed", "prompt")}
        origin = "{software}, model {model_hash}, seed {seed}, prompt {prompt!r}".format(**known)
    if not looked:
        return f"{origin}; no watermark was looked for: pip install 'foley[watermark]'"
    if marks.watermark_confidence is None:
        return f"{origin}; silent, so nothing says whether it had a watermark"
    found = "watermark" if marks.watermarked else "no watermark"
    return f"{origin}; {found} (confidence {marks.watermark_confidence:.3f})"


@command("script/detect")
def main(cfg: DictConfig) -> None:
    """Look into every file, and write down what was found where an output is named."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.files import AUDIO_SUFFIXES, write_json
    from foley.core.remote import find_files
    from foley.generation.marking import can_watermark, detect

    given = Path(cfg.file)
    files = sorted(file for file in find_files(given) if file.suffix in AUDIO_SUFFIXES) if given.is_dir() else [given]
    if not files:
        raise ValueError(f"file={given}: there is no audio in it or below")
    found, looked = {}, can_watermark()
    for file in files:
        marks = detect(file)
        found[str(file)] = marks.to_json()
        _log.info("%s: %s", file, in_words(marks, looked))
    if cfg.output is not None:
        write_json(Path(cfg.output), found)


if __name__ == "__main__":
    main()
