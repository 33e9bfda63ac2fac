"""Prompts and paths as a user types them: nothing in them means anything to Hydra."""

import pytest
from commands import compose_command
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from foley.cli.help import read_page
from foley.cli.overrides import is_text, quote, quote_overrides
from foley.core.config import CONFIG_DIR

PRIMARY = sorted(
    str(file.relative_to(CONFIG_DIR).with_suffix(""))
    for pattern in ("*.yaml", "script/*.yaml", "bench/*.yaml")
    for file in CONFIG_DIR.glob(pattern)
)
TYPED = [
    '"hi"',
    "'a dog' and 'a cat'",
    "a, b",
    "",
    "???",
    "${nope}",
    "\\${x}",
    "true",
    "2024",
    "[a]",
    "{a: b}",
    "null and void",
    "/x/my prompts (v1), a=b/p.txt",
    "outputs/ü",
    "a=b.ckpt",
    "~x",
    "+x",
    "choice(a,b)",
    "C:\\new\\",
    "a\\'b",
    "two\nlines # no comment",
    "  spaces  ",
    "a$b",
    "$",
]


def read_back(option: str, typed: str) -> object:
    """What a config holds after `option=typed`, by way of a sweep, which writes overrides anew."""
    parser = OverridesParser.create()
    first = parser.parse_override(quote_overrides([f"{option}={typed}"])[0])
    again = parser.parse_override(f"{option}={first.get_value_element_as_str()}")
    values = [OmegaConf.create({"value": override.value()}).value for override in (first, again)]
    assert values[0] == values[1]
    return values[0]


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("option", ["prompt", "+ckpt", "data.splits.manifest", "callbacks.evaluation.reference"])
def test_text_arrives_as_typed(option, typed):
    assert read_back(option, typed) == typed


@given(st.text(alphabet="\\'\"${}()[],:=~+#%@?!a1 .-/\n\tßü犬", max_size=12))
@example("\\\\${")
@example("'\\${a}\\")
@example("\\\n")
def test_any_text_arrives_as_typed(typed):
    assert read_back("prompt", typed) == typed
    if not typed.startswith("~/"):
        assert read_back("output_dir", typed) == typed


def test_a_whole_command_line(tmp_path):
    typed = {"prompt": "'a dog' and ${x}, ???", "prompts": "/x/my (v1), a=b/p.txt", "output_dir": f"{tmp_path}/ü"}
    arguments = quote_overrides([*(f"{name}={value}" for name, value in typed.items()), "seed=3", "solver=euler"])
    cfg = compose_command("sample", *arguments)
    assert {name: cfg[name] for name in typed} == typed
    assert (cfg.seed, cfg.solver.name) == (3, "euler")
    assert compose_command("sample", *quote_overrides(["prompt=???"])).prompt == "???"


def test_what_is_not_text_keeps_its_meaning():
    kept = [
        "seed=1,2",
        "solver=ddim,euler",
        "callbacks=[a,b]",
        "trainer.devices=[0,1]",
        "~logger",
        "-m",
        "lr=1e-3",
        "--config-name=x y",
    ]
    kept += ["callbacks.ema=null", "hydra.run.dir=outputs/${now:%Y}", "size=range(1,3)", "student=true", "a dog"]
    assert quote_overrides(kept) == kept


def test_a_group_that_is_given_null_is_left_out():
    assert quote_overrides(["logger=null", "accel=null", "experiment=null", "accel@accel.cache=null"]) == [
        *("~logger", "accel=none", "accel@accel.cache=none")
    ]
    cfg = compose_command("train", *quote_overrides(["experiment=tiny", "logger=null", "callbacks=null", "text=null"]))
    assert list(cfg.logger) == ["csv"]
    assert "_target_" not in cfg.callbacks.audio_samples  # what is left is a setting of tiny for it
    assert "text" not in cfg


def test_no_path_is_null_and_a_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert quote_overrides(["ckpt=null", "edit=null", "prompt=null"]) == ["ckpt=null", "edit=null", "prompt='null'"]
    assert quote_overrides(["output_dir=~/x", "prompt=~/x"]) == ["output_dir='/home/me/x'", "prompt='~/x'"]


def test_a_sweep_takes_several_paths_and_one_prompt():
    assert quote_overrides(["-m", "system=a,b", "prompt=a,b"]) == ["-m", "system=a,b", "prompt='a,b'"]
    assert quote_overrides(["system=a,b"]) == ["system='a,b'"]


def test_what_hydra_cannot_read_is_text():
    assert quote_overrides(["name=my run (2)", "name=it's"]) == ["name='my run (2)'", "name='it\\'s'"]


def test_the_folder_that_a_rank_is_given_is_taken_out_of_its_quotes():
    assert quote_overrides(['hydra.run.dir="/x/a=b, c"']) == [f"hydra.run.dir={quote('/x/a=b, c')}"]


@pytest.mark.parametrize("name", PRIMARY)
def test_every_option_that_names_a_file_takes_text(name):
    """A new option of a path is found by its name; one whose name does not say so goes into `foley.cli.overrides`."""
    endings = ("path", "dir", "folder", "directory", "file", "manifest", "prompt", "url", "output", "out", "ckpt")
    names = ("prompts", "reference", "samples", "system", "teacher", "latents", "edit", "init", "features")
    page = read_page(name)
    options = {option.name for option in page.options} - {group.name for group in page.groups}
    last = {option: option.rpartition(".")[2] for option in options}
    paths = {option for option in options if last[option] in names or last[option].rpartition("_")[2] in endings}
    assert {path for path in paths if not is_text(path)} == set()


def test_quantisation_is_named_beside_every_accelerator() -> None:
    named = quote_overrides(["accel=fora", "accel.quantise=int8_dynamic", "+accel.quantise=fp8", "accel.quantised=1"])
    assert named == ["accel=fora", "quantise=int8_dynamic", "quantise=fp8", "accel.quantised=1"]


def test_the_runs_of_a_sweep_name_their_folders_by_what_each_is_given():
    folder = "output_dir=outputs/${solver.name}_${steps}"
    assert quote_overrides(["-m", "steps=25,50", folder]) == ["-m", "steps=25,50", folder]
    assert quote_overrides([folder]) == [f"output_dir={quote('outputs/${solver.name}_${steps}')}"]
