"""Who recognises what in sets of clips: extractors that learnt apart from each other, and a speech recogniser.

Each judge chooses among the labels of a clip's group. Its verdict on a set is the share of clips that it takes for
what they are, with Wilson's interval. Judges err, too: what one says of real recordings is the most that can be asked.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.progress import track

from foley.cli.command import command
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.core.numbers import check_choice
from foley.data.audio import read_audio, read_channels
from foley.metrics.evaluation import restricted_accuracy
from foley.metrics.extractors import Extractor
from foley.metrics.features import ClipFile, extract_files
from foley.metrics.protocols import EvaluationProtocol, load_protocol
from foley.metrics.recogniser import RATE_HZ, WordRecogniser
from foley.metrics.references import read_clips
from foley.metrics.scores import share
from foley.reporting.tables import format_rows, provenance

RECOGNISER = "pocketsphinx"

Row = dict[str, Any]


def row(group: str, judge: str, hits: int, n: int) -> Row:
    """What a judge says of the clips of a group."""
    return {"group": group, "judge": judge, "hits": hits, **asdict(share(hits, n)), "n": n}


def by_extractor(clips: Sequence[ClipFile], judge: str, protocol: EvaluationProtocol) -> list[Row]:
    """A row for each group of labels that some of the clips belong to."""
    heard, extractor = extract_files(clips, protocol, read_channels, None), protocol.extractor
    found = {
        group: restricted_accuracy(heard.logits, heard.labels, extractor.labels, labels)
        for group, labels in extractor.label_groups.items()
    }
    return [row(name, judge, round(each.accuracy * each.n), each.n) for name, each in found.items() if each]


def by_recogniser(clips: Sequence[ClipFile], group: str, recogniser: WordRecogniser) -> list[Row]:
    """A row for the clips that are labelled with one of its words; none where there are none."""
    spoken = [clip for clip in clips if clip.label in recogniser.words]
    heard = [
        recogniser.hear(torch.from_numpy(read_audio(clip.path, RATE_HZ)), RATE_HZ)
        for clip in track(spoken, description="recognising words", disable=not spoken)
    ]
    hits = sum(word == clip.label for word, clip in zip(heard, spoken, strict=True))
    return [row(group, RECOGNISER, hits, len(spoken))] if spoken else []


def recognisers(spoken_group: str | None, extractor: Extractor) -> dict[str, WordRecogniser]:
    """By the group whose labels are words, the recogniser of them; none without one; raises ValueError for no group."""
    if spoken_group is None:
        return {}
    check_choice("spoken_group", spoken_group, extractor.label_groups)
    return {spoken_group: WordRecogniser(extractor.label_groups[spoken_group])}


@command("script/judge")
def main(cfg: DictConfig) -> None:
    """Write `judges.json`, and show it."""
    if not isinstance(cfg.sets, DictConfig):
        raise ValueError(f"sets={cfg.sets}: give sets by name, sets={{NAME: FOLDER, ...}}")
    extractors = {name: load_protocol("embedded", Path(folder)) for name, folder in cfg.extractors.items()}
    spoken = recognisers(cfg.spoken_group, next(iter(extractors.values())).extractor)
    rows = []
    for name, path in cfg.sets.items():
        clips = read_clips(path, cfg.split)
        found = [each for judge, protocol in extractors.items() for each in by_extractor(clips, judge, protocol)]
        found += [each for group, recogniser in spoken.items() for each in by_recogniser(clips, group, recogniser)]
        rows += [{"set": name, **each} for each in found]
    if not rows:
        known = "JSON files that lie beside the clips, or a manifest, say them"
        raise ValueError(f"sets={cfg.sets}: no clip has a label of a group that the judges know; {known}")
    facts = {"judges": {name: each.describe() for name, each in extractors.items()}, "provenance": provenance()}
    write_json(Path(cfg.output_dir) / "judges.json", {"rows": rows, **facts})
    columns = {"set": "{set}", "group": "{group}", "judge": "{judge}", "recognised": "{value:.1%}", "n": "{n}"}
    get_logger(__name__).info("%s", format_rows(rows, {**columns, "from": "{low:.1%}", "to": "{high:.1%}"}))


if __name__ == "__main__":
    main()
