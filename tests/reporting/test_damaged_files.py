"""What reporting reads from others' runs is right, or is refused with the name of the file."""

import json

import pytest

from foley.core.reading import DamagedFileError
from foley.reporting.dashboard import read_metrics
from foley.reporting.listening import read_ratings
from foley.reporting.pages import Results
from foley.reporting.sweeps import read_trials

DAMAGE = [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": "\\ud800"}', b"[1]", b"{}"]


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_key_or_trial_is_named(tmp_path, content):
    (tmp_path / "0").mkdir()
    for name in ("key.json", "0/trial.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"key\.json is damaged or not the key of a listening test"):
        read_ratings([], tmp_path / "key.json")
    with pytest.raises(DamagedFileError, match=r"trial\.json is damaged or not a trial of a sweep"):
        read_trials(tmp_path)


@pytest.mark.parametrize("content", DAMAGE[:5], ids=range(5))
def test_a_damaged_result_of_a_benchmark_is_named(tmp_path, content):
    (tmp_path / "speed.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"speed\.json is damaged .* run the benchmark again"):
        Results(tmp_path).read("speed.json")


@pytest.mark.parametrize("content", [b"epoch,loss\n1,0.5\n", b"step,loss\n1,high\n", b"step,loss\n\xff,1\n"])
def test_damaged_metrics_are_named(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"metrics\.csv is damaged or not the metrics of a run"):
        read_metrics(tmp_path / "metrics.csv")


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"test,listener\n\xff,1\n"])
def test_results_of_something_else_are_named(tmp_path, content):
    (tmp_path / "key.json").write_text(json.dumps({"test": "t", "stimuli": {}}))
    (tmp_path / "anna.csv").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"anna\.csv is damaged or not results of a listening test"):
        read_ratings([tmp_path / "anna.csv"], tmp_path / "key.json")
