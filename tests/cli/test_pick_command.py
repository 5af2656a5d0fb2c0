"""``memwatch pick``: a folder that training takes, a page, exit codes; the training set is only read."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from support.browser import needs_chromium, opened
from support.picked import contents, hugging_face, photo, save_folder, with_logo

import memwatch
from memwatch import ConfigError, MemWatchConfig, ProbeError
from memwatch.cli import main
from memwatch.measure.probes import as_probes
from memwatch.picking.folder import CHOICE, linked, read_folder
from memwatch.picking.for_run import for_run, held_out_rows_in


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """70 images with captions: seven of them the same, and one caption that is markup."""
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


def choice(out):
    return json.loads((out / CHOICE).read_text(encoding="utf-8"))


def looked_at(picked):
    """What a run makes of a pick, in plain values."""
    probes = [picked.probes(), picked.controls(), picked.rotation_probes(99)]
    shown = [[(p.name, p.prompt, p.row, p.image.read_bytes()) for p in some] for some in probes]
    groups = [(w.row, w.why, w.group) for w in picked.watched]
    return [shown, groups, picked.survey.groups, picked.train_rows, picked.control_keys, picked.notes]


def test_the_folder_says_what_was_picked(watched, train):
    text = (watched / "index.html").read_text(encoding="utf-8")
    assert "<b>" not in text  # captions are escaped
    assert "a &lt;b&gt;bold&lt;/b&gt; one" in text
    saved = choice(watched)
    assert (len(saved["names"]), saved["budget"], saved["source"]) == (70, 12, str(train))
    for part, key, number in (("probes", "watched", 12), ("controls", "held_out", 14)):
        lines = (watched / part / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["row"] for line in lines] == [entry["row"] for entry in saved[key]]
        probes = as_probes(watched / part)
        assert len(probes) == number
        for probe, entry in zip(probes, saved[key], strict=True):
            assert probe.image == watched / part / entry["name"]
            assert probe.image.read_bytes() == (train / entry["name"]).read_bytes()
            assert probe.prompt.startswith("a ")


def test_what_to_train_on_is_links_to_all_but_what_is_held_out(watched, train):
    held_out = {entry["name"] for entry in choice(watched)["held_out"]}
    before, after = contents(train), contents(watched / "train")
    metadata = before.pop("metadata.jsonl"), after.pop("metadata.jsonl")
    assert after == {name: data for name, data in before.items() if name not in held_out}
    assert all((watched / "train" / name).samefile(train / name) for name in after)  # they take no room
    kept = [line for line in metadata[0].splitlines() if json.loads(line)["file_name"] not in held_out]
    assert metadata[1].splitlines() == kept  # with the key that memwatch does not know


def test_a_run_reads_back_what_was_picked(watched, train):
    fresh = memwatch.pick(train, probes=12)
    picked = read_folder(watched)
    assert looked_at(picked) == looked_at(fresh)
    assert [row["text"] for row in picked.train] == [row["text"] for row in fresh.train]
    assert {row["image"].parent for row in picked.train} == {watched / "train", watched / "train" / "again"}
    for given, config in ((watched, MemWatchConfig()), (str(watched), MemWatchConfig()), (None, {"picked": watched})):
        run = for_run(given, memwatch.load_config(config), None, None, has_rotation=True)
        assert [p.name for p in run.probes[:12]] == [p.name for p in fresh.probes()]
        assert len(run.controls) == 14
        assert run.control_keys == fresh.control_keys


def test_a_choice_that_still_has_peers_is_read_without_them(watched, tmp_path):
    """Earlier versions wrote a second group of ordinary rows."""
    old = tmp_path / "old"
    shutil.copytree(watched, old)
    saved = choice(old)
    saved["peers"] = [{"row": 1, "name": saved["names"][1]}]
    (old / CHOICE).write_text(json.dumps(saved), encoding="utf-8")
    assert looked_at(read_folder(old)) == looked_at(read_folder(watched))


def test_the_loop_trains_on_the_links_and_held_out_images_are_known(watched, train):
    picked, names = read_folder(watched), [entry["name"] for entry in choice(watched)["held_out"]]
    for folder, held_out in ((watched / "train", []), (train, names)):
        files = [str(file) for file in sorted(folder.rglob("*.png"))]  # as ``load_dataset("imagefolder")`` holds it
        loaded = hugging_face(image=files)
        assert held_out_rows_in(loaded, picked) == (held_out, True)


def test_the_training_folder_may_be_gone_afterwards(train, watched, tmp_path):
    copy = shutil.copytree(train, tmp_path / "copy")
    assert main(["pick", str(copy), "--out", str(tmp_path / "watch"), "--probes", "12"]) == 0
    shutil.rmtree(copy)
    picked = read_folder(tmp_path / "watch")
    assert looked_at(picked) == looked_at(read_folder(watched))
    for name in (picked.rows.name(picked.watched[0].row), "metadata.jsonl"):
        (tmp_path / "watch" / "train" / name).unlink()
    with pytest.raises(ProbeError, match="train has changed since it was written: .*png is missing"):
        read_folder(tmp_path / "watch")


def test_links_are_hard_ones_where_they_can_be(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another disk")

    (tmp_path / "a").write_bytes(b"a")
    linked(tmp_path / "a", tmp_path / "hard")
    monkeypatch.setattr(os, "link", refuse)
    linked(tmp_path / "a", tmp_path / "symbolic")
    monkeypatch.setattr(os, "symlink", refuse)
    linked(tmp_path / "a", tmp_path / "copy")
    assert [(tmp_path / name).stat().st_nlink for name in ("hard", "copy")] == [2, 1]
    assert (tmp_path / "symbolic").is_symlink()
    assert {(tmp_path / name).read_bytes() for name in ("hard", "symbolic", "copy")} == {b"a"}
    with pytest.raises(OSError, match="nothing"):
        linked(tmp_path / "nothing", tmp_path / "b")


def test_class_images_are_set_aside_as_well(tmp_path):
    instance = save_folder(tmp_path / "instance", {f"{i}.png": photo(i, 32) for i in range(6)})
    classes = save_folder(tmp_path / "class", {f"{i:02d}.png": photo(100 + i, 32) for i in range(50)})
    out, prompts = tmp_path / "watch", {"prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    options = [f"--{key.replace('_', '-')}={text}" for key, text in prompts.items()]
    assert main(["pick", str(instance), "--out", str(out), "--class-images", str(classes), *options]) == 0
    aside = set(choice(out)["class_images"])
    assert len(aside) == 19
    assert set(contents(out / "class")) == set(contents(classes)) - aside
    assert len(contents(out / "train")) == 5
    assert looked_at(read_folder(out)) == looked_at(memwatch.pick(instance, class_images=classes, **prompts))


def test_it_is_renewed_and_what_others_put_there_stays(train, tmp_path):
    out = tmp_path / "watch"
    command = ["pick", str(train), "--out", str(out)]
    assert main([*command, "--probes", "16"]) == 0
    (out / "mine.png").write_bytes(b"mine")
    before = contents(train)
    assert main([*command, "--probes", "4", "--controls", "0"]) == 0
    assert len(list((out / "probes").rglob("*.png"))) == 4
    assert (out / "mine.png").read_bytes() == b"mine"
    assert not (out / "controls").exists()
    assert contents(out / "train") == contents(train) == before
    assert len(read_folder(out).train) == 70


def test_rows_that_cannot_be_read_are_named(tmp_path, capsys):
    train = save_folder(tmp_path / "train", {f"{i}.png": photo(i) for i in range(5)})
    (train / "broken.png").write_bytes(b"no picture")
    assert main(["pick", str(train), "--out", str(tmp_path / "watch")]) == 1
    out, err = capsys.readouterr()
    assert "cannot be read: broken.png: " in err
    assert "nothing is held out: at most one in 5 of 5 readable rows" in out
    assert "broken.png" in (tmp_path / "watch" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "watch" / "train" / "broken.png").is_file()  # what becomes of it is the trainer's business


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{train}", "--out", "{train}/watch"], "which is only read"),
        (["{train}", "--out", "{tmp}"], "which is only read"),
        (["{train}", "--out", "{tmp}/watch", "--class-images", "{tmp}"], "which is only read"),
        (["{train}", "--out", "{full}"], "allowed: a new or empty folder"),
        (["{tmp}/nothing", "--out", "{tmp}/watch"], "TRAIN: got"),
        (["{train}", "--out", "{tmp}/watch", "--class-images", "{tmp}/nothing"], "--class-images: got"),
        (["{empty}", "--out", "{tmp}/watch"], "holds no image"),
        (["{csv}", "--out", "{tmp}/watch"], "metadata.csv names no image"),
        (["{train}", "--out", "{tmp}/watch", "--probes", "0"], "--probes: got 0, allowed: 1 or greater"),
        (["{train}", "--out", "{tmp}/watch", "--controls", "10"], "'controls': got 10, allowed: 11 or greater"),
        (["{train}", "--out", "{tmp}/watch", "--caption-column", "words"], "words"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(arguments, said, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("train", "full", "empty", "csv")} | {"tmp": tmp_path}
    save_folder(places["train"], {"a.png": photo(0)}, {"a.png": "a"})
    save_folder(places["full"], {"a.png": photo(0)})
    save_folder(places["csv"], {"a.png": photo(0)})
    (places["csv"] / "metadata.csv").write_text("file_name,text\n", encoding="utf-8")
    places["empty"].mkdir()
    before = contents(tmp_path)
    assert main(["pick", *(a.format(**places) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("missing", ["", "choice.json", "survey.json", "train"])
def test_what_is_no_whole_choice_is_named(missing, watched, tmp_path):
    folder = tmp_path / "watch"
    if missing:
        shutil.copytree(watched, folder)
        (shutil.rmtree if missing == "train" else os.unlink)(folder / missing)
    with pytest.raises(ProbeError, match="picked: .*watch' holds no whole choice of 'memwatch pick TRAIN --out"):
        for_run(folder, MemWatchConfig(), None, None, has_rotation=False)
    with pytest.raises(ConfigError, match="'picked': got <class 'int'>"):
        for_run(3, MemWatchConfig(), None, None, has_rotation=False)


@needs_chromium
def test_the_page_shows_groups_reasons_and_what_is_not_watched(watched):
    with opened(watched / "index.html") as page:
        assert page.text_content("h1") == "12 of 70 training images are watched"
        assert page.locator(".card").count() == 12
        shown = page.locator("img").evaluate_all("n => n.map(x => x.complete && x.naturalWidth > 0)")
        assert all(shown)
        assert page.locator(".card", has_text="7 near-duplicates").locator(".fellows img").count() == 6
        assert page.locator("section[aria-labelledby=controls] figure").count() == 14
        assert "in the rotation: a few of them are screened" in page.text_content("section[aria-labelledby=not]")
        kinds = page.locator("section[aria-labelledby=mix] tbody td:first-child").all_text_contents()
        assert kinds == ["duplicates", "shared part", "outlier", "rare caption", "typical", "at random"]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.problems == []


@pytest.mark.parametrize(
    ("root", "below", "prompt", "caption"),
    [
        ("train", "10_sks dog", None, "sks dog"),
        ("10_sks dog", "", None, "sks dog"),  # the links do not have the name
        ("train", "10_sks dog", "a photo of sks dog", "a photo of sks dog"),
        ("10_sks dog", "", "a photo of sks dog", "a photo of sks dog"),
    ],
)
def test_folders_of_kohyas_layout_keep_their_words(root, below, prompt, caption, tmp_path, capsys):
    train = tmp_path / root
    save_folder(train / below, {f"{i}.png": photo(i) for i in range(4)})
    more = ["--prompt", prompt] if prompt else []
    assert main(["pick", str(train), "--out", str(tmp_path / "watch"), "--controls", "0", *more]) == 0
    for picked in (memwatch.pick(train, controls=0, prompt=prompt), read_folder(tmp_path / "watch")):
        assert {row["text"] for row in picked.train} == {caption}
    said = "4 images captioned 'sks dog', as their folder is called."
    assert (said in capsys.readouterr().out) == (prompt is None)


def test_links_to_links_lead_to_the_file(tmp_path):
    save_folder(tmp_path / "pool", {"x.png": photo(0)})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").symlink_to("../pool/x.png")
    linked(tmp_path / "a" / "x.png", tmp_path / "y.png")
    assert (tmp_path / "y.png").samefile(tmp_path / "pool" / "x.png")


def test_a_part_that_is_a_link_is_not_written_through(train, watched, tmp_path, capsys):
    copy = shutil.copytree(watched, tmp_path / "watch")
    shutil.move(copy / "probes", tmp_path / "elsewhere")
    (copy / "probes").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    assert main(["pick", str(train), "--out", str(copy), "--probes", "12"]) == 2
    assert "symbolic link" in capsys.readouterr().err
    assert contents(tmp_path / "elsewhere") == before
