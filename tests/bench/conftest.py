"""Two made-up runs for all tests of the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.planted import pretend


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of ``full-0`` and ``full-1``; tests must not change it."""
    folder = tmp_path_factory.mktemp("bench")
    for seed in (0, 1):
        pretend(folder / f"full-{seed}", seed)
    return folder
