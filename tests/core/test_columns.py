"""Tables in columns come back as they were written, mapped and not copied; damage is named."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foley.core.columns import Columns, TextLists, Texts, write_columns
from foley.core.files import write_tensors
from foley.core.ranges import RangeReader
from foley.core.reading import DamagedFileError

WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=12)


@given(WORDS, WORDS, st.data())
def test_texts_are_a_sequence_of_what_went_in(words: list[str], others: list[str], data: st.DataObject) -> None:
    texts = Texts.of(words)
    assert list(texts) == words
    assert texts[1:] == words[1:]
    assert list(Texts.join([texts, Texts.of(others), Texts.of([])])) == words + others
    rows = data.draw(st.lists(st.integers(0, len(words) - 1), max_size=5)) if words else []
    assert list(texts.take(np.array(rows, np.int64))) == [words[row] for row in rows]
    for beginning in (*words, "", "a"):
        assert texts.start_with(beginning).tolist() == [word.startswith(beginning) for word in words]


@given(st.lists(WORDS, max_size=5))
def test_lists_of_texts_too(lists: list[list[str]]) -> None:
    assert [list(row) for row in TextLists.of(lists)] == lists


def test_a_table_is_written_and_mapped(tmp_path: Path) -> None:
    columns = {"frames": np.arange(3), "id": Texts.of("abc"), "more": TextLists.of([["x"], [], ["y", "z"]])}
    write_columns(tmp_path / "table", columns, {"format": "of a test"})
    table = pickle.loads(pickle.dumps(Columns(tmp_path / "table")))
    assert table.metadata == {"format": "of a test"}
    assert table.numbers("frames").tolist() == [0, 1, 2]
    assert list(table.texts("id")) == ["a", "b", "c"]
    assert list(table.lists("more")) == [("x",), (), ("y", "z")]
    write_columns(tmp_path / "again", {"frames": table.numbers("frames"), "id": table.texts("id")})
    assert list(Columns(tmp_path / "again").texts("id")) == ["a", "b", "c"]


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    write_columns(tmp_path / "table", {"id": Texts.of([]), "frames": np.empty(0, np.int32)})
    assert len(Columns(tmp_path / "table").texts("id")) == 0


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'id': 2"):
        write_columns(tmp_path / "table", {"id": Texts.of("ab"), "frames": np.arange(3)})


def test_damage_names_the_file(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "table"
    write_columns(path, {"id": Texts.of("ab")})
    with pytest.raises(DamagedFileError, match=r"table.*'frames'"):
        Columns(path).numbers("frames")
    for ends in ([1, 3], [2, 1], [-1, 2]):
        write_tensors(path, {"id.utf8": torch.zeros(2, dtype=torch.uint8), "id.ends": torch.tensor(ends)})
        with pytest.raises(DamagedFileError, match=r"id\.ends"):
            Columns(path).texts("id")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DamagedFileError, match="table"):
        Columns(path)


def test_ranges_of_a_disk_and_of_a_url_are_the_same(tmp_path: Path) -> None:
    import fsspec

    content = np.random.default_rng(0).bytes(1000)
    (tmp_path / "file").write_bytes(content)
    fsspec.filesystem("memory").pipe_file("/ranges/file", content)
    for reader in (RangeReader(str(tmp_path)), RangeReader("memory://ranges")):
        again = pickle.loads(pickle.dumps(reader))
        for offset, size in ((0, 1000), (10, 5), (999, 1), (3, 0)):
            assert reader.read("file", offset, size) == again.read("file", offset, size) == content[offset:][:size]
        with pytest.raises(EOFError, match="ends early: 1 of 2 bytes from 999"):
            reader.read("file", 999, 2)
    with pytest.raises(FileNotFoundError):
        RangeReader(str(tmp_path)).read("other", 0, 1)


def test_more_files_than_stay_open(tmp_path: Path) -> None:
    reader = RangeReader(str(tmp_path))
    for number in range(100):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    for number in (*range(100), *range(100)):
        assert reader.read(str(number), 0, 1) == bytes([number])
