"""Methods: the rows of the comparison, and how memwatch's own signals become maps. ``rivals`` has the other rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from memwatch.bench.items import Kind
from memwatch.bench.protocol import GENERATION, LEVELS, PROMPT_DRAWS
from memwatch.bench.runs import Finished
from memwatch.config import MemWatchConfig, SignalsConfig
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import SMALLEST_RHO, Signals, branch_quantile, combine_levels, decide, pointwise_min

TERMS = {"log_ratio": "variance", "loss_log_ratio": "loss", "both": "both"}
AGAINST = {"": "snapshot", "_null": "unconditional", "_baselines": "both"}
ALGEBRA = {f"{name}{end}": (terms, against) for end, against in AGAINST.items() for name, terms in TERMS.items()}
TIMESTEPS = tuple(map(str, LEVELS.timesteps))
COMBINED = ("adjacent_min", "mean")
ALL = (*TIMESTEPS, *COMBINED)
LAST_STEP = f"last of {GENERATION.num_inference_steps}"
SMOOTH = 3


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        method: ``memwatch``, ``published`` or the rival's name.
        signal, baseline, level, draws: what it looks at; ``-`` and 0 where that means nothing.
        probe: ``reference`` (the training picture under fixed noise) or ``prompt`` (a generation's last step).
        map_of: a rival's map of an item at an event, ``(h, w)``; without one memwatch's signals make it.
        score_of: a rival's number for it, larger is more suspicious; without one the map's largest value is taken.
        own_bar: what a score must exceed to count towards an alert; ``None`` takes the highest of the controls.
    """

    method: str
    signal: str
    baseline: str = "-"
    level: str = "-"
    draws: int = 0
    probe: str = "reference"
    map_of: Callable[[Finished, str, int], np.ndarray] | None = None
    score_of: Callable[[Finished, str, int], float] | None = None
    own_bar: float | None = None

    @property
    def only_last(self) -> bool:
        """Measured at the last event only, as all maps at a generation's last step but Bright Ending's."""
        return self.probe == "prompt" and self.score_of is None

    def maps(self, run: Finished, step: int) -> dict[str, np.ndarray]:
        """The map of every item at an event, ``(h, w)`` float64. Empty where it has none, or not at this event."""
        only_scores = self.score_of is not None and self.map_of is None
        if only_scores or (self.only_last and (step != run.steps[-1] or not run.has_prompts)):
            return {}
        map_of = self.map_of or partial(signal_map, self)
        return {item.name: map_of(run, item.name, step) for item in run.items}

    def scores(self, run: Finished, step: int) -> dict[str, float]:
        """One number per item; none where the method was not run."""
        if self.score_of is not None:
            return {item.name: self.score_of(run, item.name, step) for item in run.items}
        return {name: float(values.max()) for name, values in self.maps(run, step).items()}

    def bar(self, run: Finished, scores: Mapping[str, float]) -> float:
        highest = max(scores[item.name] for item in run.of_kind(Kind.CONTROL))
        return highest if self.own_bar is None else self.own_bar


def all_methods() -> Iterator[Method]:
    """memwatch's rows."""

    def rows(signals: str, baseline: str, draws: int = LEVELS.draws, levels: Sequence[str] = ALL) -> Iterator[Method]:
        return (Method("memwatch", s, baseline, level, draws) for s in signals.split() for level in levels)

    yield from rows("collapse log_ratio loss_log_ratio both score", "first")
    yield from rows("smaller spread standardized trend", "first", levels=COMBINED)
    for baseline in ("previous", "lag:2"):
        yield from rows("log_ratio both", baseline, levels=COMBINED)
        yield from rows("both_baselines", f"{baseline} and unconditional", levels=COMBINED)
    for draws in (1, 2, 4):
        yield from rows(" ".join(TERMS), "first", draws, ("mean",))
    yield from rows("collapse_null log_ratio_null score_null both_null", "unconditional", levels=COMBINED)
    yield from rows("both_baselines", "first and unconditional")
    yield from rows("log_ratio_baselines loss_log_ratio_baselines", "first and unconditional", levels=COMBINED)
    for draws in (2, 4):
        yield from rows("both_baselines", "first and unconditional", draws, COMBINED)
    yield from rows("log_ratio_unfloored", "first", levels=COMBINED)
    yield from rows("raw", "-")
    for signal in ("collapse", "log_ratio", "score"):
        for name, baseline in ((signal, "first"), (f"{signal}_null", "unconditional")):
            yield Method("memwatch", name, baseline, LAST_STEP, PROMPT_DRAWS, "prompt")
    yield Method("memwatch", "raw", "-", LAST_STEP, PROMPT_DRAWS, "prompt")


def configured(config: MemWatchConfig) -> Method:
    """The row of memwatch as it is configured; only its names count."""
    signals, levels = config.signals, config.levels
    signal = next(name for name, pair in ALGEBRA.items() if pair == (signals.terms, signals.against))
    both = f"{signals.baseline} and unconditional"
    baseline = {"snapshot": signals.baseline, "both": both}.get(signals.against, signals.against)
    level = f"{signals.combine} {','.join(map(str, levels.timesteps))}"
    return Method("memwatch", signal, baseline, level, levels.draws)


def signal_map(method: Method, run: Finished, name: str, step: int) -> np.ndarray:
    """The map of an item at an event, ``(h, w)`` float64: one level of several, or all of them combined."""
    values = at_levels(method, run, name, step)
    if method.level in COMBINED:
        found = combine_levels(values, method.level).mean
    else:  # a prompt probe has one level
        found = values.mean[TIMESTEPS.index(method.level) if method.level in TIMESTEPS else 0]
    result: np.ndarray = found.double().numpy()
    return result


def at_levels(method: Method, run: Finished, name: str, step: int) -> CurvatureMap:
    """A signal level by level, samples ``(levels, n, h, w)``; 0 where it does not count."""
    if method.signal in ("trend", "standardized"):
        made = {"trend": trend, "standardized": standardized}[method.signal]
        return made(replace(method, signal="log_ratio"), run, name, step)
    compared = (step, earlier_step(method, run, step), method.draws or LEVELS.draws)
    s = signals_of(run, name, *compared)
    if method.signal in ALGEBRA:
        terms, against = ALGEBRA[method.signal]
        values = decide(s, terms, against, expected_of_controls(run, name, terms, *compared))
        return nothing(s) if values is None else values  # images without captions
    if method.signal.endswith("_null") and s.unconditional is None:
        return nothing(s)
    values = other_signal(method.signal, s, partial(run.observation, name, *compared))
    chosen = s.unconditional if method.signal.endswith("_null") else s.snapshot
    if chosen is None or chosen.is_free is None or method.draws == 1:  # one draw has no error to gate by
        return values
    return CurvatureMap(values.samples.where(chosen.is_free[:, None], 0.0))


def nothing(s: Signals) -> CurvatureMap:
    """A map of zeros, as large as the others."""
    assert s.raw is not None  # the benchmark always measures curvature
    return CurvatureMap(torch.zeros_like(s.raw.samples))


def earlier_step(method: Method, run: Finished, step: int) -> int | None:
    """The event that a row is compared with; ``None`` for a prompt probe. Without a baseline the first event gates.

    Raises:
        ValueError: the benchmark did not measure the baseline, or it takes verdicts to choose it.
    """
    baseline = method.baseline.removesuffix(" and unconditional")
    if baseline == "last_clean":
        raise ValueError("the baseline 'last_clean' follows from verdicts, which a single signal does not have")
    signals = SignalsConfig(baseline="first" if baseline in ("-", "unconditional") else baseline)
    return None if method.probe == "prompt" else run.earlier_step(signals, step)


@lru_cache(maxsize=1000)  # the items of one run at all its events, 0.2 MB each
def signals_of(run: Finished, name: str, step: int, earlier: int | None, draws: int) -> Signals:
    return Signals.of(run.observation(name, step, earlier, draws), SMOOTH)


@lru_cache(maxsize=10_000)
def expected_of_controls(
    run: Finished, name: str, terms: str, step: int, earlier: int | None, draws: int
) -> Tensor | None:
    """k0 of ``signals.decide``, as ``signals.compute_signals`` takes it from the controls."""
    controls = [item.name for item in run.of_kind(Kind.CONTROL) if item.name != name]
    lost = [branch_quantile(signals_of(run, control, step, earlier, draws), terms) for control in controls]
    known = [q for q in lost if q is not None]
    return torch.stack(known).amax(0) if known else None


# --- ideas that memwatch does not use --------------------------------------------------------------------------------


def trend(method: Method, run: Finished, name: str, step: int) -> CurvatureMap:
    """Mean over the last three events."""
    found = [at_levels(method, run, name, s) for s in run.steps if 0 < s <= step][-3:]
    return CurvatureMap(torch.stack([values.mean for values in found]).mean(0)[:, None])


def standardized(method: Method, run: Finished, name: str, step: int) -> CurvatureMap:
    """In standard deviations of the controls, pixel by pixel."""
    mean, std = _of_controls(method, run, step)
    return CurvatureMap(((at_levels(method, run, name, step).mean - mean) / std)[:, None])


@lru_cache(maxsize=10)
def _of_controls(method: Method, run: Finished, step: int) -> tuple[Tensor, Tensor]:
    maps = torch.stack([at_levels(method, run, i.name, step).mean for i in run.of_kind(Kind.CONTROL)])
    return maps.mean(0), maps.std(0).clamp(min=1e-6)


def other_signal(signal: str, s: Signals, observe: Callable[[], Observation]) -> CurvatureMap:
    """Maps of ``Signals`` that never decide, all smoothed, and what can be made of them or of an observation."""
    maps = s.maps()
    match signal:
        case "smaller":  # of the two terms
            return pointwise_min(maps["log_ratio"], maps["loss_log_ratio"])
        case "spread":
            return spread(observe())
        case "log_ratio_unfloored":
            o = observe()
            assert o.baseline is not None
            earlier, now = (m.measured_rho.smooth(SMOOTH).mean.clamp(min=SMALLEST_RHO) for m in (o.baseline, o.now))
            return CurvatureMap(torch.log(earlier / now)[:, None])
        case "score" | "score_null":
            return maps[signal].smooth(SMOOTH)
    return maps[signal]


def spread(o: Observation) -> CurvatureMap:
    """Log ratio of the variances of z_0-hat over noise draws, earlier over now. Forward passes only.

    ``z_0-hat - z_0`` is the error of epsilon times sigma / alpha.
    """
    assert o.baseline is not None
    assert o.eps is not None
    errors = (o.baseline.epsilon - o.eps, o.now.epsilon - o.eps)
    before, now = (CurvatureMap(e.var(1).mean(1)[:, None]).smooth(SMOOTH).samples.clamp(min=1e-12) for e in errors)
    return CurvatureMap(torch.log(before / now))
