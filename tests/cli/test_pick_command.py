"""``memwatch pick``: a folder that training takes, a page, exit codes; the training set is only read."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from support.browser import needs_chromium, opened
from support.picked import photo, save_folder, with_logo

from memwatch.cli import main
from memwatch.measure.probes import as_probes


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """70 images with captions: six of them the same, and one caption that is markup."""
    pictures = {f"{i:02d}.png": with_logo(photo(i)) if i in (20, 21, 22) else photo(i) for i in range(64)}
    pictures |= {f"again/{i}.png": photo(3) for i in range(6)}
    captions = {name: f"a photo of number {i}" for i, name in enumerate(pictures)}
    return save_folder(tmp_path_factory.mktemp("pick") / "train", pictures, captions | {"03.png": "a <b>bold</b> one"})


@pytest.fixture(scope="module")
def watched(train):
    """What is picked from it, with the page."""
    out = train.parent / "watch"
    assert main(["pick", str(train), "--out", str(out), "--probes", "12"]) == 0
    return out


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_folder_is_what_training_takes(watched, train):
    saved = json.loads((watched / "choice.json").read_text(encoding="utf-8"))
    assert (saved["rows"], saved["budget"], len(saved["picked"])) == (70, 12, 12)
    assert saved["source"] == str(train)
    assert saved["mix"]["duplicates"] >= 1
    assert sum(saved["mix"].values()) == 12
    for part, key in (("probes", "picked"), ("controls", "held_out"), ("peers", "peers")):
        probes = as_probes(watched / part)
        lines = [json.loads(line) for line in (watched / part / "metadata.jsonl").read_text().splitlines()]
        assert [line["row"] for line in lines] == [entry["row"] for entry in saved[key]]
        for probe, entry in zip(probes, saved[key], strict=True):
            assert probe.image.read_bytes() == (train / entry["name"]).read_bytes()
        assert probes[0].prompt.startswith("a ")
    (group,) = [entry["group"] for entry in saved["picked"] if entry["why"] == "duplicates"]
    assert group["size"] == 7
    assert not {entry["row"] for entry in saved["held_out"]} & set(group["rows"])


def test_it_is_renewed_and_what_others_put_there_stays(train, tmp_path, capsys):
    out = tmp_path / "watch"
    command = ["pick", str(train), "--out", str(out)]
    assert main([*command, "--probes", "16"]) == 0
    (out / "probes" / "mine.png").write_bytes(b"mine")
    before = contents(train)
    assert main([*command, "--probes", "4", "--hold-out", "0", "--peers", "0"]) == 0
    pictures = {file.name for file in (out / "probes").glob("*.png")}
    assert len(pictures) == 5
    assert "mine.png" in pictures
    assert not list((out / "controls").glob("*"))
    assert "pick.hold_out is 0, so that there are no controls" in capsys.readouterr().out
    assert contents(train) == before


def test_the_same_command_gives_the_same_files(train, watched, tmp_path):
    assert main(["pick", str(train), "--out", str(tmp_path / "watch"), "--probes", "12"]) == 0
    assert contents(watched) == contents(tmp_path / "watch")


def test_a_folder_of_controls_takes_the_place_of_rows_held_out(train, tmp_path, capsys):
    controls = save_folder(tmp_path / "own", {f"{i}.png": photo(1000 + i) for i in range(10)} | {"seen.png": photo(3)})
    command = ["pick", str(train), "--out", str(tmp_path / "watch"), "--controls", str(controls)]
    assert main(command) == 0
    assert len(as_probes(tmp_path / "watch" / "controls")) == 10
    assert json.loads((tmp_path / "watch" / "choice.json").read_text())["held_out"] == []
    assert "1 of 11 given controls left out" in capsys.readouterr().out


def test_rows_that_cannot_be_read_are_named(tmp_path, capsys):
    train = save_folder(tmp_path / "train", {f"{i}.png": photo(i) for i in range(5)})
    (train / "broken.png").write_bytes(b"no picture")
    assert main(["pick", str(train), "--out", str(tmp_path / "watch")]) == 1
    out, err = capsys.readouterr()
    assert "broken.png" in err
    assert "a fifth of 5 readable rows is fewer than the 11 controls" in out
    assert "broken.png" in (tmp_path / "watch" / "index.html").read_text(encoding="utf-8")


def test_pictures_in_memory_are_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"picture": [photo(i) for i in range(6)], "words": [f"number {i}" for i in range(6)]}
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    command = ["pick", str(tmp_path / "saved"), "--out", str(tmp_path / "watch"), "--caption-column", "words"]
    assert main(command) == 0
    probes = as_probes(tmp_path / "watch" / "probes")
    assert {p.prompt for p in probes} == {f"number {i}" for i in range(6)}
    assert Image.open(probes[0].image).size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{train}", "--out", "{train}/watch"], "which is only read"),
        (["{train}", "--out", "{tmp}"], "which is only read"),
        (["{train}", "--out", "{full}"], "allowed: a new folder, or one that memwatch pick has written"),
        (["{tmp}/nothing", "--out", "{tmp}/watch"], "TRAIN: got"),
        (["{empty}", "--out", "{tmp}/watch"], "holds no image"),
        (["{train}", "--out", "{tmp}/watch", "--probes", "0"], "--probes: got 0, allowed: 1 or greater"),
        (["{train}", "--out", "{tmp}/watch", "--hold-out", "-1"], "config key 'pick.hold_out': got -1"),
        (["{train}", "--out", "{tmp}/watch", "--controls", "{tmp}/nothing"], "--controls: got"),
        (["{train}", "--out", "{tmp}/watch", "--caption-column", "words"], "words"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, said, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("train", "full", "empty")} | {"tmp": tmp_path}
    save_folder(places["train"], {"a.png": photo(0)}, {"a.png": "a"})
    save_folder(places["full"], {"a.png": photo(0)})
    places["empty"].mkdir()
    before = contents(tmp_path)
    assert main(["pick", *(a.format(**places) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert contents(tmp_path) == before


@needs_chromium
def test_the_page_shows_groups_reasons_and_what_is_not_watched(watched):
    with opened(watched / "index.html") as page:
        assert page.text_content("h1") == "12 of 70 training images are watched"
        assert page.locator(".card").count() == 12
        shown = page.locator("img").evaluate_all("n => n.map(x => x.complete && x.naturalWidth > 0)")
        assert all(shown)
        assert page.locator(".card", has_text="7 near-duplicates").locator(".fellows img").count() == 6
        assert page.locator("section[aria-labelledby=controls] figure").count() == 14
        assert page.locator("section[aria-labelledby=peers] figure").count() == 8
        assert "taking turns in training" in page.text_content("section[aria-labelledby=not]")
        kinds = page.locator("section[aria-labelledby=mix] tbody td:first-child").all_text_contents()
        assert kinds == ["duplicates", "shared part", "outlier", "rare caption", "typical", "at random"]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.problems == []


def test_captions_are_escaped(tmp_path):
    train = save_folder(tmp_path / "train", {"a.png": photo(0)}, {"a.png": "a <b>bold</b> one"})
    assert main(["pick", str(train), "--out", str(tmp_path / "watch")]) == 0
    text = (tmp_path / "watch" / "index.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;bold&lt;/b&gt; one" in text
    assert "<b>" not in text
