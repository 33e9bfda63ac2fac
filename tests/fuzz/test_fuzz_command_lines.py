"""Command lines of random text: one message without a traceback, and text comes through as it was typed."""

import sys

import pytest
from fuzzing import ABSURD_TEXT, bounded, plain_text
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from foley.cli.command import command

KEYS = st.sampled_from(
    ["seed", "num", "steps", "duration_seconds", "accel", "solver", "+new", "~seed", "prompt", "no.such"]
)
WORDS = st.one_of(
    plain_text(),
    st.builds(
        "{}={}".format, st.one_of(KEYS, plain_text(8)), st.one_of(plain_text(), ABSURD_TEXT.filter(str.isprintable))
    ),
)


@command("sample")
def composed(cfg: DictConfig) -> dict[str, object]:
    """Stands for a script: what it was asked for, resolved no further than its own options."""
    return {"prompt": cfg.prompt, "seed": cfg.seed}


@bounded
@given(words=st.lists(WORDS, max_size=3))
def test_any_command_line_ends_in_a_config_or_in_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
    words: list[str],
) -> None:
    folder = tmp_path_factory.getbasetemp() / "command-lines"
    monkeypatch.setattr(sys, "argv", ["sample.py", *words, f"output_dir={folder}"])
    capsys.readouterr()
    code, said = ended(capsys)
    if code != 0:
        assert "Traceback" not in said
        assert 0 < len(said.splitlines()) < 15


def ended(capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The exit code of the command, and what it said where that is not 0."""
    try:
        composed()
    except SystemExit as end:
        words = end.code if isinstance(end.code, str) else ""
        return end.code or 0, capsys.readouterr().err + words
    return 0, ""
