"""A made-up pair of twins for all tests of the benchmark, and what memwatch says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from evidence.runs.finished import finished_pairs
from evidence.runs.protocol import SHIPPED
from evidence.verdicts.product import judged
from evidence.verdicts.tables import Judged
from evidence.verdicts.truth import truths_of
from evidence.worlds.items import Item
from evidence.worlds.sets import many_captions
from evidence.worlds.sources import Source
from evidence.worlds.world import WORLDS
from support.planted import pretend

FEW = re.compile("large-.*[ab]0$|middle-.*[ab]3$|whole-.*0$|control-(0.|1[0-3])|held-out-|learned-")


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Iterator[Path]:
    """The folder of the twins ``captions-0a`` and ``captions-0b``, of few items; tests must not change it."""
    folder, world = tmp_path_factory.mktemp("bench"), WORLDS["captions"]

    def few(seed: int, source: Source) -> list[Item]:
        return [item for item in many_captions(seed, source) if FEW.match(item.name)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORLDS, "captions", replace(world, make=few))
        pretend(folder, 0)
        yield folder


@pytest.fixture(scope="session")
def both(runs) -> list[Judged]:
    """Of both twins; tests must not change them."""
    return [Judged(judged(truth.run, SHIPPED), truth) for truth in truths_of(list(finished_pairs(runs)))]
