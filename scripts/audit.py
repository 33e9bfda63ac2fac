"""Say what one hears of a folder of sounds, or of a manifest: clipping, clicks, silence, loudness, repeats and more.

python scripts/audit.py folder=FOLDER fail_on=[clipping,click_start,click_end]
"""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from foley.cli.command import command
from foley.core.logs import get_logger

if TYPE_CHECKING:
    from foley.metrics.audit import Audit


def chosen_files(cfg: DictConfig) -> tuple[list[Path], Path | None]:
    """The files to listen to, and the folder below which they are named."""
    from foley.data.manifest import ManifestOptions
    from foley.metrics.audit import sound_files
    from foley.metrics.references import read_clips

    source = Path(cfg.folder)
    if source.is_dir() or not source.suffix:
        return sound_files(source), source
    clips = read_clips(source, cfg.split, cfg.audio_dir, ManifestOptions.of(cfg))
    # A recording under several captions is one file.
    return list(dict.fromkeys(clip.path for clip in clips)), Path(cfg.audio_dir or source.parent)


def refuse(audit: "Audit", fail_on: list[str], output_dir: str) -> None:
    """Raises ValueError where a clip has one of those findings."""
    met = {name: count for name, count in audit.counts.items() if name in fail_on}
    if met:
        counted = ", ".join(f"{count} {name}" for name, count in met.items())
        raise ValueError(f"fail_on={','.join(met)}: of {len(audit.clips)} clips {counted}; see {output_dir}/index.html")


@command("script/audit")
def main(cfg: DictConfig) -> None:
    """Listen to every file, write the report, and fail where it is asked to."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.numbers import POSITIVE, NumberRange, check_choice
    from foley.core.remote import local_folder
    from foley.metrics.audit import FINDINGS, audit_files
    from foley.reporting.audit import show_audit, write_audit
    from foley.reporting.tables import provenance

    for name in cfg.fail_on:
        check_choice("fail_on", name, FINDINGS)
    whole = NumberRange(least=0, whole=True)
    for option, numbers in {"num_workers": whole, "shown_clips": whole, "longest_seconds": POSITIVE}.items():
        numbers.check(option, cfg[option])
    limits, (files, root) = instantiate(cfg.limits), chosen_files(cfg)
    audit = audit_files(files, limits, root, cfg.num_workers, cfg.longest_seconds)
    facts = {"source": str(cfg.folder), "limits": OmegaConf.to_container(cfg.limits), "provenance": provenance()}
    with local_folder(cfg.output_dir) as directory:
        write_audit(audit, files, directory, facts, cfg.shown_clips)
    show_audit(audit)
    get_logger(__name__).info("open %s/index.html", cfg.output_dir)
    refuse(audit, list(cfg.fail_on), cfg.output_dir)


if __name__ == "__main__":
    main()
