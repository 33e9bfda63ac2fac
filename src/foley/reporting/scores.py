"""An evaluation as a table on the console, as JSON and as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from foley.core.files import write_json, write_text
from foley.metrics.audit import in_words
from foley.metrics.evaluation import Evaluation
from foley.metrics.scores import CONFIDENCE, Estimate
from foley.reporting.tables import markdown_table

Row = tuple[str, str, str, str]

TITLES = {
    "frechet_distance": "Frechet distance",
    "frechet_distance_infinity": "Frechet distance, n to infinity",
    "kernel_audio_distance": "Kernel audio distance",
    "kl_softmax": "KL(reference || generated), softmax, paired",
    "kl_softmax_reversed": "KL(generated || reference), softmax, paired",
    "kl_sigmoid": "KL(reference || generated), sigmoid, paired",
    "kl_sigmoid_reversed": "KL(generated || reference), sigmoid, paired",
    "kl_marginal": "KL(reference || generated) of mean posteriors, unpaired",
    "kl_marginal_reversed": "KL(generated || reference) of mean posteriors, unpaired",
    "inception_score": "Inception score",
    "clap_score": "CLAP score",
    "clap_score_unrelated": "CLAP score of other clips' captions",
}
_HEADER = ("metric", "value", f"{CONFIDENCE:.0%} interval", "n (reference / generated)")


def score_rows(evaluation: Evaluation) -> list[Row]:
    """(metric, value, interval, n) of every score; a star marks those of which `remarks` says something."""
    rows = [
        (TITLES[name], f"{score.value:.4f}{' *' if score.remark else ''}", _interval(score), score.n)
        for name, score in evaluation.scores.items()
    ]
    rows += [(TITLES[name], "not measured *", "", "") for name in evaluation.unmeasured]
    for group, accuracy in evaluation.accuracy.items():
        name = f"Label accuracy among {_describe_classes(evaluation, group)}"
        rows.append((name, f"{accuracy.accuracy:.1%}", "", str(accuracy.n)))
    return rows


def _describe_classes(evaluation: Evaluation, group: str) -> str:
    """Which classes the classifier chose among: "all 50 classes of EmbeddedExtractor"."""
    classes = evaluation.accuracy[group].choices
    named = f"all {classes} classes" if group == "all" else f"its {classes} {group} classes"
    return f"{named} of {evaluation.protocol['extractor']}"


def remarks(evaluation: Evaluation) -> list[str]:
    """What is to be known before any number is read: notes on the sets, then doubts of single scores."""
    doubts = {name: score.remark for name, score in evaluation.scores.items() if score.remark}
    return [
        *evaluation.notes,
        *(f"{TITLES[name]}: {text}" for name, text in {**doubts, **evaluation.unmeasured}.items()),
    ]


def _interval(score: Estimate) -> str:
    return "" if score.low is None else f"{score.low:.4f} to {score.high:.4f}"


def class_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(class, accuracy among all labels, n) per class, hardest first."""
    everything = evaluation.accuracy.get("all")
    per_class = everything.per_class if everything else {}
    return [(label, f"{value:.1%}", str(n)) for label, (value, n) in sorted(per_class.items(), key=lambda kv: kv[1])]


def to_markdown(evaluations: Sequence[Evaluation]) -> str:
    """The whole report as Markdown, a chapter for each protocol."""
    return "\n\n".join(map(_chapter, evaluations)) + "\n"


def _chapter(evaluation: Evaluation) -> str:
    facts = [f"- {key}: {value}" for key, value in evaluation.protocol.items()]
    parts = [
        f"# Evaluation, protocol `{evaluation.protocol['protocol']}`",
        "\n".join([*facts, *(f"- {fact}" for fact in _set_facts(evaluation))]),
        markdown_table(_HEADER, score_rows(evaluation)),
    ]
    if found := remarks(evaluation):
        parts += ["\n".join(f"- {remark}" for remark in found)]
    if classes := class_rows(evaluation):
        parts += [
            f"## Accuracy per class, among {_describe_classes(evaluation, 'all')}",
            markdown_table(("class", "accuracy", "n"), classes),
        ]
    if evaluation.silent:
        parts += ["## ALARM: silent clips", "\n".join(f"- {id}" for id in evaluation.silent)]
    return "\n\n".join(parts)


def _set_facts(evaluation: Evaluation) -> list[str]:
    """What is to be said of the generated clips as a set."""
    return [
        f"pairing: {evaluation.pairing}",
        f"clips without label: {evaluation.n_unlabelled}",
        describe_speed(evaluation),
        *([] if evaluation.audit is None else [in_words(evaluation.audit)]),
    ]


def describe_speed(evaluation: Evaluation) -> str:
    """How fast the clips were made, as far as they say.

    Not of scoring them: AudioLCM's RTF is of synthesis (section 4.1).
    """
    if evaluation.rtf is None:
        return "RTF: no clip says how fast it was made"
    return f"RTF: {evaluation.rtf.in_words()}, mean of {evaluation.n_timed} of {evaluation.n_generated} clips"


def show(evaluation: Evaluation, console: Console | None = None) -> None:
    """Draw the scores on the console."""
    facts = evaluation.protocol
    title = f"protocol {facts['protocol']} v{facts['version']}, extractor {facts['extractor_hash'][:12]}"
    table = Table(*_HEADER, title=title)
    for row in score_rows(evaluation):
        table.add_row(*row)
    console = console or Console()
    console.print(table)
    console.print(describe_speed(evaluation), markup=False, highlight=False)
    if evaluation.audit is not None:
        console.print(in_words(evaluation.audit), markup=False, highlight=False)
    for remark in remarks(evaluation):
        console.print(f"* {remark}", markup=False, highlight=False)


def flat_scores(evaluations: Iterable[Evaluation]) -> dict[str, float]:
    """`protocol/score` to value, and `protocol/accuracy/group`: what loggers take."""
    flat: dict[str, float] = {}
    for evaluation in evaluations:
        name = evaluation.protocol["protocol"]
        flat |= {f"{name}/{score}": found.value for score, found in evaluation.scores.items()}
        flat |= {f"{name}/accuracy/{group}": found.accuracy for group, found in evaluation.accuracy.items()}
    return flat


def write_report(evaluations: Sequence[Evaluation], directory: Path) -> None:
    """Write `evaluation.json`, by protocol, and `evaluation.md` into `directory`."""
    by_protocol = {evaluation.protocol["protocol"]: evaluation.to_dict() for evaluation in evaluations}
    write_json(directory / "evaluation.json", by_protocol)
    write_text(directory / "evaluation.md", to_markdown(evaluations))
