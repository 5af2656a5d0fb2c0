"""A survey that takes longer than a collective may: one rank makes it, the other waits for its file, and none dies."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

from support.processes import on_two_ranks
from support.rows import make_rows

TIMEOUT = 8  # seconds that a collective may take; NCCL's default is ten minutes
SURVEY = 12  # seconds that the survey takes


def test_no_rank_waits_in_a_collective_for_the_survey(tmp_path):
    log = on_two_ranks(__file__, tmp_path, folder=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert first["picked"] == second["picked"]
    assert first["surveys"] + second["surveys"] == [60]
    assert "another process surveys these 60 rows; this one waits for it" in log


def main() -> None:
    """On every rank: pick, with a slow survey, then agree on something."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    import memwatch
    from memwatch.picking import cache

    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=TIMEOUT))])
    real, surveys = cache.survey, []

    def slow(rows):
        surveys.append(len(rows))
        time.sleep(SURVEY)
        return real(rows)

    cache.survey, cache.PATIENCE = slow, 1.0
    picked = memwatch.pick(make_rows(60), probes=2, controls=11)
    accelerator.wait_for_everyone()
    found = {"picked": [[w.row for w in picked.watched], list(picked.held_out)], "surveys": surveys}
    (Path(sys.argv[1]) / f"rank{accelerator.process_index}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
