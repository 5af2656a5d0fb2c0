"""Training is that of the same loop without memwatch, over every kind of dataloader, on one process and on two."""

from __future__ import annotations

import json

import pytest
from support import neutral
from support.builders import assert_same
from support.processes import on_two_ranks
from support.rows import make_rows

import memwatch


@pytest.mark.parametrize("kind", neutral.KINDS)
def test_one_process_trains_as_without_memwatch(kind, pipeline, tmp_path):
    picked = memwatch.pick(make_rows(neutral.ROWS), probes=2, controls=11)
    found = neutral.all_four(kind, picked, pipeline, tmp_path)
    check(found, set(picked.held_out), whole=kind != "weighted sampler")
    assert (tmp_path / f"{kind} watched".replace(" ", "-") / "memwatch" / "history.jsonl").exists()


@pytest.mark.parametrize("kind", [kind for kind in neutral.KINDS if kind != "shuffle"])  # the workers shuffle as well
def test_two_processes_train_as_without_memwatch(kind, pretrained, tmp_path):
    on_two_ranks(neutral.__file__, tmp_path, pretrained, kind, folder=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    held_out = first.pop("held out")
    assert second.pop("held out") == held_out
    for found in (first, second):
        check(found, set(held_out), whole=False)
    for name in first:
        assert len(first[name]["rows"]) == len(second[name]["rows"]), name
        assert_same(first[name]["weights"], second[name]["weights"], name)


def check(found: dict, held_out: set[int], *, whole: bool) -> None:
    """Watched equals alone, fresh and resumed; nothing that is held out is trained on; the schedule ends at 0."""
    assert_same(found["alone"], found["watched"], "fresh")
    assert_same(found["alone, resumed"], found["watched, resumed"], "resumed")
    fresh, resumed = found["watched"], found["watched, resumed"]
    seen = {row for batch in fresh["rows"] for row in batch}
    assert not seen & held_out
    assert seen == set(range(neutral.ROWS)) - held_out or not whole
    assert fresh["rates"][-1] == pytest.approx(0, abs=1e-12)
    assert fresh["steps"] == resumed["steps"]
    assert resumed["rates"] == pytest.approx(fresh["rates"][-len(resumed["rates"]) :])
