"""The summary: what README says of the evidence, between two marks, rewritten by the command that measured it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

BEGIN, END = "<!-- evidence: written by memwatch bench --report -->", "<!-- end of evidence -->"
WIDTH = 120


def summary_of(bars: Sequence[Mapping[str, str]]) -> str:
    """How many bars are met, and every number with its bar, as ``bars.bar_table`` has them; intervals are left out."""
    judged = [row for row in bars if row["bar"] != "-" and row["measured"] != "-"]
    met = sum(row["met"] == "yes" for row in judged)
    said = "; ".join(f"{row['number']} {brief(row['measured'])} (bar {row['bar']})" for row in judged)
    return fill(f"* **{met} of {len(judged)} bars are met.** {said}.", WIDTH, subsequent_indent="  ")


def brief(measured: str) -> str:
    """
    >>> brief("0.500 [0.21, 0.79]; lowest 0.000 (dreambooth)")
    '0.500; lowest 0.000 (dreambooth)'
    """
    return re.sub(r" \[[^]]*\]", "", measured)


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
