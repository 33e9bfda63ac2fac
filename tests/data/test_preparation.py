"""Published annotation formats and a folder of audio to a manifest and a ledger."""

import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import compose_command, run_command
from hydra.utils import instantiate

import foley.core.config  # noqa: F401
from foley.data.importers.annotations import AnnotationFile
from foley.data.importers.youtube import autoacd_caption, autoacd_key
from foley.data.manifest import ManifestError, read_manifest
from foley.data.preparation import AudioFolder, AudioFolderError, prepare_manifest

VIDEO, OTHER = "7fmOlUlwoNg", "--PJHxphWEs"


@pytest.fixture
def prepare(tmp_path, write_clip):
    """Writes annotation files and empty clips as given, and prepares a data set as the script does."""

    def run(dataset: str, texts: dict[str, str | bytes], audio: list[str], **overrides: str):
        folder = tmp_path / "audio"
        for name in audio:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(write_clip("clip.wav"), folder / name)
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        settings = {"dataset": dataset, "audio_dir": folder, "out": tmp_path / "out", **overrides}
        cfg = compose_command("script/prepare", *(f"{key}={value}" for key, value in settings.items()))
        files = instantiate(cfg.dataset, _convert_="all")
        summary = prepare_manifest(files, folder, tmp_path / "out")
        return summary, lines(tmp_path / "out" / "manifest.jsonl"), lines(tmp_path / "out" / "ledger.jsonl")

    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_audiocaps_rows_are_in_the_manifest_or_in_the_ledger(prepare, tmp_path):
    header = "audiocap_id,youtube_id,start_time,caption\n"
    test = (
        header.encode()
        + f"1,{VIDEO},20,A dog barks\n".encode()  # line 2
        + f"2,{VIDEO},20,A  dog\t barks\n".encode()
        + f"1,{VIDEO},20,Again\n".encode()  # duplicate id
        + f"3,{OTHER},0,No file\n".encode()
        + f"4,{VIDEO},20,\n".encode()  # no caption
        + f"5,{VIDEO},soon,Rain\n".encode()
        + f"6,short,0,Rain\n7,{VIDEO},20,a comma, unquoted\n".encode()
        + f"8,{VIDEO},20,".encode()
        + b"\xff\n"
        + f'9,{VIDEO},20,"open\n10,{VIDEO},20,"A cat"\n11,{VIDEO},20,Last\n'.encode()  # lines 11 and 12 are lost
    )
    summary, manifest, ledger = prepare("audiocaps", {"test.csv": test}, [f"deep/{VIDEO}_20.wav"])
    assert [row["id"] for row in manifest] == ["1", "2", "11"]
    assert manifest[1]["caption"] == "A dog barks"
    assert [(row["line"], row["kind"]) for row in ledger if row["annotations"] == "test.csv"] == [
        (4, "duplicate_id"),
        (5, "no_audio_file"),
        *((line, "bad_row") for line in (6, 7, 8, 9, 10, 11)),
    ]
    assert "lines 11 to 12" in ledger[-1]["reason"]
    assert {row["annotations"]: row["reason"] for row in ledger if row["line"] == 0} == {
        name: "the annotation file does not exist" for name in ("train.csv", "val.csv")
    }
    assert summary["rows"] == summary["kept"] + sum(summary["left_out"].values()) == 13
    entries = read_manifest(tmp_path / "out" / "manifest.jsonl", root=tmp_path / "audio")
    assert all(entry.path.is_file() and entry.duration_seconds == 0.1 for entry in entries)
    assert {entry.split for entry in entries} == {"test"}
    assert all("MIT" in entry.license and VIDEO in entry.source for entry in entries)


def test_the_script_says_what_it_kept(tmp_path, write_clip, caplog):
    os.link(write_clip("clip.wav"), tmp_path / f"{VIDEO}.wav")
    (tmp_path / "vggsound.csv").write_text(f"{VIDEO},30,barking,test\n{OTHER},30,barking,test\n")
    caplog.set_level("INFO")
    run_command("script/prepare", "dataset=vggsound", f"audio_dir={tmp_path}", f"out={tmp_path / 'out'}")
    assert "kept 1 of 2 rows" in caplog.text
    assert "left out, no_audio_file: 1" in caplog.text


def test_longer_shorter_and_silent_clips_are_counted_and_named(tmp_path, caplog):
    lengths = {"a": 2.0, "b": 0.5, "c": 1.0, "d": 3.0}
    for name, seconds in lengths.items():
        level = 0.0 if name == "c" else 0.5
        soundfile.write(tmp_path / f"{name}.wav", np.full(round(8000 * seconds), level), 8000)
    rows = [{"id": n, "caption": "x", "names": [n], "license": "CC0"} for n in lengths]
    files = [AnnotationFile(Path("a.csv"), iter(enumerate(rows, start=2)))]
    summary = prepare_manifest(files, tmp_path, tmp_path / "out", decode=True, duration_seconds=1.0)
    assert [summary[name] for name in ("kept", "longer", "shorter", "silent")] == [4, 2, 1, 1]
    assert "2 clips are longer than 1 s (duration_seconds)" in caplog.text
    assert "their beginning: a, d\n" in caplog.text
    assert [row["id"] for row in lines(tmp_path / "out" / "manifest.jsonl") if row.get("silent")] == ["c"]


def test_a_table_of_ones_own(prepare, tmp_path):
    text = (
        "file_name,text,fold\nbarks/a.wav,a dog,Training\nb.flac,rain,valid\nc.wav,,valid\nd.wav,wind,fold1\n"
        "/from/elsewhere/e.wav,surf,test\n"
    )
    columns = {"path_column": "file_name", "caption_column": "text", "split_column": "fold"}
    options = {f"dataset.{name}": value for name, value in columns.items()}
    table = {"dataset.table": tmp_path / "audio" / "mine.csv", "dataset.license": "CC0", "dataset.absolute_paths": True}
    audio = ["barks/a.wav", "b.wav", "e.wav"]
    _, manifest, ledger = prepare("table", {"mine.csv": text}, audio, **options, **table)
    assert [(row["id"], row["path"], row["split"], row["license"]) for row in manifest] == [
        ("barks/a.wav", "barks/a.wav", "train", "CC0"),
        ("b.flac", "b.wav", "val", "CC0"),
        ("/from/elsewhere/e.wav", "e.wav", "test", "CC0"),
    ]
    assert [(row["line"], row["kind"]) for row in ledger] == [(4, "bad_row"), (5, "bad_row")]
    assert [entry.caption for entry in read_manifest(tmp_path / "out" / "manifest.jsonl")] == ["a dog", "rain", "surf"]


def test_audioset_segments_and_strong_labels(prepare):
    weak = "# Segments csv\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n" + "".join(
        f'{key}, 30.000, 40.000, "/m/09x0r,/m/0bt9lr"\n' for key in (VIDEO, OTHER)
    )
    strong = (
        "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\n"
        f"{VIDEO}_30000\t2.0\t4.0\t/m/09x0r\n{VIDEO}_30000\t0.5\t1.2\t/m/0bt9lr\n{VIDEO}_30000\tx\t1.2\t/m/0bt9lr\n"
        f"{VIDEO}\t0\t1\t/m/09x0r\n"
    )
    names = {
        "class_labels_indices.csv": 'index,mid,display_name\n0,/m/09x0r,"Speech"\n',
        "mid_to_display_name.tsv": "/m/0bt9lr\tDog\n",
    }
    texts = {"balanced_train_segments.csv": weak, "audioset_eval_strong.tsv": strong, **names}
    summary, manifest, ledger = prepare("audioset", texts, [f"Y{VIDEO}.wav", f"{OTHER}_30.wav"])
    described, labelled = manifest
    assert described["id"] == f"{VIDEO}_30000"
    assert described["caption"] == "dog 0.5-1.2 s; then speech 2.0-4.0 s"
    assert described["events"] == [[0.5, 1.2, "Dog"], [2.0, 4.0, "Speech"]]
    assert (described["split"], labelled["split"]) == ("test", "train")
    assert (labelled["caption"], labelled["start_seconds"]) == ("Speech, Dog", 30.0)
    assert [row["line"] for row in ledger if row["annotations"] == "audioset_eval_strong.tsv"] == [4, 5]
    weak_rows = [(row["line"], row["kind"]) for row in ledger if row["annotations"] == "balanced_train_segments.csv"]
    assert weak_rows == [(4, "duplicate_id")]
    assert summary["rows"] == summary["kept"] + sum(summary["left_out"].values())
    assert summary["licenses"] == {"labels CC BY 4.0; audio of the video's uploader (YouTube)": 2}


def test_audioset_without_class_names_is_refused(prepare):
    with pytest.raises(ManifestError, match=r"class_labels_indices\.csv"):
        prepare("audioset", {}, ["a.wav"])


def test_vggsound_has_no_header(prepare):
    text = f'{VIDEO},30,"barking, dog",test\n{OTHER},0,playing timpani,train\n'
    _, manifest, ledger = prepare("vggsound", {"vggsound.csv": text}, [f"{VIDEO}_000030.wav"])
    assert [(row["label"], row["caption"], row["split"]) for row in manifest] == [("barking, dog",) * 2 + ("test",)]
    assert [(row["line"], row["kind"]) for row in ledger] == [(2, "no_audio_file")]


@pytest.mark.parametrize(("dataset", "name"), [("vggsound", "vggsound.csv"), ("audiocaps", "train.csv")])
def test_a_byte_order_mark_is_refused_with_its_line(prepare, tmp_path, dataset, name):
    with pytest.raises(ManifestError, match=rf"{name}, line 1: starts with a byte-order mark"):
        prepare(dataset, {name: f"\ufeff{VIDEO},30,barking,test\n"}, [f"{VIDEO}_30.wav"])
    assert not list((tmp_path / "out").iterdir())


def test_autoacd(prepare):
    text = (
        f"youtube_id,caption\nY{OTHER},A dog barks.\n{VIDEO}_000030,Rain falls.\n{VIDEO},x\n"
        f'Y{VIDEO},"The caption could be: ""A car idles."""\n'
    )
    _, manifest, ledger = prepare("autoacd", {"train.csv": text}, [f"Y{OTHER}.wav", f"{VIDEO}_000030.wav"])
    assert [(row["id"], row["caption"]) for row in manifest] == [
        (f"Y{OTHER}", "A dog barks."),
        (f"{VIDEO}_000030", "Rain falls."),
    ]
    assert [row["line"] for row in ledger] == [4, 5, 0]
    assert autoacd_caption('It could be: "A car idles."') == "A car idles."
    assert autoacd_key("Yabcdefghij_000030") == ("Yabcdefghij", "000030")
    assert autoacd_key("Yabcdefghij_") == ("abcdefghij_", None)


def test_musiccaps(prepare):
    header = (
        "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval"
    )
    text = f'{header}\n{VIDEO},30,40,"/m/04rlf,/m/0x","[\'pop\', \'low\']","A song,\nplayed",4,False,True\n'
    _, manifest, _ = prepare("musiccaps", {"musiccaps-public.csv": text}, [f"[{VIDEO}]-[30-40].wav"])
    assert [(row["id"], row["caption"], row["split"]) for row in manifest] == [
        (f"{VIDEO}_30000", "A song, played", "test")
    ]


def test_clotho_has_five_captions_and_a_licence_for_each_sound(prepare):
    captions = "file_name," + ",".join(f"caption_{n}" for n in range(1, 6)) + "\n"
    metadata = "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\n"
    texts = {
        "clotho_captions_development.csv": captions + "Rain 1.5.wav,a,b,c,d,e\n",
        "clotho_captions_evaluation.csv": captions + "Rain 1.5.wav,f,g,h,i,\n",
        "clotho_metadata_development.csv": (
            metadata + 'Rain 1.5.wav,rain;wet,12,https://freesound.org/s/12,"[0, 9]",José,http://cc/by/3.0/\n'
        ).encode("cp1252"),
    }
    audio = ["development/Rain 1.5.wav", "evaluation/Rain 1.5.wav"]
    summary, manifest, ledger = prepare("clotho", texts, audio)
    assert [row["caption"] for row in manifest] == list("abcdefghi")
    assert [row["path"] for row in manifest] == ["development/Rain 1.5.wav"] * 5 + ["evaluation/Rain 1.5.wav"] * 4
    assert manifest[0]["id"] == "development/Rain 1.5.wav#1"
    assert manifest[0]["license"] == "http://cc/by/3.0/"
    assert manifest[0]["source"] == "Clotho: José, https://freesound.org/s/12"
    assert "licence of the sound not given" in manifest[5]["license"]
    assert Counter(row["reason"] for row in ledger) == {
        "`caption` is empty": 1,
        "the annotation file does not exist": 1,
    }
    assert summary["kept"] == 9


def test_wavcaps_collections_share_ids(prepare):
    def collection(*entries: dict) -> str:
        return json.dumps({"num_captions_per_audio": 1, "data": list(entries)})

    entry = {"id": "12", "caption": "A bell rings.", "duration": 1.0, "href": "https://x/12", "author": "Ann"}
    texts = {
        "SoundBible/sb_final.json": collection(entry, {"caption": "no id"}, entry | {"id": "13", "caption": None}),
        "FreeSound/fsd_final.json": collection(entry | {"caption": "Rain."}),
        "AudioSet_SL/as_final.json": collection({"id": f"Y{VIDEO}.wav", "caption": "A dog."}),
    }
    audio = ["SoundBible/12.wav", "SoundBible/13.wav", "FreeSound/12.wav", f"AudioSet_SL_flac/Y{VIDEO}.wav"]
    _, manifest, ledger = prepare("wavcaps", texts, audio)
    assert {row["id"]: row["path"] for row in manifest} == {
        f"AudioSet_SL/Y{VIDEO}": f"AudioSet_SL_flac/Y{VIDEO}.wav",
        "FreeSound/12": "FreeSound/12.wav",
        "SoundBible/12": "SoundBible/12.wav",
    }
    assert "SoundBible" in manifest[2]["license"]
    assert manifest[2]["source"] == "WavCaps (SoundBible), Ann, https://x/12"
    assert [(row["line"], row["kind"]) for row in ledger] == [(0, "bad_row"), (2, "bad_row"), (3, "bad_row")]


def test_wavcaps_json_that_cannot_be_read_is_refused(prepare):
    with pytest.raises(ManifestError, match=r"as_final\.json: not valid UTF-8 JSON"):
        prepare("wavcaps", {"AudioSet_SL/as_final.json": "{"}, ["a.wav"])


def test_song_describer(prepare):
    header = "caption_id,track_id,caption,is_valid_subset,familiarity,artist_id,album_id,path,duration"
    texts = {
        "song_describer.csv": f"{header}\n1,948,A guitar.,True,0,1,2,48/948.mp3,200\n"
        "2,949,x,False,0,1,2,49/949.mp3,9\n",
        "audio_licenses.txt": "48/948.mp3\nSong by Artist\nCreative Commons: http://cc/by/3.0/\n\n",
    }
    audio = ["audio/48/948.2min.wav", "audio/49/949.2min.wav"]
    _, manifest, ledger = prepare("song_describer", texts, audio, **{"dataset.only_valid": "true"})
    assert [(row["license"], row["source"]) for row in manifest] == [
        ("Creative Commons: http://cc/by/3.0/", "Song Describer: Song by Artist")
    ]
    assert [row["line"] for row in ledger] == [3]


def test_names_of_audio_files(tmp_path):
    for name in ("a/x.wav", "b/x.flac", "b/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = AudioFolder(tmp_path)
    assert len(folder) == 2
    assert folder.find(["z", "b/x"]) == "b/x.flac"
    with pytest.raises(AudioFolderError, match="2 files are named 'x'"):
        folder.find(["x"])
    with pytest.raises(AudioFolderError, match="no audio file is named 'y' or ''"):
        folder.find(["y", ""])


def test_unusable_audio_and_nothing_kept(tmp_path, write_clip):
    (tmp_path / "empty.wav").touch()
    rows = [(2, {"id": "1", "caption": "x", "names": ["empty"], "license": ""})]
    with pytest.raises(ManifestError, match=r"none of 1 rows can be used: .*ledger\.jsonl says why"):
        prepare_manifest([AnnotationFile(tmp_path / "a.csv", iter(rows))], tmp_path, tmp_path / "out")
    assert lines(tmp_path / "out" / "ledger.jsonl")[0]["kind"] == "unusable_audio"
    assert not list((tmp_path / "out").glob(".*"))


def generated_rows(count: int):
    """Every 20th row is faulty, in one of four ways."""
    faults = [{"caption": " "}, {"names": ["absent"]}, {"id": "1"}, {"names": ["empty"]}]
    for number in range(1, count + 1):
        good = {"id": str(number), "caption": "a dog barks", "names": ["clip"], "license": "CC0"}
        yield number, good | faults[number // 20 % 4] if number % 20 == 0 else good


def prepare_generated(folder: Path, count: int) -> dict:
    return prepare_manifest([AnnotationFile(folder / "generated.csv", generated_rows(count))], folder, folder / "out")


@pytest.mark.slow
def test_ten_thousand_rows_of_which_every_twentieth_is_faulty(tmp_path, write_clip):
    write_clip("clip.wav")
    (tmp_path / "empty.wav").touch()
    summary = prepare_generated(tmp_path, 10_000)
    assert (summary["rows"], summary["kept"]) == (10_000, 9_500)
    assert summary["left_out"] == dict.fromkeys(("no_audio_file", "duplicate_id", "unusable_audio", "bad_row"), 125)
    assert len(read_manifest(tmp_path / "out" / "manifest.jsonl", root=tmp_path)) == 9_500
    assert len(lines(tmp_path / "out" / "ledger.jsonl")) == 500


@pytest.mark.slow
def test_memory_grows_by_the_ids_alone(tmp_path, write_clip):
    write_clip("clip.wav")
    (tmp_path / "empty.wav").touch()
    peaks = []
    for count in (200, 2000):
        tracemalloc.start()
        prepare_generated(tmp_path, count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # An id and where it was used take about 200 bytes; a row of the manifest would take more than 1,000.
    assert peaks[1] - peaks[0] < 1800 * 300
