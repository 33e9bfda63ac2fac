"""Pass the clips of a manifest through a codec: scored with evaluate.py, they bound what any denoiser can reach."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.progress import track

from foley.cli.command import command, renamed
from foley.core.channels import lossy_mixes
from foley.core.devices import resolve_device
from foley.core.files import sample_stem, write_json
from foley.core.logs import get_logger
from foley.data.audio import read_audio, write_wav
from foley.data.dataset import PeakLevel
from foley.data.manifest import ManifestOptions
from foley.data.splits import entries_of_split
from foley.system.checkpoint import load_trained


@command("script/reconstruct", check=renamed(codec_ckpt="codec_path"))
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Write a WAV and a JSON with id, label and caption for each clip."""
    device = resolve_device(cfg.device)
    codec = load_trained(cfg.codec_path, "codec").to(device)
    entries = entries_of_split(cfg.manifest, cfg.split, None, ManifestOptions.of(cfg), cfg.val_fraction)
    directory, level = Path(cfg.output_dir), PeakLevel()
    directory.mkdir(parents=True, exist_ok=True)
    for index, entry in enumerate(track(entries, description="reconstructing")):
        wanted: dict[str, Any] = {"downmix": cfg.downmix, "channels": codec.audio_channels}
        audio = level(torch.from_numpy(read_audio(entry.path, codec.sample_rate_hz, **wanted)))
        restored = codec.reconstruct(torch.atleast_2d(audio)[None])[0]
        stem = sample_stem(entry.caption, index, 0)
        write_wav(directory / f"{stem}.wav", restored, codec.sample_rate_hz)
        write_json(directory / f"{stem}.json", {"id": entry.id, "label": entry.label, "prompt": entry.caption})
    lossy_mixes.report()
    get_logger(__name__).info("%d reconstructions: %s", len(entries), directory)


if __name__ == "__main__":
    main()
