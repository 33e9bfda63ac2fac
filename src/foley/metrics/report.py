"""An evaluation as a table on the console, as JSON and as Markdown."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from foley.checkpoint import write_json, write_text
from foley.metrics.evaluation import Evaluation

Row = tuple[str, str, str]


def score_rows(evaluation: Evaluation) -> list[Row]:
    """(metric, value, n) of every score that the evaluation has."""
    n = str(evaluation.n_generated)
    sets = f"{evaluation.n_reference} / {n}"
    rows = [("Frechet distance", f"{evaluation.frechet_distance:.4f}", sets)]
    for name, value, count in (
        ("KL softmax, paired", evaluation.kl_softmax, n),
        ("KL sigmoid, paired", evaluation.kl_sigmoid, n),
        ("KL of mean posteriors, unpaired", evaluation.kl_marginal, sets),
    ):
        if value is not None:
            rows.append((name, f"{value:.4f}", count))
    rows.append(("Inception score", f"{evaluation.inception_score:.3f} ± {evaluation.inception_score_std:.3f}", n))
    for group, accuracy in evaluation.accuracy.items():
        name = f"Label accuracy, {group} ({accuracy.choices} classes)"
        rows.append((name, f"{accuracy.accuracy:.1%}", str(accuracy.n)))
    return rows


def class_rows(evaluation: Evaluation) -> list[Row]:
    """(class, accuracy among all labels, n) per class, hardest first."""
    everything = evaluation.accuracy.get("all")
    per_class = everything.per_class if everything else {}
    return [(label, f"{value:.1%}", str(n)) for label, (value, n) in sorted(per_class.items(), key=lambda kv: kv[1])]


def markdown_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def to_markdown(evaluation: Evaluation) -> str:
    """The whole report as Markdown."""
    facts = [f"- {key}: {value}" for key, value in evaluation.protocol.items()]
    parts = [
        f"# Evaluation, protocol `{evaluation.protocol['protocol']}`",
        "\n".join([*facts, f"- pairing: {evaluation.pairing}", f"- clips without label: {evaluation.n_unlabelled}"]),
        markdown_table(("metric", "value", "n (reference / generated)"), score_rows(evaluation)),
    ]
    if classes := class_rows(evaluation):
        parts += ["## Accuracy per class", markdown_table(("class", "accuracy", "n"), classes)]
    if evaluation.silent:
        parts += ["## ALARM: silent clips", "\n".join(f"- {id}" for id in evaluation.silent)]
    return "\n\n".join(parts) + "\n"


def show(evaluation: Evaluation, console: Console | None = None) -> None:
    """Draw the scores on the console."""
    facts = evaluation.protocol
    title = f"protocol {facts['protocol']} v{facts['version']}, extractor {facts['extractor_hash'][:12]}"
    table = Table("metric", "value", "n (reference / generated)", title=title)
    for row in score_rows(evaluation):
        table.add_row(*row)
    (console or Console()).print(table)


def write_report(evaluation: Evaluation, directory: Path) -> None:
    """Write `evaluation.json` and `evaluation.md` into `directory`."""
    write_json(directory / "evaluation.json", evaluation.to_dict())
    write_text(directory / "evaluation.md", to_markdown(evaluation))
