"""Maps and scores of every row: memwatch's own are memwatch's own, and what was not measured is refused."""

import math

import numpy as np
import pytest
import torch
from support.planted import CHOSEN, STEPS, pretend

from memwatch.bench import results, rivals
from memwatch.bench.items import Kind
from memwatch.bench.methods import ALGEBRA, Method, all_methods, configured
from memwatch.bench.protocol import LEVELS
from memwatch.bench.results import check_measured, run_method, run_product
from memwatch.bench.rivals import RIVALS
from memwatch.bench.runs import Finished
from memwatch.config import SignalsConfig
from memwatch.config_file import load_config
from memwatch.measure.signals import compute_signals
from memwatch.measure.weights import read_safetensors, write_safetensors

LAST = STEPS[-1]


@pytest.fixture(scope="module")
def pinned(tmp_path_factory) -> Finished:
    """A run whose first item leaves no freedom in one corner before training, and in another without its prompt."""
    home = tmp_path_factory.mktemp("pinned") / "full-0"
    pretend(home, 0)
    run = Finished(home)
    name = run.items[0].name
    for step, key, corner in ((0, name, slice(0, 4)), (LAST, f"null/{name}", slice(12, 16))):
        tensors = read_safetensors(home / f"event_{step:05d}.safetensors")
        tensors[f"{key}/rho"][..., corner, corner] = 0.5
        tensors[f"{key}/rho"][:, ::2, corner, corner] = -0.5  # every other draw: nothing that an estimator resolves
        write_safetensors(home / f"event_{step:05d}.safetensors", tensors)
    return run


@pytest.mark.parametrize("combine", ["adjacent_min", "mean"])
@pytest.mark.parametrize("signal", ALGEBRA)
def test_one_algebra(pinned, signal, combine):
    """A row's map is the map by which memwatch decides, gate included."""
    name, (terms, against) = pinned.items[0].name, ALGEBRA[signal]
    draws = LEVELS.draws
    row = Method("memwatch", signal, "first", combine, draws).maps(pinned, LAST)[name]
    observed = [pinned.observation(item.name, LAST, 0, draws) for item in pinned.items]
    signals = compute_signals(observed, terms=terms, against=against, combine=combine, smooth=3)[name]
    assert torch.equal(torch.from_numpy(row), signals.decisive.mean.double())
    gate = {"unconditional": signals.unconditional}.get(against, signals.snapshot).is_free
    assert not gate.all()
    if terms == "variance" and against != "both":
        assert (row[~gate.any(0).numpy()] == 0).all()
    assert not torch.equal(signals.snapshot.is_free, signals.unconditional.is_free)


def test_the_default_has_a_row_of_its_name():
    assert configured(CHOSEN).signal == "both_baselines"
    rows = {(m.signal, m.baseline) for m in all_methods()}
    for terms, against in (("variance", "unconditional"), ("both", "both"), ("loss", "snapshot"), ("variance", "both")):
        method = configured(load_config(CHOSEN, signals={"terms": terms, "against": against}))
        assert (method.signal, method.baseline) in rows
        assert ALGEBRA[method.signal] == (terms, against)


def test_baselines_are_memwatchs_own(runs):
    run = Finished(runs / "full-0")
    found = {
        name: run.earlier_step(SignalsConfig(baseline=name), LAST, 20) for name in ("first", "previous", "last_clean")
    }
    assert found == {"first": 0, "previous": 20, "last_clean": 20}
    assert [run.earlier_step(SignalsConfig(baseline=f"lag:{n}"), LAST) for n in (1, 2, 3, 9)] == [20, 10, 0, 0]
    name = run.items[0].name
    by_lag = [Method("memwatch", "log_ratio", f"lag:{n}", "mean", 8).maps(run, LAST)[name] for n in (1, 2, 3)]
    first = Method("memwatch", "log_ratio", "first", "mean", 8).maps(run, LAST)[name]
    assert np.array_equal(by_lag[2], first)
    assert not np.array_equal(by_lag[1], first)
    assert not np.array_equal(by_lag[0], by_lag[1])


def test_last_clean_follows_the_judge(runs, monkeypatch):
    run, seen = Finished(runs / "full-0"), {}

    def judge(observations, states, step, config):
        seen[step] = {o.name: o.baseline_step for o in observations}
        return judge_event(observations, states, step, config)

    judge_event = results.judge_event
    monkeypatch.setattr(results, "judge_event", judge)
    run_product(load_config(CHOSEN, signals={"baseline": "last_clean"}), run)
    assert {seen[LAST][item.name] for item in run.stored} == {0}  # never clean since training began
    held_out = [seen[LAST][item.name] for item in run.of_kind(Kind.HELD_OUT)]
    assert held_out.count(20) > len(held_out) / 2


@pytest.mark.parametrize("baseline", ["base", "path:somewhere.safetensors"])
def test_an_unmeasured_baseline_is_refused(runs, baseline):
    run = Finished(runs / "full-0")
    with pytest.raises(ValueError, match="the benchmark did not measure the baseline"):
        Method("memwatch", "log_ratio", baseline, "mean", 8).maps(run, LAST)
    with pytest.raises(ValueError, match="the benchmark did not measure the baseline"):
        run_product(load_config(CHOSEN, signals={"baseline": baseline}), run)


def test_a_single_signal_has_no_verdicts_to_choose_by(runs):
    with pytest.raises(ValueError, match="follows from verdicts"):
        Method("memwatch", "both_baselines", "last_clean and unconditional", "mean", 8).maps(
            Finished(runs / "full-0"), LAST
        )


def test_what_was_not_measured_cannot_be_the_default():
    with pytest.raises(ValueError, match=r"measured timesteps.*asks for \(500,\)"):
        check_measured(load_config(None, levels={"timesteps": [500], "draws": 4}), LEVELS)


def test_every_method_gives_one_finite_map_and_score_per_probe(runs):
    run = Finished(runs / "full-0")
    for method in (*[m for m in all_methods() if m.level not in ("141", "301", "501", "701", "mean")], *RIVALS):
        scores = method.scores(run, LAST)
        assert scores.keys() == {item.name for item in run.items}
        assert all(math.isfinite(value) for value in scores.values()), method
        for values in method.maps(run, LAST).values():
            assert values.ndim == 2
            assert np.isfinite(values).all(), method


def test_validation_loss_speaks_when_it_has_risen_twice_in_a_row(runs, monkeypatch):
    losses = {0: 0.5, 10: 0.3, 20: 0.35, 30: 0.31}
    monkeypatch.setattr(rivals, "_held_out_loss", lambda run, step: losses[step])
    (method,) = [m for m in RIVALS if m.method == "validation loss"]
    result = run_method(method, Finished(runs / "full-0"))
    assert set(result.first_alert.values()) == {30}
    assert list(result.scores.values()) == pytest.approx([0.01] * len(result.scores))
    assert result.first_alert.keys() == {item.name for item in result.run.items}


def test_stored_is_what_is_copied(runs):
    run = Finished(runs / "full-0")
    assert {item.dose for item in run.stored} == {32, 64}
    assert len(run.stored) == 12
    assert run.first_copy(run.stored[0]) == 20
    assert run.first_copy(next(i for i in run.items if i.kind is Kind.HELD_OUT)) is None
    item = run.stored[0]
    assert run.exposures(item, 30) == pytest.approx(30 * 32 * item.dose / run.total_dose)
