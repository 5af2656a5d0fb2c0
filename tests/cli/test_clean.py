"""``memwatch clean``: what was found goes, everything else stays as it is, and the original is only read."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from support.picked import contents, photo, save_folder

from memwatch.act.flagged import Flagged
from memwatch.cli import main
from memwatch.picking.rows import as_training_set


def flagged(file, *probes):
    """A file of flagged rows: pairs of probe and files, and the verdict where it is not ``memorized``."""
    with file.open("w", encoding="utf-8") as lines:
        for name, files, *verdict in probes:
            rows = tuple(range(len(files)))
            f = Flagged(name, *(verdict or ["memorized"]), 300, 0, rows, files, "near-duplicates", 9.0, None, 2.4)
            lines.write(json.dumps(asdict(f)) + "\n")
    return file


@pytest.fixture
def train(tmp_path):
    """Ten images, two of them in a folder of their own, with ``metadata.jsonl``."""
    names = [*(f"{i}.png" for i in range(8)), "deep/8.png", "deep/9.png"]
    return save_folder(tmp_path / "train", {n: photo(i) for i, n in enumerate(names)}, {n: f"the {n}" for n in names})


def clean(train, file, *more):
    return main(["clean", str(train), "--flagged", str(file), "--out", str(train.parent / "out"), *more])


def test_flagged_images_go_and_all_else_is_kept(train, tmp_path, capsys):
    before = contents(train)
    file = flagged(tmp_path / "f", ("cat", ("1.png", "3.png", "deep/8.png")), ("dog", ("5.png",)))
    assert clean(train, file) == 0
    after = contents(tmp_path / "out")
    gone = {"1.png", "3.png", "deep/8.png", "5.png"}
    assert set(before) - set(after) == gone
    assert {n: d for n, d in after.items() if n != "metadata.jsonl"} == {
        n: d for n, d in before.items() if n not in gone | {"metadata.jsonl"}
    }
    kept = [
        line for line in before["metadata.jsonl"].decode().splitlines() if json.loads(line)["file_name"] not in gone
    ]
    assert after["metadata.jsonl"].decode().splitlines() == kept  # with the key that memwatch does not know
    assert contents(train) == before
    assert capsys.readouterr().out.splitlines() == [
        "cat: memorized at step 300, 2.4x; near-duplicates: 3 left out",
        "dog: memorized at step 300, 2.4x; near-duplicates: 1 left out",
        *(f"left out: {name}" for name in sorted(gone)),
        f"4 of 10 images left out; all else is in {tmp_path / 'out'}",
    ]
    rows = as_training_set(tmp_path / "out")
    assert [rows.caption(row) for row in range(len(rows))] == [
        f"the {n}" for n in sorted(set(before) - gone) if "png" in n
    ]


def test_one_of_each_group_is_kept(train, tmp_path, capsys):
    """Two groups that share an image are one; what has no group goes."""
    file = flagged(
        tmp_path / "f",
        ("cat", ("1.png", "3.png")),
        ("dog", ("3.png", "4.png")),
        ("fox", ("6.png", "7.png")),
        ("owl", ("0.png",)),
    )
    assert clean(train, file, "--keep", "one") == 0
    left = {name for name in contents(tmp_path / "out") if name.endswith("png")}
    assert left == {"1.png", "2.png", "5.png", "6.png", "deep/8.png", "deep/9.png"}
    assert "cat: memorized at step 300, 2.4x; near-duplicates: 1 left out, 1 kept" in capsys.readouterr().out


def test_suspicious_ones_count_when_asked_and_probes_from_elsewhere_are_said(train, tmp_path, capsys):
    """A run on a dataset that was loaded from the folder knows paths, not names."""
    file = flagged(tmp_path / "f", ("cat", ("1.png",)), ("dog", (str(train / "deep" / "9.png"),), "suspicious"))
    assert clean(train, file) == 0
    assert "deep/9.png" in contents(tmp_path / "out")
    file = flagged(tmp_path / "f", ("dog", (str(train / "deep" / "9.png"),), "suspicious"), ("poster", ()))
    assert clean(train, file, "--verdict", "suspicious", "--out", str(tmp_path / "both")) == 0
    assert "deep/9.png" not in contents(tmp_path / "both")
    assert (
        "nothing is left out for these probes, which are not from the training set: poster" in capsys.readouterr().out
    )


def test_captions_beside_images_go_with_them(tmp_path):
    train = save_folder(tmp_path / "train", {f"{i}.png": photo(i) for i in range(3)} | {"1.jpg": photo(9)})
    for i in range(3):
        (train / f"{i}.txt").write_text(f"number {i}", encoding="utf-8")
        (train / f"{i}.caption").write_text("other", encoding="utf-8")
    assert clean(train, flagged(tmp_path / "f", ("cat", ("0.png", "1.png")))) == 0
    assert set(contents(tmp_path / "out")) == {"1.jpg", "1.txt", "1.caption", "2.png", "2.txt", "2.caption"}


def test_every_folder_keeps_its_own_metadata(tmp_path):
    train = tmp_path / "train"
    save_folder(train / "a", {f"{i}.png": photo(i) for i in range(2)}, {f"{i}.png": f"a{i}" for i in range(2)})
    save_folder(train / "b", {f"{i}.png": photo(9 + i) for i in range(2)}, {f"{i}.png": f"b{i}" for i in range(2)})
    assert clean(train, flagged(tmp_path / "f", ("cat", ("b/0.png",)))) == 0
    rows = as_training_set(tmp_path / "out")
    assert [rows.caption(row) for row in range(3)] == ["a0", "a1", "b1"]


def test_an_image_that_is_missing_stays_missing(train, tmp_path):
    (train / "7.png").unlink()
    assert clean(train, flagged(tmp_path / "f", ("cat", ("1.png",)))) == 0
    assert "7.png" not in contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("probes", "more", "said"),
    [
        (
            [("cat", ("1.png", "other.png", "row-00003"))],
            [],
            "names files that are not in {train}: other.png, row-00003",
        ),
        ([("cat", ("1.png",), "suspicious")], [], "no probe from a training set is memorized"),
        ([("poster", ())], ["--verdict", "suspicious"], "no probe from a training set is suspicious or memorized"),
        ([], [], "there is nothing to leave out"),
        ([("cat", (*(f"{i}.png" for i in range(8)), "deep/8.png", "deep/9.png"))], [], "every image of"),
        ([("cat", ("1.png",))], ["--out", "{train}/deep/out"], "which is only read"),
        ([("cat", ("1.png",))], ["--out", "{train}"], "which is only read"),
        ([("cat", ("1.png",))], ["--out", "{tmp}"], "--out: got"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(probes, more, said, train, tmp_path, capsys):
    file, before = flagged(tmp_path / "f", *probes), contents(tmp_path)
    assert clean(train, file, *(m.format(train=train, tmp=tmp_path) for m in more)) == 2
    err = capsys.readouterr().err
    assert said.format(train=train) in err
    assert err.count("\n") == 1
    assert contents(tmp_path) == before | {"f": file.read_bytes()}
    assert not (tmp_path / "out").exists()


def test_no_file_and_a_full_disk_leave_no_half_a_set(train, tmp_path, monkeypatch, capsys):
    assert clean(train, tmp_path / "nothing") == 2
    assert "does not exist; a run writes flagged.jsonl" in capsys.readouterr().err

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("memwatch.picking.folder.copy_table_without", full)
    assert clean(train, flagged(tmp_path / "f", ("cat", ("1.png",)))) == 2
    assert "no space left" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "train"]


def test_what_is_not_flagged_is_copied_whatever_it_is(tmp_path, capsys):
    """Masks and captions go with their images; a caption that another image needs as well stays."""
    train = save_folder(tmp_path / "train", {f"{i}.png": photo(i) for i in range(3)})
    others = ["0.txt", "0-masklabel.png", "0.npz", "1.txt", "1.gif", "2.avif", "2.caption", ".git/HEAD", "notes.md"]
    for name in others:
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_text(name, encoding="utf-8")
    before = contents(train)
    assert clean(train, flagged(tmp_path / "f", ("cat", ("0.png", "1.png")))) == 0
    gone = ["0-masklabel.png", "0.npz", "0.png", "0.txt", "1.png"]  # 1.gif has 1.txt as well
    assert contents(tmp_path / "out") == {name: data for name, data in before.items() if name not in gone}
    said = capsys.readouterr().out
    assert [line.partition(": ")[2] for line in said.splitlines() if line.startswith("left out")] == gone
    assert "2 files not read: 1 *.avif, 1 *.gif\n" in said


def test_a_file_outside_is_refused_and_nothing_is_overwritten(train, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    photo(0).save(tmp_path / "other" / "keep.png")
    with (train / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "../other/keep.png", "text": "mine"}) + "\n")
    before = contents(tmp_path)
    assert clean(train, flagged(tmp_path / "f", ("cat", ("1.png",)))) == 2
    assert "metadata.jsonl, line 11: expected 'file_name', the path of an image below" in capsys.readouterr().err
    assert contents(tmp_path) == before | {"f": (tmp_path / "f").read_bytes()}


def test_two_links_to_one_file_are_two_images(tmp_path):
    pool, train = save_folder(tmp_path / "pool", {"x.png": photo(0)}), tmp_path / "train"
    train.mkdir()
    for name in ("a", "b"):
        (train / f"{name}.png").symlink_to("../pool/x.png")
        (train / f"{name}.txt").write_text(f"the {name}", encoding="utf-8")
    photo(1).save(train / "c.png")
    assert clean(train, flagged(tmp_path / "f", ("cat", ("a.png", str(train / "b.png")))), "--keep", "one") == 0
    expected = {"a.png": (pool / "x.png").read_bytes(), "a.txt": b"the a", "c.png": (train / "c.png").read_bytes()}
    assert contents(tmp_path / "out") == expected


def test_an_image_that_two_rows_name_goes_row_by_row(train, tmp_path):
    with (train / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "1.png", "text": "again"}) + "\n")
    names = as_training_set(train).names
    assert names[-1] == "1~2.png"
    file = flagged(tmp_path / "f", ("cat", ("1.png",)))  # the run may have known another metadata file
    assert clean(train, file, "--keep", "one") == 0
    assert clean(train, file, "--out", str(tmp_path / "none")) == 0
    kept, none = (as_training_set(tmp_path / out) for out in ("out", "none"))
    assert (len(kept), len(none)) == (10, 9)
    assert [kept.caption(row) for row in range(10) if kept.name(row) == "1.png"] == ["the 1.png"]
    assert not (tmp_path / "none" / "1.png").exists()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_of_captions_lose_the_rows_that_go(kind, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    train = save_folder(tmp_path / "train", {f"{i}.png": photo(i) for i in range(3)})
    table = pandas.DataFrame({"file_name": [f"{i}.png" for i in range(3)], "text": ["one", "two", "NA"]})
    table.to_csv(train / "metadata.csv", index=False) if kind == "csv" else table.to_parquet(train / "metadata.parquet")
    assert clean(train, flagged(tmp_path / "f", ("cat", ("1.png",)))) == 0
    written = tmp_path / "out" / f"metadata.{kind}"
    found = pandas.read_csv(written, keep_default_na=False) if kind == "csv" else pandas.read_parquet(written)
    assert found.to_dict("list") == {"file_name": ["0.png", "2.png"], "text": ["one", "NA"]}


def test_links_to_folders_that_are_there_anyway_stay_links(train, tmp_path):
    (train / "self").symlink_to(".")
    assert clean(train, flagged(tmp_path / "f", ("cat", ("1.png",)))) == 0
    assert (tmp_path / "out" / "self").readlink().name == ""
    assert (tmp_path / "out" / "self" / "2.png").is_file()


@pytest.mark.parametrize(
    ("line", "said"), [('{"probe": "a"', "f, line 2: expected a JSON object"), ("{}", "f, line 2: no line of flagged")]
)
def test_a_line_of_flagged_rows_that_is_broken_is_named(line, said, train, tmp_path, capsys):
    """And a byte order mark does not hide the first one."""
    file = flagged(tmp_path / "f", ("cat", ("1.png",)))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert clean(train, file) == 0
    assert not (tmp_path / "out" / "1.png").exists()
    file.write_text(file.read_text(encoding="utf-8") + line, encoding="utf-8")
    assert clean(train, file, "--out", str(tmp_path / "more")) == 2
    assert said in capsys.readouterr().err


def test_out_may_not_lie_where_the_set_links_to(train, tmp_path, capsys):
    save_folder(tmp_path / "pool", {"x.png": photo(99)})
    (train / "pool").symlink_to("../pool")
    with (train / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "pool/x.png", "text": "x"}) + "\n")
    file = flagged(tmp_path / "f", ("cat", ("1.png",)))
    assert clean(train, file, "--out", str(tmp_path / "pool" / "out")) == 2
    assert "which TRAIN links to" in capsys.readouterr().err
    assert clean(train, file) == 0
    assert (tmp_path / "out" / "pool" / "x.png").read_bytes() == (tmp_path / "pool" / "x.png").read_bytes()
