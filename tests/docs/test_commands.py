"""The commands of README.md and docs/ do what the pages say: each is run in small, or at least composed."""

import csv
import json
import re
from pathlib import Path

import pytest
from doc_blocks import Block, all_blocks, check_options, pages, read_blocks, run_small

from foley.core.config import PROJECT_ROOT

BLOCKS = all_blocks()
JOURNEY = PROJECT_ROOT / "docs" / "your-own-sounds.md"


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for given: data/, some sounds with captions, and prompts."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "data").symlink_to(PROJECT_ROOT / "data")
    (folder / "prompts.txt").write_text("a dog barks\nrain falls on a roof\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        render = ["foley", "render", "output_dir=sounds", "per_class=1"]
        run_small(render, "duration_seconds=1.0", patch)
    rows = [json.loads(line) for line in (folder / "sounds" / "manifest.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["split"] = "val" if index % 8 == 0 else "train"
    (folder / "sounds" / "sounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "sounds" / "sounds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "caption", "split", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "dog.wav").write_bytes((folder / "sounds" / rows[0]["path"]).read_bytes())
    return folder


@pytest.fixture
def here(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workshop)
    return workshop


def run_block(block: Block, patch: pytest.MonkeyPatch) -> None:
    if block.language == "python":
        exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
        return
    for words in block.commands():
        run_small(words, block.words, patch)


def test_every_block_says_how_it_is_tested() -> None:
    unmarked = [block.place for block in BLOCKS if block.kind is None]
    assert not unmarked, f"put <!-- run -->, <!-- compose --> or <!-- skip: reason --> above: {unmarked}"
    unreasoned = [block.place for block in of_kind("skip") if not block.words]
    assert not unreasoned, f"say why: {unreasoned}"


@pytest.mark.parametrize("block", of_kind("compose"), ids=lambda block: block.place)
def test_options_exist(block: Block) -> None:
    for words in block.commands():
        check_options(words)


@pytest.mark.docs
@pytest.mark.parametrize("block", of_kind("run"), ids=lambda block: block.place)
def test_commands_run(block: Block, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_block(block, monkeypatch)


@pytest.mark.docs
@pytest.mark.timeout(600)
def test_the_journey_from_sounds_to_a_system(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/your-own-sounds.md from top to bottom, in one folder."""
    for block in read_blocks(JOURNEY):
        if block.kind == "journey":
            run_block(block, monkeypatch)
    assert (here / "outputs" / "mine" / "system" / "student" / "system.json").is_file()


def test_readme_is_short() -> None:
    assert len((PROJECT_ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_links_to_files_lead_somewhere() -> None:
    """Relative links of README.md and CONTRIBUTING.md; those of the site are checked by `mkdocs build --strict`."""
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (PROJECT_ROOT / name).read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
        assert [link for link in links if not (PROJECT_ROOT / link).exists()] == [], name


def test_paths_in_the_text_exist() -> None:
    """`accel/cost.py` in backticks is a file, at the top or below src/foley; names with CAPITALS stand for others."""
    wrong = []
    for page in pages():
        if "results" in page.parts:
            continue  # records of what was run
        for name in re.findall(
            r"`((?!outputs/)(?:[a-z_]+/)+[a-z0-9_]+\.(?:py|yaml|md))`", page.read_text(encoding="utf-8")
        ):
            if not any((root / name).exists() for root in (PROJECT_ROOT, PROJECT_ROOT / "src" / "foley")):
                wrong.append(f"{page.name}: {name}")
    assert not wrong, wrong
