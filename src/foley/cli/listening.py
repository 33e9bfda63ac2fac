"""The end of a training: a page of sounds by what it has learned, and what to type next."""

from pathlib import Path

from omegaconf import DictConfig

from foley.core.logs import get_logger, process_rank
from foley.generation.text_to_audio import TextToAudio

_NUM_STEPS = 10  # of the solver: the page is to be there at once
_log = get_logger(__name__)


def write_listening_page(cfg: DictConfig) -> Path | None:
    """Generate the prompts `cfg.listen` with what a run has trained, into `listen` of its folder.

    Args:
        cfg: of `train.py`. `codec_path` must have been given, since sounds are made with it.

    Returns the page; None on other ranks than zero. Raises ValueError where no codec was given, and CheckpointError
    where the run left no checkpoint that generates.
    """
    if process_rank() != 0:
        return None
    if not cfg.codec_path:
        raise ValueError("listen= makes sounds: give codec_path=, the codec that made the latents")
    folder = Path(cfg.paths.output_dir)
    last = folder / "checkpoints/last.ckpt"
    sounds = TextToAudio.load(last).generate(list(cfg.listen), cfg.data.duration_seconds, num_steps=_NUM_STEPS)
    sounds.write(folder / "listen")
    page = folder / "listen/index.html"
    _log.info("listen: %s; what has trained for minutes sounds like noise with a shape", page)
    _log.info('other sounds: foley sample system=%s prompt="a cat meows"', last)
    _log.info("next: foley train experiment=tiny for half an hour, as docs/your-own-sounds.md has it")
    return page
