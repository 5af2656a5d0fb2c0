"""Image folders as people have them: the captions that ``datasets`` and trainers read, or an error with its line."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path

import pytest
from support.builders import picture

from memwatch import ProbeError
from memwatch.measure.image_folder import files_below, read_image_folder
from memwatch.measure.metadata_files import copy_table_without, table_rows
from memwatch.measure.probes import as_probes

U2028 = "one\u2028line\u0085here"


def folder_of(root: Path, files: dict[str, str | bytes | None]) -> Path:
    """A folder of files with these contents; ``None`` is an image."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            picture(len(name)).save(root / name, "PNG")
        else:
            (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def captions(root: Path, **options: str) -> dict[str, str]:
    return {r.file.relative_to(root).as_posix(): r.caption for r in read_image_folder(root, **options).rows}


def line(name: str, **more: object) -> str:
    return json.dumps({"file_name": name} | more, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"metadata.jsonl": line("a.png", text=U2028)}, {"a.png": U2028}),
        ({"metadata.jsonl": b"\xef\xbb\xbf" + line("a.png", text="a cat").encode()}, {"a.png": "a cat"}),
        ({"metadata.jsonl": line("a.png", text="a cat").replace("\n", "\r\n")}, {"a.png": "a cat"}),
        ({"metadata.jsonl": line("img\\a.png", text="a cat")}, {"img/a.png": "a cat"}),
        ({"metadata.jsonl": line("a.png", text=None)}, {"a.png": ""}),
        ({"metadata.jsonl": line("a.png", prompt="a cat")}, {"a.png": "a cat"}),
        ({"metadata.jsonl": line("a.png", en_text="a cat")}, {"a.png": "a cat"}),
        ({"metadata.jsonl": line("a.png", text=["a cat", "one cat"])}, {"a.png": "a cat"}),
        ({"metadata.jsonl": line("a.gif", text="a cat")}, {"a.gif": "a cat"}),
        ({"below/metadata.jsonl": line("a.png", text="a cat")}, {"below/a.png": "a cat"}),
        ({"metadata.csv": 'file_name,text\na.png,"a, ""b""\nc"\n'}, {"a.png": 'a, "b"\nc'}),
        ({"metadata.csv": "file_name,text\na.png,7\nb.png,\n"}, {"a.png": "7", "b.png": ""}),
        ({"a.png": None, "a.txt": b"\xef\xbb\xbfa cat\r\n"}, {"a.png": "a cat"}),
        ({"a.png": None, "a.caption": "a cat"}, {"a.png": "a cat"}),
        ({"a.png": None, "a.TXT": "\n a cat\nanother\n"}, {"a.png": "a cat"}),
        ({"a.png": None, "a.txt": "", "a.caption": "a cat"}, {"a.png": "a cat"}),
        ({"10_sks dog/a.png": None}, {"10_sks dog/a.png": "sks dog"}),
        ({"10_sks dog/a.png": None, "10_sks dog/a.txt": "a dog"}, {"10_sks dog/a.png": "a dog"}),
        ({"a.png": None, "a-masklabel.png": None, "b.png": None}, {"a.png": "", "b.png": ""}),
        ({"a.jpg": None, "masks/a.png": None, "b_mask.png": None}, {"a.jpg": "", "b_mask.png": ""}),
        ({"a.png": None, "a_mask.png": None, "a_mask.txt": "a mask"}, {"a.png": "", "a_mask.png": "a mask"}),
        ({"gas.png": None, "gasmask.png": None}, {"gas.png": "", "gasmask.png": ""}),
        ({"metadata.jsonl": line("a.png", negative_prompt="blurry")}, {"a.png": ""}),
        ({"metadata.jsonl": line("a.png", Text="a cat", text_file="a.txt")}, {"a.png": "a cat"}),
        ({"a.png": None, "a.gif": b"", ".hidden/b.png": None}, {"a.png": ""}),
    ],
)
def test_captions_of_every_layout(files, found, tmp_path):
    root = folder_of(tmp_path, files)
    assert captions(root) == found
    assert [probe.prompt for probe in as_probes(root)] == [*found.values()]


def test_parquet_is_read_and_written_without_some_rows(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"file_name": ["a.png", "b.png", "c.png"], "text": [["a", "x"], None, ["c"]], "n": [1, 2, None]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert captions(tmp_path) == {"a.png": "a", "b.png": "", "c.png": "c"}
    copy_table_without(tmp_path / "metadata.parquet", tmp_path / "out.parquet", {1})
    assert parquet.read_table(tmp_path / "out.parquet").equals(table.take([0, 2]))


def test_a_table_without_some_rows_keeps_the_others_as_they_are(tmp_path):
    pytest.importorskip("pandas")
    rows = [["file_name", "text", "id"], ["a.png", "NA", "007"], ["b.png", "x\ny", ""], ["c.png", U2028, "1e3"]]
    rows[3][1] += "\rthere"
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    copy_table_without(tmp_path / "metadata.csv", tmp_path / "out.csv", {1})
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        assert [*csv.reader(file)] == [rows[0], rows[1], rows[3]]


def test_the_named_column_is_read(tmp_path):
    root = folder_of(tmp_path, {"metadata.jsonl": line("a.png", text="a cat", de="eine Katze") + line("b.png")})
    assert captions(root, caption_column="de") == {"a.png": "eine Katze", "b.png": ""}
    with pytest.raises(ProbeError, match="caption_column is 'fr', but its columns are: file_name, text, de"):
        read_image_folder(root, "fr")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"metadata.jsonl": line("a.png") + "{"}, r"metadata\.jsonl, line 2: expected a JSON object"),
        ({"metadata.jsonl": line("a.png") + "[1]"}, r"metadata\.jsonl, line 2: expected a JSON object"),
        ({"metadata.jsonl": '{"text": "a cat"}'}, r"line 1: expected 'file_name', .*; the columns are text"),
        ({"metadata.jsonl": line("../other/keep.png")}, r"line 1: expected 'file_name', .* got '../other/keep.png'"),
        ({"metadata.jsonl": line("a\\..\\..\\keep.png")}, "line 1: expected 'file_name', the path of an image below"),
        ({"metadata.jsonl": line("/etc/keep.png")}, r"got '/etc/keep.png'"),
        ({"metadata.jsonl": line("file://a.png")}, r"got 'file://a.png'"),
        ({"metadata.jsonl": line("C:\\\\imgs\\\\a.png")}, "got 'C:"),
        ({"metadata.jsonl": line("metadata.jsonl")}, "got 'metadata.jsonl'"),
        ({"metadata.jsonl": line("b"), "b/a.png": None}, "got 'b'"),
        ({"metadata.jsonl": line("a\0.png")}, r"line 1: expected 'file_name'"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "\\ud800"}'}, r"line 1: .*surrogates not allowed"),
        ({"metadata.jsonl": "caf\u00e9".encode("cp1252")}, r"metadata\.jsonl, line 1: byte 0xe9 is no utf-8"),
        ({"metadata.jsonl": "\n"}, r"metadata\.jsonl names no image"),
        ({"metadata.jsonl": line("a.png"), "b/metadata.csv": "file_name\na.png\n"}, "metadata files of one kind"),
        ({"metadata.csv": "text\na cat\n"}, r"metadata\.csv, row 1: expected 'file_name'"),
        ({"metadata.csv": 'file_name,text\n"a.png,a cat\n'}, r"metadata\.csv: cannot be read"),
        ({"metadata.csv": "file_name,text\na.png,a cat, sitting\n"}, "more cells than its header"),
        ({"a.png": None, "a.txt": "a cat".encode("utf-16-le")}, r"a\.txt, line 1: full of zero bytes"),
        ({"a.png": None, "choice.json": "{}"}, "is a choice of 'memwatch pick': give it as picked, or .*train"),
        ({"metadata.parquet": b"PAR1"}, r"metadata\.parquet: cannot be read"),
        ({"a.png": None, "a.txt": "café".encode("cp1252")}, r"a\.txt, line 1: byte 0xe9 is no utf-8"),
        ({"a.txt": "a cat"}, "holds no image"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(files, said, tmp_path):
    with pytest.raises(ProbeError, match=f"probes: .*{said}"):
        as_probes(folder_of(tmp_path, files))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.png": None, "a.tags": "cat", "b.png": None}, "2 of 2 images have no caption; found 1 *.tags; memwatch"),
        ({"a.png": None, "captions.json": "{}"}, "1 of 1 images have no caption; found 1 *.json; memwatch"),
        ({"10_sks dog/a.png": None}, "1 image captioned 'sks dog', as their folder is called"),
        ({"a.png": None, "a.png.txt": "a cat"}, "1 of 1 images have no caption; found 1 *.txt; memwatch"),
        ({"a.png": None, "a.txt": "x", "a-mask.png": None}, "1 image not read, taken for masks: a-mask.png"),
        ({"metadata.jsonl": line("a.png", en_text="x")}, "captions are read from the column 'en_text'"),
        ({"metadata.jsonl": line("a.png", de="", fr="")}, "the columns of metadata.jsonl are file_name, de, fr"),
        ({"metadata.jsonl": line("a.png", text="x"), "b.png": None}, "1 image not read, not in metadata.jsonl"),
        (
            {"a.png": None, "a.txt": "x", "b.gif": b"", "c.avif": b"", "d.GIF": b""},
            "3 files not read: 1 *.avif, 2 *.gif",
        ),
    ],
)
def test_what_is_missing_or_not_read_is_said_with_counts(files, said, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "memwatch"):
        as_probes(folder_of(tmp_path, files))
    assert [said in message for message in caplog.messages].count(True) == 1


def test_links_are_files_of_their_own_and_circles_end(tmp_path):
    root = folder_of(tmp_path / "train", {"a.png": None, "a.txt": "a"})
    folder_of(tmp_path / "pool", {"p.png": None, "p.txt": "p"})
    os.symlink("a.png", root / "b.png")
    os.symlink("../pool", root / "pool")
    os.symlink("..", root / "up")
    os.symlink(".", root / "self")
    os.symlink("../train", tmp_path / "pool" / "back")
    os.symlink("pool", root / "again")
    assert captions(root) == {"a.png": "a", "again/p.png": "p", "b.png": ""}
    found = [f.relative_to(root).as_posix() for f in files_below(root)]
    assert found == ["a.png", "a.txt", "again/back", "again/p.png", "again/p.txt", "b.png", "pool", "self", "up"]


def test_rows_say_where_they_stand(tmp_path):
    folder_of(tmp_path, {"metadata.jsonl": "\n" + line("a.png") + "\n" + line("b.png")})
    where = [where for where, _ in table_rows(tmp_path / "metadata.jsonl")]
    assert where == [f"{tmp_path / 'metadata.jsonl'}, line {number}" for number in (2, 4)]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    root, real = folder_of(tmp_path, {"a.png": None, "locked/b.png": None}), os.scandir

    def scandir(place):
        if os.fspath(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="locked"):
        read_image_folder(root)
