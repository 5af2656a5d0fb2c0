"""Events: what one costs on this machine. Whole events of a few probes are timed and multiplied.

What is timed is ``MemWatch`` itself, with everything that belongs to an event: looking, judging, drawing, writing. The
model does not move between the events, so the screen chooses nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from evidence.old.meter import measured, median_seconds
from PIL import Image
from torch import nn

from memwatch.callback import MemWatch
from memwatch.config import MemWatchConfig
from memwatch.denoiser import Components, Denoiser, dtype_of, family_of, load_components
from memwatch.measure.passes import count_passes
from memwatch.measure.probes import Probe
from memwatch.pace import CHOSEN, Pace, Prices, choose_pace, pace_of

FIRST, SCREENED, USUAL, FULL = "first", "screened, nothing chosen", f"screened, {CHOSEN:.0%} measured", "full"
LOOKED_AT = (1, 2)  # probes of each kind: what one more costs, and what an event costs in any case
BASELINE = "baseline"  # what the first full event costs more than others: once in a run
WORDS = "red old quiet tall round bright wooden little".split(), "house cat bridge boat garden street tree lamp".split()


@dataclass(frozen=True)
class Numbers:
    """How many are looked at: reference probes (controls and peers included), and prompt probes."""

    references: int
    prompts: int = 0


@dataclass(frozen=True)
class Setting:
    """A configuration, and in what it differs from the one that was asked for."""

    name: str
    config: MemWatchConfig


@dataclass(frozen=True)
class EventCost:
    """One kind of event.

    Attributes:
        passes: network passes, see ``count_passes``.
        peak: bytes above what the process held before; ``None`` where that cannot be known.
    """

    passes: float
    seconds: float
    peak: int | None


@dataclass(frozen=True)
class SettingCost:
    """Every kind of event under one setting.

    Attributes:
        baseline: seconds that the first full event takes longer, since it measures the baseline as well.
        ledger, weights: bytes that one event leaves on disk.
    """

    setting: Setting
    events: dict[str, EventCost]
    baseline: float
    ledger: int
    weights: int

    def pace(self, step_seconds: float, steps: int) -> Pace:
        """How often memwatch looks in a run of ``steps``, and the share of training time that this takes."""
        config = replace(self.setting.config, max_train_steps=steps)
        first, every = self.events[FIRST].seconds + self.baseline, config.every_steps
        usual, full = self.events.get(USUAL, self.events[FULL]).seconds, self.events[FULL].seconds
        more = full - self.events[SCREENED].seconds if SCREENED in self.events else 0.0
        prices = Prices(step_seconds, first, usual, max(0.0, more))
        if every is None:
            return choose_pace(prices, config)
        fulls = more / config.full_every if steps // every >= config.full_every else 0.0
        return pace_of(every, usual + fulls, prices, config)


def varied(config: MemWatchConfig) -> Iterator[Setting]:
    """The settings that people turn, one at a time."""
    levels, curvature = config.levels, config.curvature
    for draws in (1, 2, 4) if config.screens else ():
        if draws != levels.screen_draws and draws <= levels.draws:
            yield Setting(f"levels.screen_draws: {draws}", replace(config, levels=replace(levels, screen_draws=draws)))
    for draws in (4, 8):
        if draws != levels.draws and draws >= levels.screen_draws:
            yield Setting(f"levels.draws: {draws}", replace(config, levels=replace(levels, draws=draws)))
    for vectors in (2, 4, 8):
        if vectors != curvature.vectors:
            yield Setting(
                f"curvature.vectors: {vectors}", replace(config, curvature=replace(curvature, vectors=vectors))
            )


def event_passes(config: MemWatchConfig, numbers: Numbers, branches: int) -> dict[str, float]:
    """Network passes of every kind of event; the first one has no earlier weights to look at prompts with."""
    passes = count_passes(config, numbers.references, numbers.prompts, branches=branches)
    references = count_passes(config, numbers.references, 0, branches=branches)
    screen, full = (
        (theirs + all_) / 2 for theirs, all_ in ((references.screen, passes.screen), (references.full, passes.full))
    )
    if not config.screens:
        return {FIRST: full + passes.sampling, FULL: passes.of_event(1)}
    events = {SCREENED: passes.of_event(0), USUAL: passes.of_event(CHOSEN), FULL: passes.of_event(1)}
    return {FIRST: screen + passes.sampling, **events}


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, memwatch says nothing of its made-up probes, and prints no summary of an event."""
    logger = logging.getLogger("memwatch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Workbench:
    """A model with everything that an event needs, and a folder for what events write.

    Args:
        source: the pipeline that the parts come from.
        parts: text encoders, autoencoder and scheduler, loaded once.
        resolution: of the made-up images; ``None`` takes the model's own.
        clock: what is read before and after an event, seconds.
    """

    accelerator: Any
    model: nn.Module
    source: str
    resolution: int | None
    clock: Callable[[], float] = time.perf_counter
    parts: Components = field(init=False)

    def __post_init__(self) -> None:
        family = family_of(self.model)
        self.parts = load_components(
            self.source,
            Components(None),
            needs_vae=not family.in_pixels,
            text_encoders=family.text_encoders,
            optional=family.optional,
            device=self.accelerator.device,
            dtype=dtype_of(self.model),
        )

    @contextmanager
    def watch(self, config: MemWatchConfig, probes: Sequence[Probe]) -> Iterator[MemWatch]:
        """memwatch on these probes, due at every step; every other event is full."""
        parts, encoders = self.parts, list(self.parts.text_encoders)
        with quiet(), TemporaryDirectory(prefix="memwatch-cost-") as folder:
            ours: dict[str, Any] = {"every_steps": 1, "full_every": 2, "strict": True, "weights": "live"}
            ours |= {"probes": None, "controls": None, "peers": None, "resolution": self.resolution}
            watch = MemWatch(
                self.accelerator,
                self.model,
                self.source,
                config=replace(config, **ours, output_dir=folder),
                probes=probes,
                vae=parts.vae,
                scheduler=parts.scheduler,
                **({"text_encoder": encoders, "tokenizer": list(parts.tokenizers)} if encoders else {}),
            )
            try:
                yield watch
            finally:
                watch.close()

    def probes(self, number: int, is_reference: bool) -> list[Probe]:
        """Made-up captions, with images of smooth noise where they are reference probes."""
        side = self.resolution or 512  # memwatch resizes it
        return [Probe(caption(i), smooth_noise(i, side) if is_reference else None) for i in range(number)]

    def measure(self, setting: Setting, numbers: Numbers, tick: Callable[[], object] = lambda: None) -> SettingCost:
        """Time the events of ``LOOKED_AT`` probes of each kind, and multiply.

        Args:
            tick: called ``ticks`` times.
        """
        kinds = [(True, numbers.references), (False, numbers.prompts)]
        found = [self._of_kind(setting, kind, number, tick) for kind, number in kinds if number]
        branches = found[0].branches
        seconds = {name: sum(one.seconds[name] for one in found) for name in found[0].seconds}
        peaks = {name: _largest([one.peaks[name] for one in found]) for name in found[0].peaks}
        if SCREENED in seconds:
            seconds[USUAL] = seconds[SCREENED] + CHOSEN * max(0.0, seconds[FULL] - seconds[SCREENED])
            peaks[USUAL] = peaks[FULL]
        passes = event_passes(setting.config, numbers, branches)
        events = {name: EventCost(n, seconds[name], peaks[name]) for name, n in passes.items()}
        ledger, weights = sum(one.ledger for one in found), max(one.weights for one in found)
        return SettingCost(setting, events, seconds.get(BASELINE, 0.0), ledger, weights)

    @staticmethod
    def ticks(numbers: Numbers) -> int:
        """How often ``measure`` ticks."""
        return len(LOOKED_AT) * ((numbers.references > 0) + (numbers.prompts > 0))

    def _of_kind(self, setting: Setting, is_reference: bool, number: int, tick: Callable[[], object]) -> _OfKind:
        runs = []
        for n in LOOKED_AT:
            runs.append(self._run(setting.config, self.probes(n, is_reference)))
            tick()
        one, two = runs
        seconds = {name: multiplied(one.seconds[name], two.seconds[name], number) for name in one.seconds}
        if BASELINE in seconds:
            seconds[BASELINE] = max(0.0, seconds[BASELINE] - seconds[FULL])
        ledger = one.ledger + (number - 1) * max(0, two.ledger - one.ledger)
        return replace(two, seconds=seconds, ledger=ledger)

    def _run(self, config: MemWatchConfig, probes: Sequence[Probe]) -> _OfKind:
        """The first event and those after it: screened, full with the baseline, screened, full."""
        seconds: dict[str, float] = {}
        peaks: dict[str, int | None] = {}
        names = [FIRST, SCREENED, BASELINE, SCREENED, FULL] if config.screens else [FIRST, FULL, FULL]
        with self.watch(config, probes) as watch:
            for step, name in enumerate(names):
                with measured(self.clock) as event:
                    watch.on_step_end(step) if step else watch.begin()
                seconds[name] = min(event.seconds, seconds.get(name, event.seconds))
                peaks[name] = _largest([event.peak, peaks.get(name)])
            ledger, weights = (size_of(watch.folder.folder / part) for part in ("ledger", "snapshots"))
        return _OfKind(seconds, peaks, ledger, weights, watch.observer.branches)

    def step_seconds(self, batch_size: int) -> float:
        """Of a training step of this very model: AdamW on all parameters, at ``batch_size``. Call it last.

        The learning rate is 0; only the time counts.
        """
        with self.watch(MemWatchConfig(), self.probes(1, is_reference=False)) as watch:
            observer = watch.observer
            denoiser, side, said = observer.denoiser, observer.side, observer.probes[0].conditioning
        shape, device = (batch_size, denoiser.latent_channels, side, side), denoiser.device
        x, timesteps = torch.randn(shape, device=device), torch.full((batch_size,), 500, device=device)
        return median_seconds(training_step(denoiser, x, timesteps, denoiser.stack([said] * batch_size)))


@dataclass(frozen=True)
class _OfKind:
    """What the events of one kind of probe took, and left on disk."""

    seconds: dict[str, float]
    peaks: dict[str, int | None]
    ledger: int
    weights: int
    branches: int


def multiplied(one: float, two: float, number: int) -> float:
    """Seconds of ``number`` probes, from those of one and of two.

    >>> multiplied(3.0, 5.0, 10)
    21.0
    """
    more = two - one if two > one else two / 2  # noise: nothing costs less than nothing
    return max(0.0, one - more) + number * more


def training_step(denoiser: Denoiser, x: torch.Tensor, timesteps: torch.Tensor, said: Any) -> Callable[[], None]:
    """A step of training by mean squared error."""
    model = denoiser.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def step() -> None:
        with torch.enable_grad():
            loss = (denoiser(x, timesteps, said) - x).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _largest(peaks: Sequence[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def caption(index: int) -> str:
    """One of 512 made-up captions."""
    adjectives, nouns = WORDS
    first, rest = index % 8, index // 8
    return f"a {adjectives[first]} {nouns[rest % 8]} and a {nouns[(first + rest // 8 + 3) % 8]}"


def smooth_noise(seed: int, side: int) -> Image.Image:
    """A picture of coloured blobs, ``side`` pixels wide."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
