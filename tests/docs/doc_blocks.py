"""The code blocks of README.md and docs/, each with the marker above it that says how it is tested.

<!-- run: steps=2 -->      every command runs in small: `SMALL` and these options are added to it
<!-- journey: steps=2 -->  the same, one block after the other in one folder (docs/your-own-sounds.md)
<!-- compose -->           the options of every command are composed, and nothing runs
<!-- skip: a reason -->    needs a network, a GPU or hours
"""

import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from foley.cli.help import chosen_config
from foley.cli.main import all_verbs, config_of, split_verb
from foley.cli.overrides import quote_overrides
from foley.core.config import PROJECT_ROOT

SMALL = {
    "train.py": "trainer.max_steps=2 trainer.val_check_interval=2 trainer.limit_val_batches=1 data.batch_size=4 "
    "trainer.enable_model_summary=false callbacks.checkpoint.every_n_train_steps=2 lr_schedule.warmup_steps=1",
    "sample.py": "steps=2 duration_seconds=0.5",
    "scripts/calibrate.py": "num_prompts=1 duration_seconds=0.5",
    "scripts/sweep_sampling.py": "num_prompts=2 duration_seconds=0.5",
    "evaluate.py": "resamples=0",
}
"""What makes a command small enough for a test; by script."""
CALIBRATED = "steps=50"
"""The fewest steps that the system that ships is calibrated for."""

_FENCE = re.compile(r"^```(\w*)\s*$")
_MARKER = re.compile(r"^<!--\s*(run|journey|compose|skip)(?::\s*(.*?))?\s*-->$")
_IGNORED = ("source", "cd", "for", "done")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, what it holds, and how it is tested (`kind`; None where nothing says so)."""

    page: Path
    line: int
    language: str
    text: str
    kind: str | None
    words: str

    @property
    def place(self) -> str:
        """File and line, as an editor takes them."""
        return f"{self.page.relative_to(PROJECT_ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command, comments and continuations resolved; none of what only sets up a shell."""
        found, pending = [], ""
        for line in self.text.replace("\\\n", " ").splitlines():
            pending += line.removeprefix("do ").strip() + " "
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            pending = ""
            if words and words[0] not in _IGNORED:
                found.append([word for word in words if word != "..."])
        assert not pending, f"{self.place}: a quotation is not closed"
        return found


def pages() -> list[Path]:
    """README.md and every page of the site."""
    docs = sorted(page for page in (PROJECT_ROOT / "docs").rglob("*.md") if "templates" not in page.parts)
    return [PROJECT_ROOT / "README.md", PROJECT_ROOT / "CONTRIBUTING.md", *docs]


def read_blocks(page: Path) -> list[Block]:
    """The `bash` and `python` blocks of a page, in their order."""
    lines, blocks, start = page.read_text(encoding="utf-8").splitlines(), [], None
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence is None:
            continue
        if start is None:
            start, language = number, fence[1]
            continue
        marker = _MARKER.match(next((above for above in reversed(lines[:start]) if above.strip()), ""))
        kind, words = (marker[1], marker[2] or "") if marker else (None, "")
        text = "\n".join(lines[start + 1 : number])
        blocks.append(Block(page, start + 1, language, text, kind, words))
        start = None
    return [block for block in blocks if block.language in ("bash", "python")]


def all_blocks() -> list[Block]:
    """Those of every page."""
    return [block for page in pages() for block in read_blocks(page)]


def script_of(words: list[str]) -> tuple[Path, list[str]]:
    """The script of a command, and its arguments; raises AssertionError for a program that is none of ours."""
    program, *arguments = words
    if program == "foley":
        name, arguments = split_verb(arguments)
        verbs = all_verbs()
        assert name in verbs, f"foley has no verb {name}"
        return PROJECT_ROOT / verbs[name].script, [*verbs[name].overrides, *verbs[name].named(arguments)]
    assert program == "python", f"{program}: a block with other programs than python, foley and make is skipped"
    return PROJECT_ROOT / arguments[0], arguments[1:]


def first_of_sweep(override: str) -> str:
    """Of `steps=25,50` the first choice."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(iter(parsed.sweep_string_iterator()))}"


def check_options(words: list[str]) -> None:
    """Compose what a command asks for: an option, group, choice or script that does not exist is an error."""
    if words[0] == "make":
        makefile = (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:]), words
        return
    script, arguments = script_of(words)
    overrides = [word for word in quote_overrides(arguments) if not word.startswith("-")]
    if "-m" in arguments:
        overrides = [first_of_sweep(override) for override in overrides]
    GlobalHydra.instance().clear()
    folder, _, name = chosen_config(arguments, config_of(script)).rpartition("/")
    with initialize_config_dir(str(PROJECT_ROOT / "configs" / folder), version_base="1.3"):
        compose(name, overrides, return_hydra_config=True)


def run_small(words: list[str], more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in this process and in the current folder, made small."""
    script, arguments = script_of(words)
    small = shlex.split(SMALL.get(str(script.relative_to(PROJECT_ROOT)), ""))
    if script.name == "sample.py":
        arguments = [f"output_dir={mkdtemp(dir=Path.cwd())}", *arguments]  # unless the command names its own
        small += [CALIBRATED] * any(word in arguments for word in ("accel=audiocache", "accel=smoothcache"))
    monkeypatch.setattr("sys.argv", [str(script), *arguments, *small, *shlex.split(more)])
    GlobalHydra.instance().clear()
    runpy.run_path(str(script), run_name="__main__")
