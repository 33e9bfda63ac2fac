"""What a failed command shows: one message and exit code 1, the traceback in the log."""

import logging
import sys

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from foley.cli.command import command
from foley.cli.errors import describe
from foley.core.components import CheckpointError
from foley.core.devices import resolve_device
from foley.core.reading import DamagedFileError


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a task as a command of the options of `scripts/report.py`: exit code, what stands on stderr, the log."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("FOLEY_DEBUG", raising=False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def call(task, *arguments):
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        arguments = arguments or ["page=metrics"]
        places = [f"hydra.run.dir={tmp_path}", f"hydra.sweep.dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments, *places])
        with pytest.raises(SystemExit) as end:
            command("script/report")(task)()
        logs = "".join(log.read_text() for log in sorted(tmp_path.rglob("*.log")))
        return end.value.code, capsys.readouterr().err, logs

    return call


def fails(cfg):
    raise ValueError("steps=0: give 1 or more")


def test_an_error_is_one_message_and_its_traceback_is_in_the_log(run, tmp_path):
    code, shown, log = run(fails)
    assert (code, shown) == (
        1,
        f"foley: steps=0: give 1 or more\nThe traceback is in {tmp_path / 'test_errors.log'}\n",
    )
    assert "Traceback (most recent call last)" in log
    assert "in fails" in log


@pytest.mark.parametrize("override", ["hydra.verbose=true", "page=x"])
def test_who_debugs_sees_the_traceback(run, monkeypatch, override):
    monkeypatch.setenv("FOLEY_DEBUG", "0" if "verbose" in override else "1")
    code, shown, _ = run(fails, override)
    assert code == 1
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith("foley: steps=0: give 1 or more\n")


def test_a_fault_of_ours_says_so(run):
    code, shown, _ = run(lambda cfg: cfg.page.shape)
    assert code == 1
    assert shown.startswith("foley: AttributeError: 'str' object has no attribute 'shape'\nThis is a fault of foley")


def test_where_null_was_typed_it_is_named_and_is_no_fault_of_ours(run):
    _, shown, _ = run(lambda cfg: cfg.results_dir > 1, "page=x", "results_dir=null")
    assert shown.startswith("foley: results_dir=null: give a value, or leave it out; it ends in TypeError")
    assert "fault of foley" not in shown


def test_ctrl_c_and_messages_of_a_command_pass(run):
    def interrupted(cfg):
        raise KeyboardInterrupt

    def leaves(cfg):
        raise SystemExit("in words")

    assert run(interrupted)[:2] == (130, "foley: stopped by Ctrl-C\n")
    assert run(leaves)[:2] == ("in words", "")


def test_a_failed_job_of_a_sweep_shows_the_same_message_once(run):
    code, shown, log = run(fails, "results_dir=it's", "-m", "page=a,b")
    assert code == 1
    assert shown.count("foley: steps=0: give 1 or more\nThe traceback is in") == 2  # of two jobs
    assert "Traceback" not in shown
    assert log.count("Traceback") == 2


def test_ranks_that_a_task_starts_repeat_what_was_typed(run):
    def starts(cfg):
        raise SystemExit(f"{sys.argv[1]} {cfg.page}")

    assert run(starts, "page='a', b")[0] == "page='a', b 'a', b"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("pagee=x", "pagee=: there is no such option; did you mean page=?"),
        ("quite_another=1", "quite_another=: there is no such option; --help lists the options"),
        ("+launcher=nope", "launcher=nope: there is no such choice; there are local, none, slurm"),
        ("a dog barks", "a dog barks: options are key=value"),
        ("hydra.job.num=1,2", "hydra.job.num=1,2: add -m to sweep over these values, or give a list"),
        ("--config-name=nope", "--config-name=nope: there is no such choice"),
    ],
)
def test_mistakes_that_hydra_finds_are_one_line(run, argument, message):
    code, shown, _ = run(lambda cfg: None, argument)
    assert code == 1
    assert shown.startswith(f"foley: {message}")
    assert len(shown.splitlines()) == 1


def test_a_group_that_is_given_true_or_a_number_names_its_choices(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", "debug=true"])
    error = ValueError("Config group override must be a string or a list. Got bool")
    assert describe(error, "train") == "debug=true: there is no such choice; there are fdr, overfit, profiler"


def test_a_launcher_that_is_not_installed_is_named_with_its_package():
    error = MissingConfigException("", "hydra/launcher/submitit_slurm", ["basic"])
    assert describe(error, "train") == "launcher=slurm wants pip install 'foley[cluster]'"


def test_what_a_config_lacks_is_named(run):
    code, shown, _ = run(lambda cfg: cfg.page, "hydra.job.name=x")
    assert code == 1
    assert "page= is required" in shown


def nested(value):
    return OmegaConf.create({"a": "${nope}"}).a


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("fractions.Fraction", "part: Fraction.__new__() got an unexpected keyword argument 'value'"),
        ("test_errors.nested", "part: a: Interpolation key 'nope' not found"),
    ],
)
def test_an_error_of_a_part_names_its_key_and_its_cause(target, message):
    config = OmegaConf.create({"part": {"_target_": target, "value": 1}})
    with pytest.raises(InstantiationException) as found:
        instantiate(config)
    assert describe(found.value).startswith(message)
    assert "full_key" not in describe(found.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "MemoryError"),
        (CheckpointError("x.ckpt: damaged"), "x.ckpt: damaged"),
        (DamagedFileError("x.json: line 3"), "x.json: line 3"),
        (ModuleNotFoundError("No module named 'wandb'"), "No module named 'wandb'"),
        (KeyError("width"), "KeyError: 'width'\nThis is a fault of foley, not of the command"),
    ],
)
def test_errors_in_words(error, message):
    assert describe(error) == message


@pytest.mark.parametrize("name", ["cuda:99", "nope", "cpu:1"])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"device={name}: "):
        resolve_device(name)
    assert resolve_device("cpu").type == "cpu"


def test_a_value_of_another_kind_is_told_so():
    error = ConfigCompositionException("Error merging override adapters={path: x}")
    error.__cause__ = ValueError("Cannot merge DictConfig with ListConfig\n    full_key: adapters")
    expected = "adapters={path: x}: this option takes a value of another kind (Cannot merge DictConfig with ListConfig)"
    assert describe(error) == f"{expected}; --help says which"
