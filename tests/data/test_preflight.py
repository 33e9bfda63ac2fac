"""The look at every file before a run: of many files in threads, once, and no further than it must go."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from foley.data import preflight as looks
from foley.data.audio import AudioError
from foley.data.dataset import AudioDataset, DataFaultError
from foley.data.entries import Entries, ManifestEntry
from foley.data.preflight import preflight, preflight_of_ranks
from foley.data.splits import ClipSource


class Files:
    """Stands for a disk: which files are at fault, and which were opened."""

    def __init__(self, faulty: set[str]) -> None:
        self.faulty, self.opened = faulty, []

    def __call__(self, path: Path, expected_seconds: float | None = None) -> "Files":
        self.opened.append(path.name)
        if path.name in self.faulty:
            raise AudioError(path, "is not there")
        return self

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    samplerate = 8000


@pytest.fixture
def disk(tmp_path, monkeypatch):
    files = Files(set())
    monkeypatch.setattr(looks, "open_audio", files)
    monkeypatch.setattr(looks, "_WORTH_REMEMBERING_FILES", 1000)
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "cache"))
    return files


def clips(count: int) -> Entries:
    return Entries.of([ManifestEntry(Path(f"/data/{n}"), "x", str(n), 1.0, line=n + 1) for n in range(count)])


def names(faults: list[looks.FaultyEntry]) -> list[str]:
    return [fault.entry.id for fault in faults]


def test_faults_are_listed_in_order_whatever_thread_found_them(disk):
    disk.faulty = {"7", "255", "256", "999"}
    assert names(preflight(clips(1000))) == ["7", "255", "256", "999"]
    assert len(disk.opened) == len(set(disk.opened)) == 1000


def test_a_later_run_looks_at_the_faulty_ones_alone(disk):
    disk.faulty = {"3", "1200"}
    preflight(clips(2000))
    disk.opened, disk.faulty = [], {"3"}
    assert names(preflight(clips(2000))) == ["3"]  # the other was mended
    assert disk.opened == ["3", "1200"]
    disk.opened = []
    assert names(preflight(clips(2000))) == ["3"]
    assert disk.opened == ["3"]
    preflight(clips(2000), anew=True)
    assert len(disk.opened) == 2001


def test_other_paths_lengths_and_depths_are_looked_at(disk):
    preflight(clips(1000))
    for changed in ([*clips(1000), clips(1001)[1000]], [replace(clip, duration_seconds=2.0) for clip in clips(1000)]):
        disk.opened = []
        preflight(changed)
        assert len(disk.opened) == len(changed)


def test_the_look_ends_where_too_many_are_faulty_and_goes_on_when_they_are_mended(disk, caplog):
    disk.faulty = {str(n) for n in range(20_000)}
    faults = preflight(clips(20_000), max_fault_fraction=0.01)
    assert 200 < len(faults) < 1000
    assert "and not all were looked at" in caplog.text
    with pytest.raises(DataFaultError, match=r"more than the fraction 0\.01"):
        AudioDataset(
            ClipSource(clips(20_000), 8000, known_faults=[fault.reason for fault in faults]),
            80,
            max_fault_fraction=0.01,
        )
    disk.opened, disk.faulty = [], {"19999"}
    assert names(preflight(clips(20_000), max_fault_fraction=0.01)) == ["19999"]
    assert set(disk.opened) == {str(n) for n in range(20_000)}


def test_a_damaged_memory_is_found_out_anew(disk, tmp_path):
    preflight(clips(1000))
    (file,) = (tmp_path / "cache" / "preflight").glob("*.json")
    file.write_text('{"faults": 1}')
    disk.opened = []
    preflight(clips(1000))
    assert len(disk.opened) == 1000


def test_of_few_files_the_first_rank_looks_and_of_many_each_rank_knows(disk, monkeypatch):
    disk.faulty = {"5"}
    assert names(preflight_of_ranks(clips(1500), True)) == ["5"]
    monkeypatch.setenv("RANK", "1")
    disk.opened = []
    assert names(preflight_of_ranks(clips(1500), True)) == ["5"]
    assert names(preflight_of_ranks(clips(1500), "anew")) == ["5"]  # rank 0 looks anew
    assert disk.opened == ["5", "5"]
    assert preflight_of_ranks(clips(900), True) == []
    assert preflight_of_ranks(clips(1500), False) == []


def test_other_words_for_check_files_are_refused():
    with pytest.raises(ValueError, match="check_files must be true, false or anew, got 'always'"):
        preflight_of_ranks(clips(1), "always")


@pytest.mark.slow
def test_faults_are_counted_and_not_summed():
    dataset = AudioDataset(ClipSource(clips(100_000), 8000), 80)
    for place in (5, 7, 5):
        dataset.count_fault(place, AudioError(f"/data/{place}", "is not there"))
    assert dataset.num_faults == 2 == int(dataset._faulty.sum())
    dataset._faulty.zero_()  # nothing counts it
    assert dataset.num_faults == 2


def test_processes_that_meet_the_same_faults_at_once_count_each_once():
    dataset = AudioDataset(ClipSource(clips(2000), 8000), 80, max_fault_fraction=1.0)

    def process() -> None:
        for place in range(500):
            dataset.count_fault(place, AudioError(f"/data/{place}", "is not there"))

    workers = [multiprocessing.get_context("fork").Process(target=process) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert dataset.num_faults == 500
