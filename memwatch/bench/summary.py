"""The summary: what README says of the evidence, between two marks, rewritten by the command that measured it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

BEGIN, END = "<!-- evidence: written by memwatch bench --report -->", "<!-- end of evidence -->"
WIDTH = 120
GROUPS = {  # what begins a bullet: the words with which the numbers of its rows begin
    "Where": ("IoU",),
    "Which": ("precision", "recall"),
    "False alarms": ("runs with nothing planted",),
    "Apart from what is learned or seldom seen": ("AUC", "TPR"),
    "In time": ("stored items called",),
    "Stops": ("runs that",),
}


def summary_of(bars: Sequence[Mapping[str, str]]) -> str:
    """A bullet for each group of numbers, with their bars; every number as ``bars.bar_table`` has it."""
    bullets = []
    for title, starts in GROUPS.items():
        said = [sentence_of(row) for row in bars if row["number"].startswith(starts)]
        if said:
            bullets.append(fill(f"* **{title}**: {'; '.join(said)}.", WIDTH, subsequent_indent="  "))
    return "\n".join(bullets)


def sentence_of(row: Mapping[str, str]) -> str:
    """
    >>> sentence_of({"number": "recall of stored", "bar": ">= 0.95", "measured": "0.90 [0.8, 0.9]", "met": "**no**"})
    'recall of stored 0.90 [0.8, 0.9] (bar >= 0.95: **missed**)'
    """
    judged = {"yes": f"bar {row['bar']}: met", "**no**": f"bar {row['bar']}: **missed**"}.get(row["met"], row["met"])
    return f"{row['number']} {row['measured']} ({judged})"


def rewrite(readme: Path, bars: Sequence[Mapping[str, str]]) -> bool:
    """Put the summary between the marks of a file; False where it has none."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    readme.write_text(f"{before}{BEGIN}\n{summary_of(bars)}\n{END}{after}", encoding="utf-8")
    return True


def bars_of(results: Path) -> list[dict[str, str]]:
    """The bars that lie in ``bench.json`` of a results folder."""
    bars: list[dict[str, str]] = json.loads((results / "bench.json").read_text(encoding="utf-8"))["bars"]
    return bars
