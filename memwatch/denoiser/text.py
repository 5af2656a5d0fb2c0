"""Prompts to tokens."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("memwatch")


def warn_if_cut(prompt: str, tokenizer: Any) -> None:
    """Say which words of a prompt the tokenizer has no room for."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    limit = tokenizer.model_max_length
    if len(ids) > limit:
        cut = tokenizer.decode(ids[limit - 1 : -1])  # the last place is the end token's
        logger.warning("probe prompt %r is longer than %d tokens; cut: %r", prompt, limit, cut)
