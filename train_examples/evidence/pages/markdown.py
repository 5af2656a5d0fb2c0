"""Tables of results as Markdown, and the packages that results depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "memwatch")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one kind, with all their columns."""
    if not rows:
        return "Not measured."
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(shown, row.values())) + " |" for row in rows]
    return "\n".join(lines)


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
