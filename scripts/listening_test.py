"""Build a listening test: one page to send to listeners, and the key to keep.

python scripts/listening_test.py "systems={ours: DIR, theirs: DIR}" reference=FOLDER_OR_MANIFEST
"""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger
from foley.core.seeding import numpy_generator
from foley.data.audio import read_channels
from foley.data.manifest import ManifestOptions
from foley.metrics.features import ClipFile
from foley.metrics.references import read_clips
from foley.reporting.listening import KEY_FILE, REFERENCE, Stimulus, low_pass, mos_protocol, write_test


def choose_items(folders: dict[str, dict[str, ClipFile]], num_items: int, seed: int) -> list[str]:
    """Ids that every system has, at random by the seed; ValueError where there are fewer."""
    common = sorted(set.intersection(*(set(clips) for clips in folders.values())))
    if len(common) < num_items:
        sizes = {name: len(clips) for name, clips in folders.items()}
        raise ValueError(
            f"num_items={num_items}: {sizes} clips have only {len(common)} ids in common; give them the ids of their "
            "references (an `id` column in the prompt file)"
        )
    return sorted(numpy_generator("listening items", seed).choice(common, num_items, replace=False).tolist())


def read_stimulus(system: str, clip: ClipFile, caption: str, max_seconds: float) -> Stimulus:
    """The first `max_seconds` of a clip, at its own rate."""
    samples, rate = read_channels(clip.path, max_seconds)
    return Stimulus(system, clip.id, caption, samples, rate)


@command("script/listening_test")
def main(cfg: DictConfig) -> None:
    """Write `listening_test.html` and `key.json`."""
    protocol = mos_protocol(cfg.mos_protocol)
    clips = {name: read_clips(path) for name, path in cfg.systems.items()}
    clips[REFERENCE] = read_clips(cfg.reference, audio_dir=cfg.audio_dir, options=ManifestOptions.of(cfg))
    folders = {name: {clip.id: clip for clip in found} for name, found in clips.items()}
    stimuli = []
    for item in choose_items(folders, cfg.num_items, cfg.seed):
        caption = next((clips[item].caption for clips in folders.values() if clips[item].caption), None) or ""
        of_item = [read_stimulus(name, clips[item], caption, cfg.max_seconds) for name, clips in folders.items()]
        stimuli += [*of_item, low_pass(of_item[-1], cfg.anchor_hz)]
    directory = Path(cfg.output_dir)
    page = write_test(directory, cfg.title, stimuli, cfg.seed, protocol)
    size = page.stat().st_size / 2**20
    log = get_logger(__name__)
    log.info("%d sounds, %.1f MiB: send %s to listeners; keep %s", len(stimuli), size, page, directory / KEY_FILE)


if __name__ == "__main__":
    main()
