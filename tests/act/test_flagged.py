"""Flagged rows: all that lie behind a finding, in a file that is always up to date, and exact on resume."""

from __future__ import annotations

import json

import pytest
from support.finding import event, found
from support.picked import chosen, duplicates, part, photo, save_folder, surveyed

from memwatch.act.flagged import FLAGGED, FlaggedSink, read_flagged, rows_behind
from memwatch.picking.rows import as_training_set

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture
def picked():
    """120 rows, of which 0 to 3 are near-duplicates, and row 0 shares its left with 10 to 14, its right with 20, 21."""
    survey = surveyed(120, duplicates(0, 1, 2, 3), part(0, *range(10, 15), box=LEFT), part(0, 20, 21, box=RIGHT))
    return chosen(survey)


@pytest.fixture
def sink(picked, tmp_path):
    return FlaggedSink(tmp_path / "memwatch", picked, lambda: 1000)


def lines(sink):
    return [json.loads(line) for line in sink.file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("region", "rows"),
    [
        (LEFT, {0, 1, 2, 3, *range(10, 15)}),
        (RIGHT, {0, 1, 2, 3, 20, 21}),
        ((0.0, 0.0, 1.0, 1.0), {0, 1, 2, 3, *range(10, 15), 20, 21}),  # both parts lie in it
        ((0.6, 0.4, 0.7, 0.5), {0, 1, 2, 3, 20, 21}),  # it lies in one of them
        ((0.3, 0.0, 0.9, 1.0), {0, 1, 2, 3, 20, 21}),  # 40 % of the left part, 80 % of the right
        (None, {0, 1, 2, 3}),
    ],
)
def test_of_shared_parts_those_are_behind_it_that_the_region_lies_on(picked, region, rows):
    assert rows_behind(picked, 0, region)[0] == tuple(sorted(rows))


def test_why_names_what_the_rows_are(picked, tmp_path):
    assert rows_behind(picked, 0, LEFT)[1] == "6 rows that share the part, 4 near-duplicates"
    assert rows_behind(picked, 50, LEFT) == ((50,), "this row alone")
    assert rows_behind(picked, None, LEFT) == ((), "not picked from the training set")
    assert rows_behind(None, 3, LEFT) == ((), "not picked from the training set")
    sink = FlaggedSink(tmp_path)
    sink.write(event(100, found("poster"), found("cat", row=3)))
    for line in lines(sink):
        assert (line["row"], line["rows"], line["files"], line["exposures"]) == (None, [], [], None)


def test_a_line_says_all_that_there_is_to_say(sink):
    sink.write(event(200, found("cat", row=0, severity=2.4, box=(0, 0, 14, 32))))
    (line,) = lines(sink)
    rows = [0, 1, 2, 3, 10, 11, 12, 13, 14]
    assert line["rows"] == rows
    assert line["files"] == [f"row-{row:05d}" for row in rows]
    assert (line["probe"], line["verdict"], line["step"], line["row"]) == ("cat", "memorized", 200, 0)
    assert (line["box"], line["severity"]) == ([0, 0, 14, 32], 2.4)
    assert line["exposures"] == pytest.approx(1000 * 9 / 100)  # of 120 rows 20 are held out
    assert read_flagged(sink.file) == sink.flagged


def test_worst_first_and_the_newest_event_of_the_worst_verdict(sink):
    weak, none, worst = ("weak", "suspicious"), ("none", "no evidence"), ("worst", "memorized")
    for step, *rows in (
        (100, (*weak, 9.0), (*none, 1.0), ("worst", "suspicious", 1.4), ("bad", "memorized", 1.6)),
        (200, (*worst, 2.0), ("blind", "inconclusive", 1.0)),
        (300, (*worst, 2.6)),
        (400, ("worst", "suspicious", 1.2)),
        (500, ("worst", "no evidence", 1.0)),
    ):
        sink.write(event(step, *(found(name, verdict, row=50, severity=by) for name, verdict, by in rows)))
    told = [(line["probe"], line["step"], line["verdict"], line["severity"]) for line in lines(sink)]
    assert told == [("worst", 300, "memorized", 2.6), ("bad", 100, "memorized", 1.6), ("weak", 100, "suspicious", 9.0)]


def test_a_resumed_run_forgets_what_was_flagged_after_its_checkpoint(sink, picked):
    sink.write(event(100, found("cat", "suspicious", row=0)))
    saved, before = json.loads(json.dumps(sink.to_list())), sink.file.read_bytes()
    sink.write(event(200, found("cat", row=0), found("dog", row=60)))
    again = FlaggedSink(sink.file.parent, picked)
    again.restore(saved)
    assert [(f.probe, f.verdict, f.step) for f in again.flagged] == [("cat", "suspicious", 100)]
    assert sink.file.read_bytes() == before


def test_a_new_run_leaves_the_file_of_the_earlier_one(sink):
    sink.restore([])  # there is no file yet
    assert not sink.file.parent.exists()
    sink.write(event(200, found("cat", row=0)))
    before = sink.file.read_bytes()
    sink.restore(None)
    assert (sink.flagged, sink.file.read_bytes()) == ([], before)


def test_names_are_those_of_the_folder_or_of_the_files(tmp_path):
    folder = save_folder(tmp_path / "train", {f"in/{i}.png": photo(i) for i in range(3)})
    paths = [folder / f"in/{i}.png" for i in range(3)]
    of_folder, of_files = as_training_set(folder), as_training_set([(path, "") for path in paths])
    for rows, names in ((of_folder, ("in/0.png", "in/2.png")), (of_files, (str(paths[0]), str(paths[2])))):
        sink = FlaggedSink(tmp_path / "out", chosen(surveyed(3, duplicates(0, 2)), rows, probes=2))
        sink.write(event(100, found("a", row=2)))
        assert (sink.flagged[0].files, sink.flagged[0].exposures) == (names, None)


def test_what_is_no_file_of_flagged_rows_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=FLAGGED):
        read_flagged(tmp_path / "nothing")
    file = tmp_path / FLAGGED
    file.write_text('{"step": 3, "findings": []}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="it has no 'probe'"):
        read_flagged(file)
