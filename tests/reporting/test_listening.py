"""Listening tests: the page in a real browser, and what is made of its results."""

import csv
import json
import re

import numpy as np
import pytest
import soundfile
from commands import run_command

from foley.reporting.listening import (
    ANCHOR,
    PROTOCOLS,
    REFERENCE,
    Stimulus,
    low_pass,
    plot_scores,
    read_ratings,
    score_systems,
    unreliable_listeners,
    write_test,
)

RATE, SECONDS = 16_000, 0.25
CAPTIONS = ['</script><b>a "dog", barks</b>\n🐕', "rain"]


def tones(*hertz: float) -> np.ndarray:
    time = np.arange(int(SECONDS * RATE)) / RATE
    return sum(0.2 * np.sin(2 * np.pi * frequency * time) for frequency in hertz)[:, None]


@pytest.fixture
def stimuli() -> list[Stimulus]:
    found = []
    for item, caption in enumerate(CAPTIONS):
        recording = Stimulus(REFERENCE, f"clip{item}", caption, tones(500, 6000), RATE)
        found += [recording, low_pass(recording, 3500)]
        found += [Stimulus(name, f"clip{item}", caption, tones(800 + item), RATE) for name in ("ours", "theirs")]
    return found


def listen(browser, page_file, listener: str, directory, stop_after: int | None = None, state=None):
    """Go through the test as a listener does, rating by the stimulus alone; the order, the results, and the storage."""
    context = browser.new_context(accept_downloads=True, storage_state=state)
    requests = []
    context.on("request", lambda request: requests.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(page_file.as_uri())
    page.fill("#listener", listener)
    page.click("#start button")
    order = []
    while page.is_visible("#trial") and len(order) != stop_after:
        assert page.is_disabled("#next")
        code = page.get_attribute("#player", "data-code")
        order.append((code, page.inner_text("#caption"), page.evaluate("$('player').duration || 0")))
        page.evaluate("$('player').play()")
        rating = 20 * (1 + int(code, 16) % 5)
        page.check(f"#mos_q input[value='{rating}']")
        page.check(f"#mos_f input[value='{120 - rating}']")
        page.wait_for_selector("#next:not([disabled])")
        order[-1] = (*order[-1][:2], page.evaluate("$('player').duration"))
        page.click("#next")
    file = None
    if stop_after is None:
        with page.expect_download() as download:
            page.click("#download")
        file = directory / download.value.suggested_filename
        download.value.save_as(file)
    assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)
    return order, file


@pytest.mark.slow
def test_listeners_go_through_the_page(browser, stimuli, tmp_path):
    page = write_test(tmp_path, "Which dog?", stimuli, seed=1)
    key = json.loads((tmp_path / "key.json").read_text(encoding="utf-8"))
    first, first_file = listen(browser, page, "Ann, 1", tmp_path)
    second, second_file = listen(browser, page, "Bob", tmp_path)
    again, _ = listen(browser, page, "Ann, 1", tmp_path, stop_after=3)
    assert sorted(code for code, *_ in first) == sorted(key["stimuli"])
    assert first != second
    assert again == first[:3]
    captions = dict(zip(("clip0", "clip1"), CAPTIONS, strict=True))
    for code, caption, seconds in first:
        assert caption == captions[key["stimuli"][code]["item"]]
        assert seconds == pytest.approx(SECONDS, abs=0.01)
    with first_file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["stimulus"] for row in rows] == [code for code, *_ in first]
    assert {row["listener"] for row in rows} == {"Ann, 1"}
    ratings = read_ratings([first_file, second_file], tmp_path / "key.json")
    assert ratings.listeners == ["Ann, 1", "Bob"]
    for code, place in key["stimuli"].items():
        index = ratings.items.index(place["item"]), ratings.systems.index(place["system"])
        assert ratings.values["mos_q"][0][index] == 20 * (1 + int(code, 16) % 5)
        assert ratings.values["mos_q"][1][index] + ratings.values["mos_f"][1][index] == 120


def test_a_closed_page_goes_on(browser, stimuli, tmp_path):
    page_file = write_test(tmp_path, "Which dog?", stimuli, seed=1)
    page = browser.new_page()
    for _ in range(2):
        page.goto(page_file.as_uri())
        page.fill("#listener", "Ann")
        page.click("#start button")
        done = page.evaluate("results.length")
        page.evaluate("results.push({stimulus: order[results.length].code}); stored(results); show()")
    assert done == 1


def test_the_page_is_blind_and_whole(stimuli, tmp_path):
    text = write_test(tmp_path, "Which dog?", stimuli, seed=1).read_text(encoding="utf-8")
    markup = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    for secret in ("ours", "theirs", REFERENCE, ANCHOR, "clip0"):
        assert secret not in markup
    assert not re.findall(r"https?:", markup)
    assert text.count("</script>") == 1
    codes = re.findall(r'"code": "(\w+)"', markup)
    assert codes == sorted(codes)
    assert len(set(codes)) == len(stimuli)


def test_the_anchor_has_lost_its_treble_only(stimuli):
    recording, anchor = stimuli[:2]
    spectra = [np.abs(np.fft.rfft(s.samples[:, 0] * np.hanning(len(s.samples)))) for s in (recording, anchor)]
    low, high = (round(hertz * SECONDS) for hertz in (500, 6000))
    assert spectra[1][low] == pytest.approx(spectra[0][low], rel=0.05)
    assert spectra[1][high] < 1e-2 * spectra[0][high]
    with pytest.raises(ValueError, match="must lie below 8000 Hz"):
        low_pass(recording, 8000)


def test_every_system_must_have_every_item(stimuli, tmp_path):
    with pytest.raises(ValueError, match=r"1 clips are missing, such as \[\('theirs', 'clip1'\)\]"):
        write_test(tmp_path, "", stimuli[:-1], seed=1)
    with pytest.raises(ValueError, match="two clips of one item"):
        write_test(tmp_path, "", [*stimuli, stimuli[0]], seed=1)


def write_results(directory, values):
    """A key and result files of ratings `values[listener][system][item]`, the same for both questions."""
    systems = [REFERENCE, ANCHOR, "ours"]
    key = {f"{s}{i}": {"system": s, "item": f"i{i}"} for s in systems for i in range(values.shape[2])}
    (directory / "key.json").write_text(json.dumps({"test": "t", "stimuli": key}))
    for listener, rows in enumerate(values):
        lines = [
            f"t,l{listener:02d},1,{systems[s]}{i},{rating},{rating}"
            for s, row in enumerate(rows)
            for i, rating in enumerate(row)
        ]
        text = "\n".join(["test,listener,trial,stimulus,mos_q,mos_f", *lines])
        (directory / f"{listener:02d}.csv").write_text(text)
    return sorted(directory.glob("*.csv")), directory / "key.json"


def test_scores_have_the_intervals_of_the_textbook(tmp_path):
    values = np.zeros((3, 3, 2), dtype=int)
    values[:, 0], values[:, 1] = 100, 20
    values[:, 2] = [[40, 40], [60, 60], [80, 80]]
    ratings = read_ratings(*write_results(tmp_path, values))
    assert unreliable_listeners(ratings) == []
    scores = score_systems(ratings, "t")
    assert list(scores) == [REFERENCE, "ours", ANCHOR]
    ours = scores["ours"]["mos_q"]
    # Half of it is the quantile of t with two degrees of freedom times the standard error.
    assert (ours.mean, ours.n) == (60, 6)
    assert ours.high - 60 == pytest.approx(4.302653 * 20 / 3**0.5, rel=1e-6)
    assert ours.low + ours.high == pytest.approx(120)
    certain = scores[ANCHOR]["mos_f"]
    assert (certain.low, certain.mean, certain.high) == (20, 20, 20)
    plot_scores(scores, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.slow
def test_the_bootstrap_covers_the_truth(tmp_path):
    """Listeners and items both vary: 95 % intervals hold the true mean in most of many tests."""
    draw, covered, trials = np.random.default_rng(0), 0, 40
    for trial in range(trials):
        folder = tmp_path / str(trial)
        folder.mkdir()
        truth = 60 + 8 * draw.standard_normal((12, 1, 1)) + 8 * draw.standard_normal((1, 1, 12))
        noisy = np.broadcast_to(truth + 10 * draw.standard_normal((12, 3, 12)), (12, 3, 12))
        ratings = read_ratings(*write_results(folder, np.clip(np.rint(noisy / 20) * 20, 20, 100).astype(int)))
        score = score_systems(ratings, "bootstrap", seed=trial)["ours"]["mos_q"]
        covered += score.low <= 60 <= score.high
    assert 0.85 * trials <= covered <= trials


def test_listeners_who_hear_no_anchor_are_named(tmp_path):
    values = np.full((2, 3, 2), 60)
    values[0, 0] = 80
    ratings = read_ratings(*write_results(tmp_path, values))
    assert unreliable_listeners(ratings) == ["l01"]
    assert ratings.only(["l00"]).values["mos_q"].shape == (1, 2, 3)
    with pytest.raises(ValueError, match="two listeners"):
        score_systems(ratings.only(["l00"]))
    with pytest.raises(ValueError, match="interval=guess"):
        score_systems(ratings, "guess")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("other,l,1,ours0,60,60", "line 2: not of the test t"),
        ("t,l,1,ours9,60,60", "line 2: not of the test t"),
        ("t,l,1,ours0,55,60", "line 2: ratings must be of"),
        ("t,l00,1,ours0,60,60", "line 2: l00 has rated ours0 before"),
    ],
)
def test_results_that_do_not_fit_are_refused(tmp_path, line, message):
    files, key = write_results(tmp_path, np.full((1, 3, 1), 60))
    bad = tmp_path / "99.csv"
    bad.write_text(f"test,listener,trial,stimulus,mos_q,mos_f\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_ratings([*files, bad], key)


@pytest.mark.parametrize(
    ("name", "levels", "titles"),
    [
        ("ezaudio", [1, 2, 3, 4, 5], ["OVL", "REL"]),
        ("audiolcm", [20, 40, 60, 80, 100], ["MOS-Q", "MOS-F"]),
        ("audiocache", [20, 40, 60, 80, 100], ["MOS-Q", "MOS-F"]),
    ],
)
def test_the_scales_are_the_papers(name, levels, titles):
    protocol = PROTOCOLS[name]
    assert list(protocol.scale) == levels
    assert [title.partition(",")[0] for title in protocol.questions.values()] == titles


def test_each_protocol_has_its_own_page_key_and_ratings(stimuli, tmp_path):
    page = write_test(tmp_path, "Which dog?", stimuli, seed=1, protocol=PROTOCOLS["ezaudio"])
    scale = re.search(r'"scale": ({[^}]*})', page.read_text(encoding="utf-8"))[1]
    assert json.loads(scale) == {"1": "Bad", "2": "Poor", "3": "Fair", "4": "Good", "5": "Excellent"}
    key = json.loads((tmp_path / "key.json").read_text(encoding="utf-8"))
    lines = ["test,listener,trial,stimulus,mos_q,mos_f"]
    lines += [f"{key['test']},{name},1,{code},4,5" for name in ("ann", "bob") for code in key["stimuli"]]
    (tmp_path / "rated.csv").write_text("\n".join(lines))
    ratings = read_ratings([tmp_path / "rated.csv"], tmp_path / "key.json")
    assert (ratings.protocol, ratings.only(["ann"]).protocol) == (PROTOCOLS["ezaudio"],) * 2
    scores = score_systems(ratings)
    assert {(row["mos_q"].mean, row["mos_f"].mean) for row in scores.values()} == {(4, 5)}
    (tmp_path / "rated.csv").write_text("\n".join(lines).replace(",4,5", ",80,100"))
    with pytest.raises(ValueError, match=r"must be of \[1, 2, 3, 4, 5\] \(ezaudio\)"):
        read_ratings([tmp_path / "rated.csv"], tmp_path / "key.json")


def test_a_listener_begins_anew_under_another_protocol(stimuli, tmp_path):
    for name in PROTOCOLS:  # what a browser keeps of a test goes by the test's name
        write_test(tmp_path / name, "Which dog?", stimuli, seed=1, protocol=PROTOCOLS[name])
    names = {json.loads((tmp_path / name / "key.json").read_text(encoding="utf-8"))["test"] for name in PROTOCOLS}
    assert len(names) == len(PROTOCOLS)


def test_from_folders_to_a_table(tmp_path):
    for folder in ("ours", "theirs", "real"):
        (tmp_path / folder).mkdir()
        for item in range(4):
            soundfile.write(tmp_path / folder / f"{folder}{item}.wav", tones(500 + item, 6000), RATE)
            facts = {"id": f"i{item}", **({"prompt": f"sound {item}"} if folder != "real" else {})}
            (tmp_path / folder / f"{folder}{item}.json").write_text(json.dumps(facts))
    places = f"systems={{ours: {tmp_path}/ours, theirs: {tmp_path}/theirs}}"
    test = [places, f"reference={tmp_path / 'real'}", f"output_dir={tmp_path / 'test'}"]
    run_command("script/listening_test", *test, "num_items=3")
    key = json.loads((tmp_path / "test/key.json").read_text())
    assert len({stimulus["item"] for stimulus in key["stimuli"].values()}) == 3
    assert {stimulus["system"] for stimulus in key["stimuli"].values()} == {"ours", "theirs", REFERENCE, ANCHOR}
    with pytest.raises(ValueError, match="only 4 ids in common"):
        run_command("script/listening_test", *test, "num_items=5")
    with pytest.raises(ValueError, match="mos_protocol=likert must be one of ezaudio, audiolcm, audiocache"):
        run_command("script/listening_test", *test, "mos_protocol=likert")

    (tmp_path / "results").mkdir()
    quality = {"ours": 80, "theirs": 60, REFERENCE: 100, ANCHOR: 20}
    for listener in ("ann", "bob"):
        rows = [f"{key['test']},{listener},1,{c},{quality[s['system']]},60" for c, s in key["stimuli"].items()]
        text = "\n".join(["test,listener,trial,stimulus,mos_q,mos_f", *rows])
        (tmp_path / f"results/{listener}.csv").write_text(text)
    given = [f"results={tmp_path / 'results'}", f"key={tmp_path / 'test/key.json'}", f"output_dir={tmp_path / 'out'}"]
    run_command("script/analyse_listening_test", *given)
    written = json.loads((tmp_path / "out/listening.json").read_text())
    assert (written["protocol"], written["scale"]) == ("audiocache", [20, 40, 60, 80, 100])
    scores = written["scores"]
    assert [(name, row["mos_q"]["mean"]) for name, row in scores.items()] == [
        *((REFERENCE, 100), ("ours", 80), ("theirs", 60), (ANCHOR, 20))
    ]
    assert "| ours | 80.00 [80.00, 80.00] | 60.00 [60.00, 60.00] | 6 |" in (tmp_path / "out/listening.md").read_text()
    assert (tmp_path / "out/listening.png").is_file()
