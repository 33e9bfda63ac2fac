"""Train the extractor of protocol `embedded`, and measure it on clips that it has not seen.

python scripts/train_extractor.py [output_dir=data/extractor] [loader.steps=700]
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import Trainer

from foley.cli.command import command, renamed
from foley.core.components import CONFIG_FILE, WEIGHTS_FILE, save_component
from foley.core.files import write_json
from foley.core.hashing import hash_file
from foley.core.reading import read_json
from foley.core.seeding import derive_seed
from foley.data.dataset import AudioItem
from foley.data.manifest import ManifestOptions, read_manifest
from foley.metrics.embedded.data import build_labels, load_splits, measure, through_codec
from foley.metrics.embedded.network import EmbeddedExtractor
from foley.metrics.embedded.train import ExtractorTraining, MelAugmentation, training_loader
from foley.metrics.protocols import load_protocol
from foley.metrics.scores import share
from foley.nn.conv import fold_weight_norm
from foley.reporting.pages import write_page
from foley.system.checkpoint import load_trained

Splits = dict[str, dict[str, list[AudioItem]]]
"""Clips by split and group."""


def with_codec(splits: Splits, codec: Any, stride: int) -> Splits:
    """Add every `stride`-th training clip as the codec gives it back, and all test clips as groups of their own."""
    fold_weight_norm(codec)
    train, test = splits["train"], splits["test"]
    added = {group: [*items, *through_codec(codec, items[::stride])] for group, items in train.items()}
    restored = {f"{group}, through the codec": through_codec(codec, items) for group, items in test.items()}
    return {**splits, "train": added, "test": {**test, **restored}}


def describe(extractor: EmbeddedExtractor, directory: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """The facts of its card: what it is, and its accuracy on the groups of the test split, with intervals."""
    test = measured["accuracy"]["test"]
    rows = [
        {"clips": group, **asdict(share(round(clean["accuracy"] * clean["n"]), clean["n"]))}
        | {condition: groups[group]["accuracy"] for condition, groups in test.items()}
        for group, clean in test["clean"].items()
    ]
    return {
        "labels": len(extractor.labels),
        "parameters": sum(parameter.numel() for parameter in extractor.parameters()),
        "sha256": hash_file(directory / WEIGHTS_FILE),
        "options": read_json(directory / CONFIG_FILE, "the config of an extractor", "train it again"),
        "rows": rows,
    }


@command("script/train_extractor", check=renamed(codec_ckpt="codec_path"))
def main(config: DictConfig) -> None:
    """Compose, train, save, measure."""
    entries = read_manifest(config.manifest, options=ManifestOptions.of(config))
    labels = build_labels([entry for entry in entries if entry.split == "train"], config.minimum_clips)
    rate = config.sample_rate_hz
    splits = load_splits(entries, labels, rate, config.max_seconds, config.seed, **config.procedural)
    if config.codec_path:
        splits = with_codec(splits, load_trained(config.codec_path, "codec"), config.codec_stride)
    component = {"labels": labels.labels, "label_groups": labels.groups, "sample_rate_hz": rate}
    component |= instantiate(config.network, _convert_="all")
    torch.manual_seed(derive_seed("extractor_weights", config.seed))
    extractor = EmbeddedExtractor(**component)
    loader = training_loader(splits.pop("train"), extractor, config.seed, **config.loader)
    steps = config.loader.steps
    module = ExtractorTraining(
        extractor, MelAugmentation(**config.augmentation), steps, seed=config.seed, **config.optimization
    )
    trainer = Trainer(
        max_epochs=1,
        devices=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=config.output_dir,
    )
    trainer.fit(module, loader)
    directory = Path(config.output_dir)
    target = f"{EmbeddedExtractor.__module__}.{EmbeddedExtractor.__qualname__}"
    save_component(extractor, {"_target_": target, **component}, directory, dtype=torch.float16)
    measured = measure(splits, load_protocol("embedded", directory))
    write_json(directory / "metrics.json", measured)
    if config.card:
        write_page(Path(config.card), directory / "README.md", directory, card=describe(extractor, directory, measured))


if __name__ == "__main__":
    main()
