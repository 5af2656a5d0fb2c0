"""Tables of results as Markdown, and what is said of where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "memwatch")  # that results depend on


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Rows of one kind; all their columns, or those that are named."""
    if not rows:
        return "Not measured."
    columns = columns or tuple(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
