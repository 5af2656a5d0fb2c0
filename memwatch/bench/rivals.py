"""Every way to turn what was measured into one map and one score a probe: memwatch's signals, the ideas, the published procedure, the rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from memwatch.bench.items import Item, Kind
from memwatch.bench.look import GENERATION, LEVELS, NULL_DRAWS, PROMPT_DRAWS, PUBLISHED
from memwatch.bench.runs import Finished
from memwatch.curvature import CurvatureMap
from memwatch.signals import (
    SMALLEST_RHO,
    collapse,
    combine_levels,
    compute_signals,
    free,
    log_ratio,
    loss_log_ratio,
    raw_curvature,
    score_difference,
)

SNAPSHOT_SIGNALS = (
    "collapse",
    "log_ratio",
    "loss_log_ratio",
    "both",
    "smaller",
    "score",
    "spread",
    "standardized",
    "trend",
)
NULL_SIGNALS = ("collapse_null", "log_ratio_null", "score_null", "both_null")
JOINED = ("both_baselines", "log_ratio_baselines")  # the smaller of what the snapshot and the unconditional branch say
PROMPT_SIGNALS = ("collapse", "log_ratio", "score")
BASELINES = ("first", "previous", "lag:2")
COMBINATIONS = ("adjacent_min", "mean")
LAST_STEP = f"last of {GENERATION.num_inference_steps}"
SMOOTH = 3


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        method: ``memwatch``, ``published`` or the rival's name.
        signal, baseline, level, draws: what it looks at; ``-`` and 0 where that means nothing.
        localizes: whether it has a map.
        probe: ``reference`` (the training picture under fixed noise) or ``prompt`` (a generation's last step).
    """

    method: str
    signal: str
    baseline: str = "-"
    level: str = "-"
    draws: int = 0
    localizes: bool = True
    probe: str = "reference"

    @property
    def only_last(self) -> bool:
        """Measured at the last event only."""
        return self.probe == "prompt" and self.method != "bright ending"


def all_methods() -> Iterator[Method]:
    levels = [*(str(t) for t in LEVELS.timesteps), *COMBINATIONS]
    for baseline in BASELINES:
        for signal in SNAPSHOT_SIGNALS:
            if baseline == "first" or signal in ("log_ratio", "loss_log_ratio", "both", "smaller", "collapse"):
                yield from (Method("memwatch", signal, baseline, level, LEVELS.draws) for level in levels)
    for draws in (1, 2, 4):
        yield from (
            Method("memwatch", s, "first", how, draws)
            for s in ("log_ratio", "loss_log_ratio", "both")
            for how in COMBINATIONS
        )
    for signal in NULL_SIGNALS:
        yield from (Method("memwatch", signal, "unconditional", level, NULL_DRAWS) for level in levels)
    for baseline in BASELINES:
        yield from (
            Method("memwatch", signal, f"{baseline} and unconditional", level, LEVELS.draws)
            for signal in JOINED
            for level in levels
        )
    for draws in (2, 4):
        yield from (Method("memwatch", "both_baselines", "first and unconditional", how, draws) for how in COMBINATIONS)
    yield from (Method("memwatch", "log_ratio_unfloored", "first", level, LEVELS.draws) for level in levels)
    yield from (Method("memwatch", "raw", "-", level, LEVELS.draws) for level in levels)
    for signal in PROMPT_SIGNALS:
        for name, baseline in ((signal, "first"), (f"{signal}_null", "unconditional")):
            yield Method("memwatch", name, baseline, LAST_STEP, PROMPT_DRAWS, probe="prompt")
    yield Method("memwatch", "raw", "-", LAST_STEP, PROMPT_DRAWS, probe="prompt")
    for signal, baseline in (
        ("snapshot", "first"),
        ("null", "unconditional"),
        ("score", "first"),
        ("score_null", "unconditional"),
    ):
        yield Method(
            "published", f"published_{signal}", baseline, f"last of {PUBLISHED.num_inference_steps}", 1, probe="prompt"
        )
    yield Method("bright ending", "bright_ending", "-", LAST_STEP, probe="prompt")
    yield Method(
        "wen norm", "wen", "unconditional", f"all of {GENERATION.num_inference_steps}", localizes=False, probe="-"
    )
    yield Method("clid", "clid", "unconditional", "mean", NULL_DRAWS, localizes=False)
    yield Method("f_mem", "nearest_ratio", "-", "generations", localizes=False, probe="-")
    yield Method("validation loss", "held_out_loss", "first", "mean", LEVELS.draws, localizes=False, probe="-")
    yield Method("all ones", "ones")


def maps_of(method: Method, run: Finished, step: int) -> dict[str, np.ndarray]:
    """The map of every item at an event, ``(h, w)`` float64. Empty where the method has none, or not at this event."""
    last = run.steps[-1]
    if not method.localizes or (method.only_last and step != last):
        return {}
    if method.method in ("published", "bright ending"):
        return {i.name: run.tensors(step)[f"{i.name}/{method.signal}"].double().numpy() for i in run.items}
    if method.probe == "prompt":
        return {i.name: _prompt_map(method.signal, run, i.name, step).double().numpy() for i in run.items}
    side = run.measurement(run.items[0].name, step).rho.samples.shape[-1]
    if method.signal == "ones":
        return {i.name: np.ones((side, side)) for i in run.items}
    if method.signal == "trend":
        past = [s for s in run.steps if 0 < s <= step][-3:]
        levels = {
            i.name: torch.stack([level_maps("log_ratio", method, run, i, s) for s in past]).mean(0) for i in run.items
        }
    else:
        signal = "log_ratio" if method.signal == "standardized" else method.signal
        levels = {i.name: level_maps(signal, method, run, i, step) for i in run.items}
    if method.signal == "standardized":
        controls = torch.stack([levels[i.name] for i in run.items if i.kind is Kind.CONTROL])
        levels = {name: (x - controls.mean(0)) / controls.std(0).clamp(min=1e-6) for name, x in levels.items()}
    if method.level in COMBINATIONS:
        gates = {i.name: level_maps("free", method, run, i, step).bool() for i in run.items}
        combined = {
            name: combine_levels(CurvatureMap(x[:, None]), gates[name], method.level).mean for name, x in levels.items()
        }
    else:
        index = [str(t) for t in LEVELS.timesteps].index(method.level)
        combined = {name: x[index] for name, x in levels.items()}
    return {name: x.double().numpy() for name, x in combined.items()}


def baseline_step(method: Method, run: Finished, step: int) -> int:
    earlier = [s for s in run.steps if s < step] or [step]
    lags = {"previous": 1, "lag:2": 2}
    snapshot = method.baseline.removesuffix(" and unconditional")
    return earlier[-min(lags[snapshot], len(earlier))] if snapshot in lags else run.steps[0]


def level_maps(signal: str, method: Method, run: Finished, item: Item, step: int) -> Tensor:
    """Smoothed maps ``(levels, h, w)`` of one signal; kept, so not to be written to."""
    return _level_maps(signal, run, item.name, step, baseline_step(method, run, step), method.draws)


@lru_cache(maxsize=60_000)
def _level_maps(signal: str, run: Finished, name: str, step: int, earlier: int, draws: int) -> Tensor:
    now, base = run.measurement(name, step).first(draws), run.measurement(name, earlier).first(draws)
    rho, rho_base = now.rho.smooth(SMOOTH), base.rho.smooth(SMOOTH)
    if signal == "free":
        return free(rho_base).float() if draws > 1 else torch.ones_like(rho_base.mean)
    eps = run.true_noise(name)[:, :draws]
    by_name: dict[str, Callable[[], Tensor]] = {
        "collapse": lambda: collapse(rho_base, rho).mean,
        "log_ratio": lambda: log_ratio(rho_base, rho).mean,
        "log_ratio_unfloored": lambda: torch.log(
            rho_base.mean.clamp(min=SMALLEST_RHO) / rho.mean.clamp(min=SMALLEST_RHO)
        ),
        "loss_log_ratio": lambda: loss_log_ratio(eps, now.epsilon, base.epsilon).smooth(SMOOTH).mean,
        "score": lambda: score_difference(now.epsilon, base.epsilon).smooth(SMOOTH).mean,
        "raw": lambda: raw_curvature(rho).mean,
        "spread": lambda: _spread_ratio(now.epsilon - eps, base.epsilon - eps),
        "smaller": lambda: torch.minimum(by_name["log_ratio"](), by_name["loss_log_ratio"]()),
        "both": lambda: (by_name["log_ratio"]() + by_name["loss_log_ratio"]()) / 2,
        "both_baselines": lambda: torch.minimum(by_name["both"](), by_name["both_null"]()),
        "log_ratio_baselines": lambda: torch.minimum(by_name["log_ratio"](), by_name["log_ratio_null"]()),
    }
    if signal in NULL_SIGNALS or signal in JOINED:
        null = run.measurement(f"null/{name}", step).first(min(draws, NULL_DRAWS))
        beside = now.first(null.draws)
        rho_null, rho_beside = null.rho.smooth(SMOOTH), beside.rho.smooth(SMOOTH)
        by_name |= {
            "collapse_null": lambda: collapse(rho_null, rho_beside).mean,
            "log_ratio_null": lambda: log_ratio(rho_null, rho_beside).mean,
            "score_null": lambda: score_difference(beside.epsilon, null.epsilon).smooth(SMOOTH).mean,
            "loss_log_ratio_null": lambda: (
                loss_log_ratio(eps[:, : null.draws], beside.epsilon, null.epsilon).smooth(SMOOTH).mean
            ),
            "both_null": lambda: (by_name["log_ratio_null"]() + by_name["loss_log_ratio_null"]()) / 2,
        }
    return by_name[signal]()


def _prompt_map(signal: str, run: Finished, name: str, step: int) -> Tensor:
    """One signal of a prompt probe, at the only level it has."""
    now, first, null = (run.measurement(f"{key}/{name}", step) for key in ("prompt", "prompt_first", "prompt_null"))
    found: CurvatureMap = compute_signals(now, first, null, None, smooth=SMOOTH).maps()[signal]
    return (found.smooth(SMOOTH) if signal.startswith("score") else found).mean[0]  # a score comes unsmoothed


def _spread_ratio(error_now: Tensor, error_base: Tensor) -> Tensor:
    """Log ratio of the variances of z_0-hat over noise draws: ``z_0-hat - z_0`` is the error of epsilon times sigma / alpha. Forward only."""
    variances = [
        CurvatureMap(e.var(1).mean(1)[:, None]).smooth(SMOOTH).mean.clamp(min=1e-12) for e in (error_base, error_now)
    ]
    return torch.log(variances[0] / variances[1])


def scores_of(method: Method, run: Finished, step: int) -> dict[str, float]:
    """One number a probe: the largest value of its map, or the rival's own. Larger is more suspicious."""
    if method.method == "wen norm":
        return {name: float(value) for name, value in run.numbers[step]["wen"].items()}
    if method.method == "clid":
        return {i.name: _clid(run, i.name, step) for i in run.items}
    if method.method == "f_mem":  # the nearest generation, over the whole picture
        return {name: -min(ratios) for name, ratios in run.numbers[step]["nearest_ratio"].items()}
    if method.method == "validation loss":  # one number for the whole run: how far above its lowest so far
        losses = [_held_out_loss(run, s) for s in run.steps if s <= step]
        return dict.fromkeys((i.name for i in run.items), losses[-1] - min(losses))
    if method.method == "bright ending":  # concentration: what share of the attention lies in its brightest tenth
        return {
            name: float(np.sort(m, axis=None)[-max(1, m.size // 10) :].sum() / m.sum())
            for name, m in maps_of(method, run, step).items()
        }
    return {name: float(m.max()) for name, m in maps_of(method, run, step).items()}


def bar_of(method: Method, run: Finished, scores: dict[str, float]) -> float:
    """What a score must exceed to count towards an alert: every control's, or nothing where the score is the run's and not a probe's."""
    return 0.0 if method.method == "validation loss" else max(scores[item.name] for item in run.of_kind(Kind.CONTROL))


@lru_cache(maxsize=64)
def _held_out_loss(run: Finished, step: int) -> float:
    """Mean denoising loss of the held-out photos at fixed levels under fixed noise."""
    losses = [
        (run.measurement(i.name, step).epsilon - run.true_noise(i.name)).square().mean()
        for i in run.of_kind(Kind.HELD_OUT)
    ]
    return float(torch.stack(losses).mean())


def _clid(run: Finished, name: str, step: int) -> float:
    """Unconditional minus conditional denoising loss, same noise, mean over levels and draws (Zhai et al. 2024; sign: larger is a member)."""
    eps = run.true_noise(name)[:, :NULL_DRAWS]
    null, now = run.measurement(f"null/{name}", step), run.measurement(name, step).first(NULL_DRAWS)
    return float((null.epsilon - eps).square().mean() - (now.epsilon - eps).square().mean())
