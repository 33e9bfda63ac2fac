"""Auto-ACD's captions for clips that are here."""

import pytest

from foley.data.annotating import Fault
from foley.data.captioning.autoacd import AutoAcdCaptioner

VIDEO, OTHER = "7fmOlUlwoNg", "--PJHxphWEs"


@pytest.fixture
def captioner(tmp_path) -> AutoAcdCaptioner:
    (tmp_path / "train.csv").write_text(
        f'youtube_id,caption\nY{OTHER},"It could be: ""A dog barks."""\n{VIDEO}_000030,Rain falls.\n'
        f"broken,x\n{VIDEO}_000040\nY{VIDEO},A car.\n"
    )
    return AutoAcdCaptioner([str(tmp_path / "train.csv")])


def row(video: str, start: float, source: str) -> dict:
    return {"id": "1", "youtube_id": video, "start_seconds": start, "source": f"{source}, https://youtu.be/{video}"}


def test_clips_of_both_sets_find_their_own_caption(captioner):
    asked = [row(OTHER, 10.0, "AudioSet"), row(VIDEO, 30.0, "VGGSound"), row(VIDEO, 70.0, "AudioSet")]
    results = captioner.annotate(asked)
    assert [result["caption"] for result in results] == ["A dog barks.", "Rain falls.", "A car."]
    assert {result["source"] for result in results} == {"autoacd"}
    assert len(results[0]["annotations_sha256"]) == 64


def test_clips_without_a_caption_are_faults(captioner):
    vggsound, plain = captioner.annotate([row(VIDEO, 70.0, "VGGSound"), {"id": "2", "path": "a.wav"}])
    assert vggsound == Fault(f"Auto-ACD has no caption of {VIDEO} at 70 s")
    assert isinstance(plain, Fault)


def test_rows_that_cannot_be_read_are_listed_with_their_line(tmp_path, caplog):
    (tmp_path / "train.csv").write_text(f"youtube_id,caption\nY{OTHER},A dog.\nbroken,x\n{VIDEO}_000040\n")
    AutoAcdCaptioner([str(tmp_path / "train.csv")])
    assert "2 rows cannot be read" in caplog.text
    assert "line 3: 'broken' is neither" in caplog.text
    assert "line 4: has 1 cells where there are 2" in caplog.text
