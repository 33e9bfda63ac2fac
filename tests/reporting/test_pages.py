"""Pages of results: tables, plots and origins out of JSON files, and the templates that the repository ships."""

import json
import shutil
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from foley.core.config import PROJECT_ROOT
from foley.reporting.fewer_steps import against_fewer_steps
from foley.reporting.pages import NOT_MEASURED, Results, write_page
from foley.reporting.plots import plot_rows
from foley.reporting.tables import format_rows, provenance

PAGES = PROJECT_ROOT / "docs" / "results"
TEMPLATES = [
    PAGES / "templates" / f"{page}.md"
    for page in ("acceleration", "data", "demo-model", "denoiser", "distillation", "metrics", "scale")
]
ROWS = [
    {"system": "teacher", "steps": 100, "seconds": {"denoise": 2.0}, "accuracy": 0.5},
    {"system": "student", "steps": 2, "seconds": {"denoise": 0.125}, "accuracy": None},
]


def test_cells_are_formats_of_a_row_and_empty_where_it_has_nothing() -> None:
    columns = {"system": "{system}", "s": "{seconds[denoise]:.2f} s", "a": "{accuracy:.0%}", "k": "{k}"}
    table = format_rows([*ROWS, {"system": "other", "k": 20}], columns)
    assert table.splitlines() == [
        "| system | s | a | k |",
        "| --- | ---: | ---: | ---: |",
        "| teacher | 2.00 s | 50% |  |",
        "| student | 0.12 s |  |  |",
        "| other |  |  | 20 |",
    ]


def test_a_column_that_nothing_fills_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"column 'a': none of the 2 rows has what '\{acuracy\}' asks for"):
        format_rows(ROWS, {"a": "{acuracy}"})


def test_a_column_that_may_be_empty_is_left_out_and_loses_its_mark() -> None:
    table = format_rows(ROWS, {"system": "{system}", "a?": "{acuracy}", "steps?": "{steps}"})
    assert table.splitlines()[0] == "| system | steps |"


def test_a_plot_needs_a_measure_that_all_rows_have(tmp_path: Path) -> None:
    assert not plot_rows(ROWS, "steps", {"accuracy": "accuracy"}, "{system}", tmp_path / "none.png")
    assert not plot_rows([], "steps", {"steps": "steps"}, "{system}", tmp_path / "none.png")
    assert plot_rows(ROWS, "steps", {"steps": "steps", "accuracy": "a"}, "{system}", tmp_path / "some.png")
    assert [file.name for file in tmp_path.iterdir()] == ["some.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "speed"
    folder.mkdir()
    result = {
        "rows": ROWS,
        "ways": {"fast": {"seconds": 1.0}},
        "provenance": {"command": "python x.py", "commit": "abc"},
    }
    (folder / "a.json").write_text(json.dumps(result))
    return folder


def test_a_page_is_its_template_filled_in(folder: Path) -> None:
    template = folder.parent / "template.md"
    template.write_text(
        "# Speed\n{% set a = read('a.json') %}\n{{ table(a, 'rows', {'n': '{steps}'}, system='student') }}\n\n"
        "{{ table(a, 'ways', {'way': '{name}'}) }}\n{{ table(read('b.json'), 'rows', {}) }}\n\n\n\n{{ origin(a) }}"
        "{{ plot('a.png', rows(a, 'rows'), 'steps', {'steps': 'n'}, '{system}') }}{{ picture('b.png') }}\n"
    )
    write_page(template, folder.with_suffix(".md"))
    assert folder.with_suffix(".md").read_text() == (
        "# Speed\n| n |\n| --- |\n| 2 |\n\n| way |\n| --- |\n| fast |\n"
        f"{NOT_MEASURED}\n\nMeasured with `python x.py` (commit abc).![a](speed/a.png)\n"
    )
    assert (folder / "a.png").stat().st_size > 0


def test_a_template_that_asks_for_nothing_known_is_an_error(folder: Path) -> None:
    template = folder.parent / "template.md"
    template.write_text("{{ tabel(1) }}")
    with pytest.raises(UndefinedError, match="tabel"):
        write_page(template, folder.with_suffix(".md"))


def test_results_without_a_file_or_a_part_are_not_measured(folder: Path) -> None:
    results = Results(folder)
    assert results.read("b.json") is None
    assert (results.rows(None, "rows"), results.origin(None)) == ([], "")
    assert results.table(results.read("a.json"), "sweep.rows", {"x": "{x}"}) == NOT_MEASURED


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_the_pages_that_ship_are_what_their_templates_make_of_the_results(template: Path, tmp_path: Path) -> None:
    pages = tmp_path / "results"
    shutil.copytree(
        PAGES, pages, ignore=shutil.ignore_patterns("*.md", "*.flac")
    )  # one page may read another's results
    write_page(template, pages / template.name)
    written, ships = ((folder / template.name).read_text() for folder in (pages, PAGES))
    assert written == ships, f"run: python scripts/report.py page={template.stem}"


def test_a_measurement_names_its_command_without_places() -> None:
    command = provenance()["command"]
    assert command.startswith("python ")
    assert str(PROJECT_ROOT) not in command


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_templates_do_without_results(template: Path, tmp_path: Path) -> None:
    write_page(template, tmp_path / "page.md")
    assert (tmp_path / "page.md").stat().st_size > 0


def test_a_page_says_what_its_rtf_is_of_as_far_as_it_is_known(tmp_path: Path) -> None:
    rows = [{"real_time_factor": 0.5, "machine": "AMD EPYC, 1 thread", "batch_size": 8}, {"seconds": 2.0}]
    results = Results(tmp_path)
    assert results.rtf(rows) == "RTF is seconds of computing over seconds of audio (AMD EPYC, 1 thread, batch 8)."
    both = results.rtf([*rows, {"real_time_factor": 0.25, "machine": "NVIDIA H200", "batch_size": 1}])
    assert "(AMD EPYC, 1 thread, batch 8; NVIDIA H200, batch 1)" in both
    assert results.rtf([{"real_time_factor": 0.5}]) == "RTF is seconds of computing over seconds of audio."
    assert not results.rtf([{"seconds": 2.0}])


def test_the_page_of_acceleration_marks_what_fewer_steps_beat_and_says_what_holds(tmp_path: Path) -> None:
    common = {"setting": "x", "reuse": None, "wall_speedup": 3.0, "label_accuracy": 0.9}
    steps = [
        {**common, "policy": "fewer steps", "value": n, "mac_speedup": 50 / n, "latent_error": 1 / n} for n in (25, 10)
    ]
    better = {**common, "policy": "prediction", "value": 3, "mac_speedup": 3.0, "latent_error": 0.02}
    worse = {**common, "policy": "audiocache", "value": 0.3, "reuse": "hold", "mac_speedup": 3.0, "latent_error": 0.12}
    results = {
        "settings": {"num_steps": 50, "guidance_scale": 3.0, "prompts": 4, "frames": 9, "label_accuracy_uncached": 0.9},
        "provenance": {"date": "today"},
        "rows": against_fewer_steps([*steps, better, worse]),
        "changes": {"relative_deviation": 0.1, "earliest_half": 0.2, "latest_half": 0.7},
    }
    file = tmp_path / "demo-model/caching/ddim_50/caching.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(results))
    (tmp_path / "acceleration").mkdir()
    write_page(PAGES / "templates/acceleration.md", tmp_path / "acceleration.md")
    page = (tmp_path / "acceleration.md").read_text()
    assert "Settings that beat fewer steps: prediction 1 of 1, audiocache (hold) 0 of 1." in page
    assert "3.0x in MACs, latent error 0.020, 0.37 of that of fewer steps" in page  # 0.0543 on the straight line
    assert "(AudioCache, Fig. 3) | holds | standard deviation over prompts 10 % of the mean" in page
    assert "(AudioCache, III-C) | does not hold | at 3.00x its error is 2.21 times that of fewer steps" in page
    write_page(PAGES / "templates/demo-model.md", tmp_path / "demo-model.md")
    assert "| audiocache 0.3 | hold |" in (tmp_path / "demo-model.md").read_text()
