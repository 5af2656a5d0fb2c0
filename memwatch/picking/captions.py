"""Captions: which rows share one, and which are rare."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

RARE = 64  # captions at most
WORDS = 3  # of a caption that count: its rarest


def normalised(caption: str) -> str:
    """A caption without what does not tell it from another: case and spaces.

    >>> normalised("  A photo  of a Cat ")
    'a photo of a cat'
    """
    return " ".join(caption.casefold().split())


def caption_groups(captions: Sequence[str]) -> list[tuple[int, ...]]:
    """Rows that share a caption, two or more; largest group first. No caption is none to share."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, caption in enumerate(captions):
        if text := normalised(caption):
            groups[text].append(row)
    found = [tuple(rows) for rows in groups.values() if len(rows) > 1]
    return sorted(found, key=lambda rows: (-len(rows), rows))


def rare_captions(captions: Sequence[str]) -> list[int]:
    """Rows with the rarest captions, rarest first; one row per caption, ``RARE`` at most.

    A word that stands in k of n different captions counts ``log(n / k)``; a caption is as rare as its ``WORDS`` rarest
    words are in the mean, and shorter captions are filled up with 0. Captions of nothing but common words are left out:
    rare is what exceeds the mean of all.
    """
    first: dict[str, int] = {}
    for row, caption in enumerate(captions):
        if text := normalised(caption):
            first.setdefault(text, row)
    words = {text: set(re.findall(r"\w+", text)) for text in first}
    number = Counter(word for of in words.values() for word in of)
    rarity = {
        text: sum(sorted((math.log(len(first) / number[word]) for word in of), reverse=True)[:WORDS]) / WORDS
        for text, of in words.items()
    }
    mean = sum(rarity.values()) / max(1, len(rarity))
    rare = [text for text, value in rarity.items() if value > mean + 1e-9]
    return [first[text] for text in sorted(rare, key=lambda text: (-rarity[text], first[text]))[:RARE]]
