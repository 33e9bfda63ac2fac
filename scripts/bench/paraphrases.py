"""Whether a system is open to words that it never trained on: clips of known wordings and of paraphrases, judged.

Each label is asked for in wordings that the system says it was trained on, and in paraphrases that were held out, with
the same seeds. A judge chooses among all labels that it knows. What counts is the share of labels recognised in clips
of paraphrases over that in clips of known wordings: how well a sound is made at all cancels out of it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from foley.cli.command import command
from foley.core.config import relative_to_checkout
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.data.latents import read_captions
from foley.data.procedural import CLASS_NAMES, captions_for
from foley.data.wordings import Wordings
from foley.generation.prompts import Clip
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import RESAMPLES, Judge
from foley.metrics.scores import Estimate, draw_counts, estimate, share
from foley.reporting.tables import format_rows, provenance

_log = get_logger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A label in two wordings, both with one seed; a near paraphrase is the first that the table holds out."""

    label: str
    seed: int
    known: str
    held_out: str
    near: bool


def known_wordings(label: str, table: Wordings, trained_on: Collection[str]) -> list[str]:
    """Those of the synthesised class and of the table among the captions that a system was trained on.

    All of them where the system does not say what it was trained on.
    """
    texts = [*(captions_for(label) if label in CLASS_NAMES else ()), *table.labels[label].all_known]
    return [text for text in dict.fromkeys(texts) if not trained_on or text in trained_on]


def pairs_of(labels: Iterable[str], table: Wordings, trained_on: Collection[str], seeds: int) -> list[Pair]:
    """`seeds` of each label, which take its wordings in turn; labels without a known or a held-out one are left out.

    Raises ValueError where the system was trained on a wording that the table holds out, or no label is left.
    """
    pairs: list[Pair] = []
    left_out = []
    for label in labels:
        held_out = list(table.labels[label].held_out) if label in table.labels else []
        known = known_wordings(label, table, trained_on) if held_out else []
        if seen := sorted(set(held_out) & set(trained_on)):
            raise ValueError(f"the system was trained on {seen[0]!r}, which the wordings hold out of {label!r}")
        left_out += [] if known else [label]
        pairs += [
            Pair(
                *(label, len(pairs) + turn, known[turn % len(known)], held_out[turn % len(held_out)]),
                near=turn % len(held_out) == 0,
            )
            for turn in range(seeds if known else 0)
        ]
    if left_out:
        _log.warning("left out, without a known or without a held-out wording: %s", ", ".join(left_out))
    if not pairs:
        raise ValueError("no label has a known and a held-out wording: give other labels= or wordings=")
    return pairs


def recognised(judge: Judge, audio: Tensor, sample_rate_hz: int, labels: Sequence[str]) -> Tensor:
    """Whether each clip of `audio [N, 1, T]` is taken for what it was asked to be `[N]`; ValueError at another rate."""
    clips = judge.clips(audio, sample_rate_hz, labels)
    if clips is None:
        raise ValueError(f"clips at {sample_rate_hz} Hz, but this extractor wants {judge.protocol.sample_rate_hz} Hz")
    place = {label: number for number, label in enumerate(judge.protocol.extractor.labels)}
    return clips.logits.argmax(dim=-1) == torch.tensor([place[label] for label in labels])


def ratio(known: Tensor, held_out: Tensor) -> Estimate | None:
    """Of what is recognised of two wordings `[N]`, with an interval by bootstrap over pairs; None for one to zero.

    >>> found = ratio(torch.tensor([True] * 8), torch.tensor([True] * 6 + [False] * 2))
    >>> found.value, found.low < 0.75 < found.high
    (0.75, True)
    """
    if not known.any():
        return None
    counts = draw_counts(len(known), RESAMPLES, "paraphrases")
    return estimate((counts @ held_out.double()) / (counts @ known.double()), str(len(known)), floor=0.0)


def row(known: Tensor, held_out: Tensor) -> Row:
    """Shares recognised with Wilson's intervals, and their ratio with one by bootstrap."""
    n = len(known)
    found = {"known": share(int(known.sum()), n), "held_out": share(int(held_out.sum()), n)}
    scores = {**found, "ratio": ratio(known, held_out)}
    ends = {"": "value", "_low": "low", "_high": "high"}
    values = {
        f"{name}{end}": score and getattr(score, at) for name, score in scores.items() for end, at in ends.items()
    }
    return {"n": n, **values}


def rows_of(pairs: Sequence[Pair], groups: Mapping[str, Collection[str]], known: Tensor, held_out: Tensor) -> list[Row]:
    """A row for all pairs, for those of near and of far paraphrases, and for each group of labels.

    A label of several groups counts in the first.
    """
    first = {label: name for name, labels in reversed(list(groups.items())) for label in labels}
    members = {name: [at for at, pair in enumerate(pairs) if first.get(pair.label) == name] for name in groups}
    nearness = {
        name: [at for at, pair in enumerate(pairs) if pair.near == (name == "near")] for name in ("near", "far")
    }
    chosen = {"all": list(range(len(pairs))), **nearness, **members}
    return [{"group": name, **row(known[own], held_out[own])} for name, own in chosen.items() if own]


def label_rows(pairs: Sequence[Pair], known: Tensor, held_out: Tensor) -> list[Row]:
    """Shares of each label, those that lose most by another wording first."""
    rows = []
    for label in dict.fromkeys(pair.label for pair in pairs):
        own = [at for at, pair in enumerate(pairs) if pair.label == label]
        shares = {"known": float(known[own].double().mean()), "held_out": float(held_out[own].double().mean())}
        rows.append({"label": label, "n": len(own), **shares})
    return sorted(rows, key=lambda each: each["held_out"] - each["known"])


@command("bench/paraphrases")
def main(cfg: DictConfig) -> None:
    """Write `paraphrases.json`, and show it."""
    judges = {name: Judge.load(Path(folder)) for name, folder in cfg.extractors.items()}
    common = set.intersection(*(set(judge.protocol.extractor.labels) for judge in judges.values()))
    first = next(iter(judges.values())).protocol.extractor
    labels = list(cfg.labels or [label for label in first.labels if label in common])
    if foreign := sorted(set(labels) - common):
        raise ValueError(f"labels={foreign}: not every extractor knows them; choose among {sorted(common)}")
    system = TextToAudio.load(cfg.system, resolve_device(cfg.device))
    trained_on = system.known_captions.captions if cfg.trained_on is None else read_captions(cfg.trained_on)
    pairs = pairs_of(labels, Wordings.read(cfg.wordings), set(trained_on), cfg.seeds)
    settings = GenerationSettings(cfg.duration_seconds, num_steps=cfg.steps, batch_size=cfg.batch_size)
    made = {
        name: system.generate_clips([Clip(getattr(pair, name), pair.seed) for pair in pairs], settings).audio
        for name in ("known", "held_out")
    }
    rows, by_label = [], []
    for name, judge in judges.items():
        asked = [pair.label for pair in pairs]
        heard = {kind: recognised(judge, audio, system.sample_rate_hz, asked) for kind, audio in made.items()}
        rows += [{"judge": name, **each} for each in rows_of(pairs, first.label_groups, **heard)]
        by_label += [{"judge": name, **each} for each in label_rows(pairs, **heard)]
    facts = {"system": relative_to_checkout(str(cfg.system)), "steps": cfg.steps, "seeds": cfg.seeds}
    found = {"settings": facts, "rows": rows, "labels": by_label, "provenance": provenance()}
    write_json(Path(cfg.output_dir) / "paraphrases.json", found)
    shown = {"judge": "{judge}", "group": "{group}", "n": "{n}", "known": "{known:.1%}", "held out": "{held_out:.1%}"}
    intervals = {"ratio": "{ratio:.2f}", "from": "{ratio_low:.2f}", "to": "{ratio_high:.2f}"}
    _log.info("%s", format_rows(rows, {**shown, **intervals}))


if __name__ == "__main__":
    main()
