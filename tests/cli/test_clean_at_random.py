"""``memwatch clean`` never loses a byte: what it writes and what it names as left out is the input, at random."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
from support.picked import contents

from memwatch.act.flagged import Flagged
from memwatch.cli import main
from memwatch.measure.image_folder import read_image_folder
from memwatch.picking.rows import as_training_set

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

FOLDERS = st.sampled_from(["", "a/", "10_sks dog/", "masks/", ".hidden/", "é 猫/"])
STEMS = st.sampled_from(["0", "1", "0-masklabel", "1_mask", "x.y", "metadata", "猫"])
SUFFIXES = st.sampled_from([".png", ".JPG", ".gif", ".avif", ".txt", ".caption", ".npz", ".json", ""])
TREES = st.dictionaries(
    st.builds("{}{}{}".format, FOLDERS, STEMS, SUFFIXES), st.text("ab \né", max_size=8).map(str.encode), min_size=1
)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(tree=TREES, has_table=st.booleans(), keep=st.sampled_from(["one", "none"]), data=st.data())
def test_what_is_written_and_what_is_left_out_is_the_input(tree, has_table, keep, data):
    with tempfile.TemporaryDirectory() as place:
        root, out = Path(place, "train"), Path(place, "out")
        for name, content in tree.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode() + content)
        named = [name for name in tree if name.endswith((".png", ".gif"))] if has_table else []
        if named:
            lines = (json.dumps({"file_name": name, "text": f"of {name}"}) + "\n" for name in named)
            (root / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        for text in root.rglob("*.[tc][xa]*"):  # captions are no names
            text.write_bytes(tree[text.relative_to(root).as_posix()])
        hypothesis.assume(
            any(name.lower().endswith((".png", ".jpg")) for name in tree if "hidden" not in name) or named
        )
        before, rows = contents(root), as_training_set(root)
        captions = {row.file.relative_to(root): row.caption for row in read_image_folder(root).rows}
        files = data.draw(st.lists(st.sampled_from([*rows.names]), min_size=1, unique=True))
        flag = Flagged("p", "memorized", 1, 0, (0,), tuple(files), "why", None, None, 2.0)
        (Path(place) / "f").write_text(json.dumps(vars(flag)) + "\n", encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            code = main(["clean", str(root), "--flagged", f"{place}/f", "--out", str(out), "--keep", keep])
        assert contents(root) == before
        if code:
            assert "every image of" in said.getvalue()
            return
        left_out = {line.removeprefix("left out: ") for line in said.getvalue().splitlines() if line[:9] == "left out:"}
        written = contents(out)
        tables = [before.pop("metadata.jsonl", b""), written.pop("metadata.jsonl", b"")]
        assert hashes(before.values()) == hashes([*written.values(), *(before[name] for name in left_out)])
        kept = set(rows.names) - set(files) | ({min(files, key=[*rows.names].index)} if keep == "one" else set())
        if len(files) == 1:
            kept = set(rows.names) - set(files)
        assert {*map(str, captions)} & written.keys() == kept & before.keys()
        after = {row.file.relative_to(out): row.caption for row in read_image_folder(out).rows}
        assert after == {file: captions[file] for file in after}
        lines = [json.loads(line)["file_name"] for line in tables[1].splitlines()]
        assert lines == [name for name in named if name in kept]


def hashes(contents):
    return Counter(sha256(content).hexdigest() for content in contents)
