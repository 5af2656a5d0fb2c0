"""Captions: the same answer whatever holds the text of an image, and nothing missing in silence."""

from __future__ import annotations

import numpy as np
import pytest

from memwatch import ProbeError
from memwatch.measure.captions import as_caption, column_of, guessed, lines_of, text_of, without_caption


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["image", "text"], "text"),
        (["caption", "image", "prompt"], "caption"),
        (["image", "en_text"], "en_text"),
        (["image", "BLIP_Caption", "label"], "BLIP_Caption"),
        (["Image", "Text"], "Text"),
        (["image", "negative_prompt"], None),
        (["image", "context", "caption_file", "text_score"], None),
        (["image", "en_text", "de_text"], None),
        (["image", "label"], None),
    ],
)
def test_the_column_of_captions(names, found):
    assert column_of("caption", names) == found
    assert column_of("caption", names, names[0]) == names[0]
    assert column_of("image", names) == next((name for name in names if name.lower() == "image"), None)
    with pytest.raises(ProbeError, match=f"caption_column is 'words', but its columns are: {', '.join(names)}"):
        column_of("caption", names, "words")


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ("a cat", "a cat"),
        (None, ""),
        (float("nan"), ""),
        (["a cat", "one cat"], "a cat"),
        ((), ""),
        (np.array(["a cat", "one cat"]), "a cat"),
        (np.array("a cat"), "a cat"),
        (np.str_("a cat"), "a cat"),
        ([None, "a cat"], ""),
        ("a café".encode(), "a café"),
        (7, ""),
        (True, ""),
        ({"en": "a cat"}, ""),
    ],
)
def test_a_caption_is_the_first_text_of_what_a_row_holds(value, caption):
    assert as_caption(value) == caption


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(ProbeError, match="is not UTF-8"):
        as_caption("café".encode("cp1252"))


def test_a_column_that_is_known_by_a_word_is_said():
    assert guessed("en_text", None) == ["captions are read from the column 'en_text'"]
    assert guessed("en_text", "en_text") == guessed("Text", None) == guessed(None, None) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_by_its_byte_order_mark(encoding, tmp_path):
    (tmp_path / "a.txt").write_text("one\u2028two\u0085\r\nthree café\n", encoding=encoding, newline="")
    assert lines_of(tmp_path / "a.txt") == ["one\u2028two\u0085", "three café", ""]


def test_text_of_another_encoding_is_refused_by_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("a cat\na café".encode("cp1252"))
    with pytest.raises(ProbeError, match=r"a\.txt, line 2: byte 0xe9 is no utf-8; save the file as UTF-8"):
        text_of(tmp_path / "a.txt")


def test_missing_captions_are_counted():
    assert without_caption(["a", "b"], found="*.tags") is None
    what = "2 of 3 rows have no caption; found *.tags; memwatch looks at them under the empty caption"
    assert without_caption(["a", "", " "], noun="row", found="found *.tags") == what
