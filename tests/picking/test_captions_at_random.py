"""Captions at random: read as ``datasets`` reads them whatever holds them, or refused with file and line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import tempfile
from pathlib import Path

import pytest
from support.builders import picture

from memwatch import ProbeError
from memwatch.measure.captions import COLUMNS
from memwatch.measure.image_folder import read_image_folder
from memwatch.measure.probes import as_probes
from memwatch.picking.rows import as_training_set

datasets = pytest.importorskip("datasets")  # the lowest versions are tested without these two
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

NAME = st.text("ab 0é猫-_'%#&", min_size=1, max_size=6).map(lambda stem: f"{stem.strip() or 'x'}.png")
WHERE = st.sampled_from(["", "img/", "img\\", "./", "deep/er/"])
TEXT = st.one_of(
    st.text(max_size=30), st.sampled_from(["a\u2028b", "x\u0085y", "NA", "null", 'say "hi", now', "é", ""])
)
ROWS = st.lists(st.tuples(WHERE, NAME, TEXT), min_size=1, max_size=5)
MARK = st.sampled_from([b"", b"\xef\xbb\xbf"])
END = st.sampled_from(["\n", "\r\n"])
COLUMN = st.sampled_from([*COLUMNS["caption"], "en_text"])
settings = hypothesis.settings(max_examples=100, deadline=None, derandomize=True)


def as_datasets_reads(folder: Path, table: str, column: str) -> list[tuple[str, object]]:
    """File and caption of every row; captions that it takes for dates or numbers are of those types."""
    rows = datasets.load_dataset(
        "imagefolder", data_files={"train": str(folder / table)}, split="train", streaming=True
    )
    rows = rows.cast_column("image", datasets.Image(decode=False))
    found = [(Path(row["image"]["path"]).relative_to(folder).as_posix(), row[column]) for row in rows]
    return [(file, text[0] if isinstance(text, list) else text) for file, text in found]


def same_as_datasets(table: str, content: bytes, column: str) -> None:
    """Both read the same, or memwatch says why it does not."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        (folder / table).write_bytes(content)
        try:
            expected = as_datasets_reads(folder, table, column)
        except Exception:  # of many kinds; memwatch may read it, because it reads row by row
            with contextlib.suppress(ProbeError):
                read_image_folder(folder)
            return
        found = [(row.file.relative_to(folder).as_posix(), row.caption) for row in read_image_folder(folder).rows]
        if all(isinstance(text, str | None) for _, text in expected):  # none is taken for a number or a date
            assert found == [(file, text or "") for file, text in expected]
        assert [file for file, _ in found] == [file for file, _ in expected]


def test_datasets_reads_a_folder(tmp_path):
    """So that what it refuses below is refused for a reason."""
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "img\\\\a.png", "text": "a cat"}', encoding="utf-8")
    assert as_datasets_reads(tmp_path, "metadata.jsonl", "text") == [("img/a.png", "a cat")]


@settings
@hypothesis.given(rows=ROWS, mark=MARK, end=END, column=COLUMN, more=st.booleans(), ascii=st.booleans())
def test_metadata_jsonl(rows, mark, end, column, more, ascii):
    lines = []
    for i, (where, name, text) in enumerate(rows):
        row = {"file_name": where + name, column: text} | ({"score": i, "other": None} if more else {})
        lines.append(json.dumps(row, ensure_ascii=ascii) + end)
    same_as_datasets("metadata.jsonl", mark + "".join(lines).encode(), column)


@settings
@hypothesis.given(rows=ROWS, mark=MARK, end=END, column=COLUMN, more=st.booleans())
def test_metadata_csv(rows, mark, end, column, more):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=end)
    writer.writerow(["file_name", column, *(["score"] if more else [])])
    writer.writerows([where + name, text, *([i] if more else [])] for i, (where, name, text) in enumerate(rows))
    same_as_datasets("metadata.csv", mark + file.getvalue().encode(), column)


@settings
@hypothesis.given(rows=ROWS, column=COLUMN, kind=st.sampled_from(["text", "null", "list"]))
def test_metadata_parquet(rows, column, kind):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [
        {"text": text, "null": text if i else None, "list": [text, "other"]}[kind] for i, (*_, text) in enumerate(rows)
    ]
    table = pa.table({"file_name": [where + name for where, name, _ in rows], column: texts})
    file = io.BytesIO()
    parquet.write_table(table, file)
    same_as_datasets("metadata.parquet", file.getvalue(), column)


@settings
@hypothesis.given(text=TEXT, mark=MARK, end=END, before=st.integers(0, 2), more=st.booleans())
def test_a_file_of_text_beside_an_image(text, mark, end, before, more):
    """Its first line that is not empty; lines end at a line feed alone."""
    with tempfile.TemporaryDirectory() as place:
        Path(place, "a.png").touch()
        written = end * before + text + (f"{end}other{end}" if more else "")
        Path(place, "a.txt").write_bytes(mark + written.encode())
        expected = [line.strip() for line in written.split("\n") if line.strip()]
        assert read_image_folder(Path(place)).rows[0].caption == next(iter(expected), "")


@settings
@hypothesis.given(prompts=st.lists(TEXT, min_size=1, max_size=5), mark=MARK, end=END)
def test_a_file_of_prompts(prompts, mark, end):
    prompts = [" ".join(text.split("\n")).strip() for text in prompts]
    expected = [text for text in prompts if text and text[0] != "#"]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "prompts.txt")
        file.write_bytes(mark + "".join(text + end for text in prompts).encode())
        if expected:
            assert [probe.prompt for probe in as_probes(file)] == expected
        else:
            with pytest.raises(ProbeError, match=re.escape(str(file))):
                as_probes(file)


@settings
@hypothesis.given(
    texts=st.lists(st.one_of(TEXT, st.none()), min_size=1, max_size=4), column=COLUMN, of=st.sampled_from(["", "list"])
)
def test_rows_of_every_kind_give_the_same_captions(texts, column, of):
    values = [[text, "other"] if of else text for text in texts]
    expected = [text or "" for text in texts]
    rows = [{"image": picture(i), column: value} for i, value in enumerate(values)]
    held = datasets.Dataset.from_dict({"image": [row["image"] for row in rows], column: values})
    for found in (as_training_set(rows), as_training_set(held.cast_column("image", datasets.Image()))):
        assert [found.caption(row) for row in range(len(rows))] == expected
    assert [probe.prompt for probe in as_probes(rows)] == expected
    with tempfile.TemporaryDirectory() as place:
        lines = [json.dumps({"file_name": f"{i}.png", column: value}) for i, value in enumerate(values)]
        Path(place, "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
        assert [row.caption for row in read_image_folder(Path(place)).rows] == expected


@settings
@hypothesis.given(content=st.one_of(st.binary(max_size=60), st.text('{}[]",:\n\\ file_name.pngtx', max_size=60)))
def test_what_is_no_metadata_is_refused_by_name(content):
    data = content if isinstance(content, bytes) else content.encode()
    for table in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        with tempfile.TemporaryDirectory() as place:
            Path(place, table).write_bytes(data)
            with pytest.raises(ProbeError, match=f"{re.escape(place)}/{table}"):
                read_image_folder(Path(place))
