"""The `foley` command: verbs, what they run, and completion in a shell."""

import os
import shutil
import subprocess
import sys

import pytest

import foley
from foley.cli.command import within_checkout
from foley.cli.main import all_verbs, complete, main
from foley.core.config import PROJECT_ROOT, SHIPPED_ROOT


def test_every_script_has_exactly_one_verb():
    scripts = [str(file.relative_to(SHIPPED_ROOT)) for file in (SHIPPED_ROOT / "scripts").rglob("*.py")]
    named = [verb.script for verb in all_verbs().values() if not verb.overrides]
    assert sorted(named) == sorted([*scripts, "train.py", "sample.py", "evaluate.py"])


def test_the_overview_has_a_line_for_every_verb(capsys):
    main([])
    overview = capsys.readouterr().out
    main(["bench"])
    benchmarks = capsys.readouterr().out
    for name in all_verbs():
        assert f"  {name.removeprefix('bench ')} " in (benchmarks if name.startswith("bench ") else overview)
    main(["--version"])
    assert capsys.readouterr().out == f"foley {foley.__version__}\n"


def test_an_unknown_verb_is_refused_by_name():
    with pytest.raises(SystemExit, match="foley sing: there is no such verb; the verbs are sample, demo"):
        main(["sing"])
    with pytest.raises(SystemExit, match="foley bench sing: there is no such verb"):
        main(["bench", "sing"])


@pytest.fixture
def started(monkeypatch):
    """The command lines of the scripts that were run, which do nothing."""
    lines = []
    monkeypatch.setattr("runpy.run_path", lambda script, run_name: lines.append([*sys.argv]))
    monkeypatch.setattr(sys, "argv", ["foley"])
    return lines


def test_a_verb_runs_its_script_with_the_arguments(started):
    main(["prepare", "dataset=audiocaps", "--cfg", "job"])
    main(["bench", "caching", "steps=25"])
    assert started == [
        [str(SHIPPED_ROOT / "scripts/prepare.py"), "dataset=audiocaps", "--cfg", "job"],
        [str(SHIPPED_ROOT / "scripts/bench/caching.py"), "steps=25"],
    ]


def test_distil_is_a_training_unless_another_experiment_is_named(started):
    main(["distil", "seed=1"])
    main(["distil", "experiment=demo/student"])
    train = str(SHIPPED_ROOT / "train.py")
    assert started == [[train, "experiment=audiolcm", "seed=1"], [train, "experiment=demo/student"]]


def test_a_verb_runs_as_its_script_does(tmp_path):
    words = ["-m", "foley", "render", "per_class=1", "duration_seconds=0.1", f"output_dir={tmp_path}", "--cfg", "job"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=tmp_path)
    script = [sys.executable, str(PROJECT_ROOT / "scripts/render_procedural.py"), *words[3:]]
    assert done.stdout == subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert "per_class: 1" in done.stdout


def test_scripts_are_named_as_seen_from_the_checkout(monkeypatch):
    monkeypatch.chdir(PROJECT_ROOT / "scripts")
    assert within_checkout("prepare.py") == "scripts/prepare.py"
    assert within_checkout("/elsewhere/it.py") == "/elsewhere/it.py"


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["sa"], ["sample"]),
        (["bench", "cach"], ["caching"]),
        (
            ["caption", "captioner="],
            [f"captioner={name}" for name in ("autoacd", "qwen2_audio", "strong_labels", "structured")],
        ),
        (["export", "out"], ["output_dir="]),
        (["bench", "caching", "sol"], ["solver="]),
        (["shards", "writer.num"], ["writer.num_workers="]),
        (["caption", "--h"], ["--help"]),
        (["sing", "x"], []),
    ],
)
def test_words_are_completed(words, some):
    assert complete(words) == some


def test_all_verbs_are_offered_first():
    assert {"train", "sample", "evaluate", "bench"} <= set(complete([""]))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "replies"),
    [("foley calib", "calibrate"), ("foley caption captioner=q", "qwen2_audio"), ("foley exp", "export")],
)
def test_bash_completes(tmp_path, capsys, line, replies):
    main(["--completion", "bash"])
    command = tmp_path / "foley"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m foley "$@"\n')
    command.chmod(0o755)
    code = (
        f"{capsys.readouterr().out}\nCOMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; _foley_complete; echo $COMPREPLY"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [replies]


def test_another_shell_is_refused_by_name():
    with pytest.raises(SystemExit, match="foley --completion fish: name one of bash, zsh"):
        main(["--completion", "fish"])


def test_the_index_of_scripts_has_a_line_for_each():
    index = (SHIPPED_ROOT / "scripts/README.md").read_text()
    for name, verb in all_verbs().items():
        if verb.script.startswith("scripts/"):
            assert f"]({verb.script.removeprefix('scripts/')}) | `foley {name}` |" in index
