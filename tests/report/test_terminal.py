"""The table of an event: what it says, how it is aligned, and where it has colours."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from support.builders import SMALL, Loop

from memwatch.config_file import load_config
from memwatch.judge.findings import Judgement
from memwatch.judge.verdict import Verdict
from memwatch.report.about import About
from memwatch.report.history import Event, Row
from memwatch.report.report import Report
from memwatch.report.terminal import ANSI, PLAIN, Console, can_colour, columns, summary

REGION = {"box": (0, 8, 32, 64), "area": 0.25}
ROWS = (
    Row("photo-7", verdict=Verdict.NO_EVIDENCE, severity=1.1, p=0.41),
    Row("new", verdict=Verdict.INCONCLUSIVE),
    Row("banner", verdict=Verdict.MEMORIZED, severity=1.71, p=1.234e-8, regions=(REGION,)),
    Row(
        "rocket",
        verdict=Verdict.MEMORIZED,
        severity=2.3,
        p=3e-10,
        regions=(REGION | {"box": (0, 0, 64, 64)}, REGION),
        copied={"generations": 4, "copies": 3, "ratios": [0.1, 0.1, 0.2, 0.9]},
    ),
    Row("poster", verdict=Verdict.SUSPICIOUS, severity=9.0, p=0.004, is_reference=False),
)
AUDIT = "0 of 20 controls called; at most 14 % at 95 % confidence"
EVENT = Event(40, ROWS, {"control/0": 1.0}, AUDIT, calibrated=True, seconds=5.25, overhead=0.0213)
ABOUT = About(settings={"max_train_steps": 200})


def test_the_table_of_an_event():
    assert summary(EVENT, ABOUT).splitlines() == [
        "memwatch, step 40 of 200: 2 memorized, 1 suspicious, 1 no evidence, 1 inconclusive",
        "  probe   verdict     effect  p        region, px    generations",
        "  rocket  memorized   2.3x    3e-10    0,0 to 64,64  3 of 4 copy it",
        "  banner  memorized   1.7x    1.2e-08  0,8 to 32,64",
        "  poster  suspicious  9.0x    0.004",
        "  and 2 more",
        f"  {AUDIT}",
        "  5.2 s, 2.1 % of training time",
    ]


def test_a_stop_gives_its_reason_and_failures_are_counted():
    lines = summary(replace(EVENT, stop_reason="step 40: 2 probe(s) memorized", errors=2), ABOUT).splitlines()
    assert lines[-2:] == [
        "  5.2 s, 2.1 % of training time, 2 failures of memwatch so far",
        "  STOP: step 40: 2 probe(s) memorized",
    ]
    assert "1 failure of memwatch so far" in summary(replace(EVENT, errors=1), ABOUT)


def test_columns_that_hold_nothing_are_left_out():
    event = Event(0, (Row("cat"), Row("dog")), audit="no controls could be audited", seconds=0.9)
    assert summary(event, About()).splitlines() == [
        "memwatch, step 0: 2 inconclusive",
        "  probe  verdict       effect",
        "  cat    inconclusive  1.0x",
        "  dog    inconclusive  1.0x",
        "  uncalibrated: there are no controls",
        "  0.9 s",
    ]


@pytest.mark.parametrize(("shown", "names", "more"), [(0, [], 5), (1, ["rocket"], 4), (5, None, 0), (9, None, 0)])
def test_as_many_probes_as_asked_for(shown, names, more):
    lines = summary(EVENT, ABOUT, shown=shown).splitlines()
    order = ["rocket", "banner", "poster", "photo-7", "new"]
    expected = order if names is None else names
    found = [line.split()[0] for line in lines[2 : 2 + len(expected)]]
    assert found == expected
    assert ([line for line in lines if line.endswith(" more")] == [f"  and {more} more"]) is bool(more)


@pytest.mark.parametrize(
    ("proof", "is_reference", "said"),
    [
        ({"generations": 4, "copies": 0, "ratios": [0.9] * 4}, True, "0 of 4 copy it"),
        ({"generations": 3, "copies": 2, "ratios": [0.1, 0.2, None]}, False, "2 of 3 show it"),
        ({"generations": 2, "copies": 0, "ratios": [None, None]}, True, "nobody can tell"),
        ({"generations": 2, "copies": 1}, True, "1 of 2 copies it"),
    ],
)
def test_what_the_generations_show(proof, is_reference, said):
    row = Row("cat", verdict=Verdict.MEMORIZED, is_reference=is_reference, copied=proof)
    assert summary(Event(2, (row,)), ABOUT).splitlines()[2].endswith(f"  {said}")


def test_names_of_any_length_and_script_stay_aligned():
    names = ["a" * 60, "猫の写真", "c\N{COMBINING ACUTE ACCENT}at", "b"]
    rows = tuple(Row(name, verdict=Verdict.SUSPICIOUS, severity=2.0) for name in names)
    lines = summary(Event(2, rows), ABOUT, shown=4).splitlines()[2:6]
    assert lines[0].split()[0] == "a" * 24 + "..." + "a" * 13
    assert {columns(line[: line.index("suspicious")]) for line in lines} == {2 + 40 + 2}


def test_an_event_that_failed_and_one_without_probes():
    failed = Event(8, seconds=0.25, errors=1, failure="looking at the model failed: OutOfMemoryError('8 GiB')")
    assert summary(failed, ABOUT).splitlines() == [
        "memwatch, step 8 of 200: this event is lost, since looking at the model failed: OutOfMemoryError('8 GiB')",
        "  0.2 s, 1 failure of memwatch so far",
    ]
    stopped = summary(replace(failed, stop_reason="enough"), ABOUT).splitlines()
    assert stopped[-1] == "  STOP: enough"
    assert summary(Event(8), About()).splitlines()[0] == "memwatch, step 8: no probe was judged"


def test_colours_change_no_width_and_mark_the_verdict_alone():
    event = replace(EVENT, stop_reason="enough", rows=(*ROWS, Row("memorized", verdict=Verdict.MEMORIZED)))
    coloured, plain = (summary(event, ABOUT, colour=colour, shown=9) for colour in (True, False))
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert coloured.count(PLAIN) == len(re.findall(r"\x1b\[[1-9]", coloured)) == 1 + 6 + 1  # head, rows, stop
    for line, row in zip(coloured.splitlines()[2:8], event.worst_first, strict=True):
        (found,) = re.findall(r"\x1b\[[\d;]+m([^\x1b]*)\x1b\[0m", line)
        assert found.strip() == str(row.verdict)
        assert f"  {row.name}" in line
        assert ANSI[row.verdict] in line
    assert "\x1b" not in plain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "expected"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
        (object(), {}, False),
        (None, {}, False),  # sys.stdout of a program without a console
    ],
)
def test_colours_are_for_terminals_whose_user_wants_them(stream, variables, expected, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert can_colour(stream) is expected


def report() -> Report:
    return Report(8, load_config(None), Judgement(), True, 1.0, 0, None, about=ABOUT)


@pytest.mark.parametrize(("stream", "colours"), [(Terminal, True), (io.StringIO, False)])
def test_the_console_prints_the_summary(stream, colours, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    written = stream()
    monkeypatch.setattr("sys.stdout", written)
    Console().write(report())
    Console().close()
    assert written.getvalue() == summary(report().to_event(), ABOUT, colour=colours) + "\n"
    assert ("\x1b" in written.getvalue()) is colours


def test_every_event_of_a_run_is_printed(pretrained, pipeline, tmp_path, capsys):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL, max_train_steps=4)
    reports = [watch.begin(), *loop.run(watch, 4)]
    assert [report.step for report in reports] == [0, 2, 4]
    printed = capsys.readouterr().out
    for found in reports:
        assert summary(found.to_event(), watch.about) + "\n" in printed
    assert printed.count("memwatch, step ") == 3
    assert "memwatch, step 4 of 4: " in printed
    assert "\x1b" not in printed


def test_a_run_without_controls_says_so():
    assert "  uncalibrated: there are no controls\n" in summary(replace(EVENT, calibrated=False), ABOUT)


def test_where_no_probe_could_be_judged_one_reason_is_enough():
    new = {"name": "a", "verdict": "inconclusive", "reason": "nothing earlier to compare with"}
    rows = tuple(Row.from_dict(new | {"name": name}) for name in "abcd")
    lines = summary(Event(0, rows, calibrated=True, audit="no controls could be audited"), ABOUT).splitlines()
    assert lines[1:3] == ["  nothing earlier to compare with", "  no controls could be audited"]
    other = Row.from_dict(new | {"reason": "non-finite values in the model's output"})
    assert len(summary(Event(0, (*rows, other)), ABOUT).splitlines()) > len(lines) + 3  # a table
