"""Results on disk, torn and mended."""

import pytest

from foley.data.annotating import Journal, JournalError, read_journals


def test_ranks_append_to_files_of_their_own(tmp_path):
    for rank, text in ((1, "b"), (0, "é")):
        journal = Journal(tmp_path, "results", rank)
        journal.append([{"id": text}, {"id": text * 2}])
        journal.close()
    assert [result["id"] for result in read_journals(tmp_path, "results")] == ["é", "éé", "b", "bb"]


@pytest.mark.parametrize("torn", ['{"id": "2', '{"id": "2"}', "\x00\x00"])
def test_a_torn_last_line_is_passed_over_and_cut_off(torn, tmp_path):
    path = tmp_path / "results-rank0000.jsonl"
    path.write_text('{"id": "1"}\n' + torn)
    assert [result["id"] for result in read_journals(tmp_path, "results")] == ["1"]
    Journal(tmp_path, "results", 0).append([{"id": "3"}])
    assert path.read_text() == '{"id": "1"}\n{"id": "3"}\n'


def test_a_file_that_is_all_one_torn_line(tmp_path):
    (tmp_path / "results-rank0000.jsonl").write_text('{"id')
    Journal(tmp_path, "results", 0).append([{"id": "3"}])
    assert [result["id"] for result in read_journals(tmp_path, "results")] == ["3"]


def test_damage_in_the_middle_is_named(tmp_path):
    (tmp_path / "results-rank0002.jsonl").write_text('{"id": "1"}\n{"id\n{"id": "3"}\n')
    with pytest.raises(JournalError, match=r"results-rank0002\.jsonl, line 2"):
        list(read_journals(tmp_path, "results"))


@pytest.mark.parametrize(
    ("line", "message"),
    [("[1]", "expected a JSON object, got list"), ("{}", r"lacks \['id'\]"), ("[" * 100_000, "nested too deeply")],
)
def test_results_of_another_shape_are_named(tmp_path, line, message):
    (tmp_path / "results-rank0000.jsonl").write_text(f'{{"id": "1"}}\n{line}\n')
    with pytest.raises(JournalError, match=rf"results-rank0000\.jsonl, line 2: .*{message}"):
        list(read_journals(tmp_path, "results", ["id"]))
