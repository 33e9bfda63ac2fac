"""Latents to train on at once: of synthesised clips, by a codec that is at hand, encoded at the first use and kept."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from foley.core.config import shipped
from foley.core.logs import get_logger
from foley.data.datamodule import AudioDataModule, LatentDataModule
from foley.data.encoding import EncodingOptions, encode_latents
from foley.data.latent_format import INDEX_FILE
from foley.data.splits import procedural_splits
from foley.system.checkpoint import load_trained

_log = get_logger(__name__)


class ShippedLatents(LatentDataModule):
    """A `LatentDataModule` that makes its latents itself, by the codec of the system that ships.

    Args:
        kept_in: folder of the latents; a folder inside it for each codec, duration, seed and number of clips.
        sizes: split to number of clips.
        duration_seconds: of every clip.
        batch_size, seed: as for `LatentDataModule`.
    """

    def __init__(
        self, kept_in: str, sizes: Mapping[str, int], duration_seconds: float, batch_size: int, seed: int = 0
    ) -> None:
        path = shipped("demo/codec")
        wanted = [(path / "config.json").read_text(encoding="utf-8"), sorted(sizes.items()), duration_seconds, seed]
        cache = Path(kept_in) / hashlib.sha256(repr(wanted).encode()).hexdigest()[:12]
        if not (cache / INDEX_FILE).is_file():
            _log.info("encoding %d synthesised clips into %s, once", sum(sizes.values()), cache)
            codec = load_trained(path, "codec")
            splits = procedural_splits(sizes, seed, duration_seconds, codec.sample_rate_hz)
            clips = AudioDataModule(splits, codec.sample_rate_hz, duration_seconds, batch_size, seed=seed)
            encode_latents(codec, clips.whole_clips(duration_seconds), cache, EncodingOptions(batch_size))
        super().__init__(str(cache), duration_seconds, batch_size, seed=seed)
