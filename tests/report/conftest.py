"""A run in W&B that several tests read."""

from __future__ import annotations

import pytest
from support.reports import offline, run_of_a_cat, write
from support.wandb_runs import OfflineRun

from memwatch.report.report import Report


@pytest.fixture(scope="session")
def wandb_reports() -> list[Report]:
    return run_of_a_cat()


@pytest.fixture(scope="session")
def wandb_run(wandb_reports, tmp_path_factory) -> OfflineRun:
    """Those reports in a run of a script that logs without a step."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, folder)
        write(wandb_reports, lambda run: [run.log({"train_loss": 0.5}) for _ in range(4)], id="run1")
        (run,) = OfflineRun.all(folder)
    return run
