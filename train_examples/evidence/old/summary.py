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
    """How many bars are met, and every number with its bar, as ``bars.by_both_rules`` has them, without intervals."""
    judged = [row for row in bars if row["bar"] != "-" and row["measured"] != "-"]
    first, second = (sum(row[key] == "yes" for row in judged) for key in ("met", "met by patches"))
    said = "; ".join(f"{row['number']} {both(row)} (bar {row['bar']})" for row in judged)
    head = f"* **{first} of {len(judged)} bars are met by the region rule for copies, {second} by patches.**"
    return fill(f"{head} {said}.", WIDTH, subsequent_indent="  ")


def both(row: Mapping[str, str]) -> str:
    """What was measured by the region rule / by patches, or one of them where they agree."""
    first, second = brief(row["measured"]), brief(row["by patches"])
    return first if first == second else f"{first} / {second}"


def brief(measured: str) -> str:
    """
    >>> brief("0.789 [0.71, 0.92]; lowest 0.000 (dreambooth)")
    '0.789'
    >>> brief("above in 3 of 5 worlds [captions 0.64 against 0.72]")
    'above in 3 of 5 worlds'
    """
    return re.sub(r" \[[^]]*\]|;.*", "", measured)


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
