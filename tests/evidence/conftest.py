"""Two made-up runs for all tests of the benchmark, and what memwatch says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from evidence.runs.finished import finished_runs
from evidence.runs.protocol import SHIPPED
from evidence.verdicts.product import Product, judged
from support.planted import pretend


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of ``captions-0`` and ``captions-1``; tests must not change it."""
    folder = tmp_path_factory.mktemp("bench")
    for seed in (0, 1):
        pretend(folder / f"captions-{seed}", seed)
    return folder


@pytest.fixture(scope="session")
def products(runs) -> list[Product]:
    """Of both runs; tests must not change them."""
    return [judged(run, SHIPPED) for run in finished_runs(runs)]
