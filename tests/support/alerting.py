"""Reports with alerts, made by hand."""

from __future__ import annotations

from support.observations import BY_VARIANCE, controls, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.report.report import Report


def alerting(*names: str, step: int = 7, quiet: int = 1, **signals: str) -> Report:
    """Each of ``names`` has just become suspicious, ``quiet`` others have not."""
    config = load_config(BY_VARIANCE, signals=signals)
    probes = [*(seen(name, 1.8) for name in names), *(seen(f"quiet-{i}", 1.0) for i in range(quiet))]
    judgement = judge_event([*probes, *controls(20, 1.0, spread=0.2)], {}, step, config)
    report = Report(step, config, judgement, True, 1.5, 0, None)
    assert [f.name for f in report.alerts] == list(names)
    return report
