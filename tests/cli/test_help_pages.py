"""The help pages: read from the configs, complete for every command, and shown by `--help`."""

import re
import runpy
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from foley.cli import help as help_pages
from foley.cli.command import refuse_incomplete
from foley.cli.help import chosen_config, help_page, read_page, undocumented
from foley.cli.main import all_verbs, config_of, main
from foley.core.config import CONFIG_DIR, SHIPPED_ROOT
from foley.data.manifest import ManifestOptions

NAMES = sorted({config_of(SHIPPED_ROOT / verb.script) for verb in all_verbs().values()})
"""The primary configs of the commands."""

CONFIG = """\
# @package _global_
# What it does.
#   python scripts/it.py input=FILE
defaults:
  - _self_
  - /hidden: default
  - /debug: null # a way to look for faults
  - /accel@ways.first.accelerator: none # of the first way

input: ??? # a file, "#1" or another
title: "a # in quotes" # of the page
# Two lines
# above it.
number: 2
mapping: # of two things
  inner: 3 # the first
  bare: 4
explained:
  one: [1, 2] # a list
  two: ${number} # the same
flow: {a: 1, b: {c: "# no comment"}} # settings
bare: 5
block: # some text
  inner: |
    text # not a comment
hydra: {run: {dir: .}}
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(help_pages, "CONFIG_DIR", tmp_path)
    (tmp_path / "it.yaml").write_text(CONFIG)
    (tmp_path / "debug/deep").mkdir(parents=True)
    for name in ("fast", "slow", "deep/er"):
        (tmp_path / f"debug/{name}.yaml").touch()
    return read_page("it")


def test_a_page_is_read_from_the_comments_of_a_config(page):
    assert page.description == ["What it does.", "  python scripts/it.py input=FILE"]
    assert [(group.name, group.words, group.choices) for group in page.groups] == [
        ("debug", "a way to look for faults", ("deep/er", "fast", "slow")),
        ("accel@ways.first.accelerator", "of the first way", ()),
    ]
    assert [(option.name, option.words, option.default) for option in page.options] == [
        ("input", 'a file, "#1" or another', "required"),
        ("title", "of the page", '"a # in quotes"'),
        ("number", "Two lines above it.", "2"),
        ("mapping", "of two things", None),
        ("mapping.inner", "the first", "3"),
        ("explained.one", "a list", "[1, 2]"),
        ("explained.two", "the same", None),
        ("flow", "settings", '{a: 1, b: {c: "# no comment"}}'),
        ("bare", "", "5"),
        ("block", "some text", None),
    ]


def test_keys_without_words_are_found(page):
    assert undocumented("it") == ["bare"]


def test_examples_name_the_command_as_the_user_calls_it(page):
    assert "  foley it input=FILE" in help_page("it", "scripts/it.py", {"scripts/it.py": "foley it"})
    assert "  python scripts/it.py input=FILE" in help_page("it", "scripts/it.py")


def test_the_config_may_be_chosen_on_the_command_line():
    assert chosen_config(["--config-name=results"], "script/train_demo") == "script/results"
    assert chosen_config(["a=1", "--config-name", "b"], "c") == "b"
    assert chosen_config(["-cn=b", "size=quick"], "c") == "b"
    assert chosen_config(["size=quick"], "c") == "c"


@pytest.mark.parametrize("verb", all_verbs())
def test_every_verb_has_a_page_that_names_all_its_options(verb, capsys):
    main([*verb.split(), "--help"])
    page = capsys.readouterr().out
    shown = read_page(config_of(SHIPPED_ROOT / all_verbs()[verb].script))
    for option in [*shown.groups, *shown.options]:
        assert f"\n  {option.name} " in page or f"\n  {option.name}\n" in page
    assert max(map(len, page.splitlines())) <= 135


# Recipes of commands whose keys build on each other, not options.
RECIPES = {"script/train_demo"}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained(name):
    assert read_page(name).description
    assert name in RECIPES or undocumented(name) == []


def test_a_script_shows_the_page_itself(monkeypatch, capsys):
    script = SHIPPED_ROOT / "scripts/join_mel_codec.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == help_page("script/join_mel_codec", "scripts/join_mel_codec.py")


def test_every_command_config_belongs_to_a_verb():
    recipes = {"script/results", "script/crpo", "script/train_second_extractor"}
    ours = {config_of(SHIPPED_ROOT / verb.script) for verb in all_verbs().values()} | recipes
    files = [*CONFIG_DIR.glob("*.yaml"), *CONFIG_DIR.glob("script/*.yaml"), *CONFIG_DIR.glob("bench/*.yaml")]
    assert {str(file.relative_to(CONFIG_DIR).with_suffix("")) for file in files} == ours


@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "script/prepare", "script/encode_latents"])
def test_a_command_answers_before_pytorch_is_loaded(name):
    """Help, and mistakes that Hydra finds: the scripts import what is heavy in `main`."""
    script = SHIPPED_ROOT / f"{name.replace('script/', 'scripts/')}.py"
    load = f"import runpy, sys; runpy.run_path({str(script)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", load], check=False).returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "evaluate",
        *(f"script/{script}" for script in ("caption", "filter_clap", "listening_test", "make_shards", "reconstruct")),
        *("script/sweep_sampling", "script/train_extractor"),
    ],
)
def test_whatever_reads_a_manifest_takes_the_names_of_its_columns(name):
    words = {option.name.removeprefix("columns."): option.words for option in read_page(name).options}
    assert all(words[field.name] for field in fields(ManifestOptions))


REQUIRED = {name: lacking for name in NAMES if (lacking := [o.name for o in read_page(name).options if o.required])}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_command_alone_names_all_that_it_lacks_at_once(name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        refuse_incomplete(name, ["script.py"])
    assert re.findall(r"^  ([\w.]+)=  \w", str(ended.value), re.MULTILINE) == REQUIRED[name]
    refuse_incomplete(name, ["script.py", *(f"{option}=x" for option in REQUIRED[name])])


def test_no_choice_of_a_group_gives_what_is_said_to_be_required() -> None:
    texts = [file.read_text() for file in CONFIG_DIR.rglob("*.yaml")]
    given = {key for text in texts if "_global_" in text for key in yaml.safe_load(text) or ()}
    primary = {key for name in NAMES for key in yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())}
    assert {option for options in REQUIRED.values() for option in options} & (given - primary) == set()
