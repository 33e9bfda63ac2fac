"""Pack training data for a machine that has none: clips of a manifest, or latents, in one folder of bounded size."""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/pack_training_data")
def main(cfg: DictConfig) -> None:
    """Write the folder, and say what it holds."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.numbers import COUNT, POSITIVE, NumberRange
    from foley.core.rates import HIGHEST_RATE_HZ, LOWEST_RATE_HZ
    from foley.data.manifest import ManifestOptions, read_manifest
    from foley.data.packing import choose, pack_clips, pack_latents, remove_packed
    from foley.data.splits import hold_out

    for option in ("max_megabytes", "max_file_megabytes"):
        POSITIVE.check(option, cfg[option])
    if cfg.max_clips is not None:
        COUNT.check("max_clips", cfg.max_clips)
    NumberRange(LOWEST_RATE_HZ, HIGHEST_RATE_HZ, whole=True).check("sample_rate_hz", cfg.sample_rate_hz)
    if cfg.overwrite:
        remove_packed(Path(cfg.output_dir))
    max_bytes, max_file_bytes = round(cfg.max_megabytes * 1e6), round(cfg.max_file_megabytes * 1e6)
    if cfg.latents is not None:
        packed = pack_latents(cfg.latents, Path(cfg.output_dir), max_bytes, max_file_bytes)
    else:
        root = Path(cfg.audio_dir or Path(cfg.manifest).parent)
        entries = read_manifest(cfg.manifest, root, ManifestOptions.of(cfg))
        chosen = choose(hold_out(entries, cfg.val_fraction, root, cfg.manifest), cfg.without, cfg.max_clips)
        packed = pack_clips(chosen, Path(cfg.output_dir), max_bytes, cfg.sample_rate_hz, cfg.downmix)
    message = "%s: %.1f MB, clips %s, SHA-256 %s"
    get_logger(__name__).info(message, cfg.output_dir, packed["bytes"] / 1e6, packed["clips"], packed["sha256"][:12])


if __name__ == "__main__":
    main()
