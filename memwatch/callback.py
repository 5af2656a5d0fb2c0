"""MemWatch: the loop's contract, the run's state, and the conductor of one event."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from memwatch.config import MemWatchConfig, require
from memwatch.config_file import load_config
from memwatch.denoiser import Components, as_tuple
from memwatch.faults import Faults
from memwatch.guard import GuardedLoader, hook_end_training
from memwatch.judge.alerts import ProbeState, Verdict
from memwatch.judge.findings import judge_event
from memwatch.judge.stop import StopState, decide_stop
from memwatch.measure.baselines import Baselines, open_stores
from memwatch.measure.measurement import Observation
from memwatch.measure.observer import Observer
from memwatch.measure.weights import read_safetensors
from memwatch.ranks import Ranks
from memwatch.report.files import FileSink
from memwatch.report.heatmap import pictures_of
from memwatch.report.report import Report
from memwatch.report.sinks import Sinks

logger = logging.getLogger("memwatch")

LOOKING = "looking at the model"


class MemWatch:
    """Watches a Stable Diffusion fine-tune for what it stores.

    Construct it after ``accelerator.prepare`` and ``init_trackers`` and before ``load_state``. The loop that it
    expects::

        watch = MemWatch(accelerator, unet, path, probes=..., controls=...)
        for batch in watch.guard(train_dataloader):
            ...                                # one optimizer step
            watch.on_step_end(global_step)     # on every rank
        accelerator.end_training()             # closes the watch as well

    Args:
        accelerator: the loop's.
        model: what the loop trains: prepared, compiled, PEFT-wrapped.
        pretrained: folder, hub id or ``DiffusionPipeline``. Parts that are not passed are loaded from it, used, and
            freed.
        config: YAML file, dict or ``MemWatchConfig``.
        probes: prompts, ``Probe``s, image folder, text file of prompts, or a dataset; goes before the config's.
        controls: the same, of the training data's own kind but held out; without them alerts are uncalibrated.
        vae, text_encoder, tokenizer, scheduler: used instead of ``pretrained``'s. Several text encoders are a list in
            the pipeline's order, with ``None`` for those to be loaded. If any is trained (also a textual inversion's
            embedding), prompts are encoded afresh at every event.
        ema: diffusers' ``EMAModel`` of ``model``, for ``weights: ema``.
        overrides: top-level config keys.

    Attributes:
        config: as it was read. ``observer``, ``baselines``, ``faults``, ``sinks``: the parts that do the work.

    Raises:
        ConfigError: wrong configuration.
        ProbeError: unusable probe.
        ValueError: unknown model family, or something missing.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        pretrained: Any = None,
        *,
        config: Any = None,
        probes: Any = None,
        controls: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scheduler: Any = None,
        ema: Any = None,
        **overrides: Any,
    ) -> None:
        self.accelerator = accelerator
        self.config: MemWatchConfig = load_config(config, **overrides)
        self.ranks = Ranks.of(accelerator)
        given = Components(scheduler, vae, as_tuple(text_encoder), as_tuple(tokenizer))
        kind, file = self.config.signals.baseline_parts
        allowed = "path: and an existing safetensors file"
        require(kind != "path" or Path(file).is_file(), "signals.baseline", self.config.signals.baseline, allowed)
        self.observer = Observer(
            self.ranks, model, pretrained, given, config=self.config, probes=probes, controls=controls, ema=ema
        )
        folder = Path(self.config.output_dir)
        stores = open_stores(folder, self.config.snapshots, self.ranks)
        fixed = self.observer.weights_without_lora if kind == "base" else lambda: read_safetensors(Path(file))
        self.baselines = Baselines(self.config.signals, *stores, fixed)
        self.faults = Faults(strict=self.config.strict)
        self.sinks = Sinks(FileSink(folder), self.faults)
        self._states: dict[str, ProbeState] = {}
        self._stop, self._closed = StopState(), False
        self._last_step: int | None = None
        accelerator.register_for_checkpointing(self)
        hook_end_training(self.accelerator, self.close)
        self._say_hello()

    # --- what the loop calls -----------------------------------------------------------------------------------------

    def guard(self, dataloader: Any) -> Any:
        """``dataloader``, but the baseline comes before its first batch, and iteration ends when a stop is decided."""
        return GuardedLoader(dataloader, self.begin, lambda: self.should_stop)

    def begin(self, step: int = 0) -> Report | None:
        """Take the first baseline, unless there is one. ``guard`` calls it; a loop without it may, on every rank."""
        return self._event(step) if self._last_step is None else None

    def on_step_end(self, step: int) -> Report | None:
        """Call after every optimizer step, on every rank. Returns the event's report, or ``None`` when none is due."""
        if self._last_step is None:
            hint = "iterate over watch.guard(dataloader)"
            logger.warning("memwatch takes its first baseline only now, after step %d: %s", step, hint)
            return self._event(step)
        every = self.config.every_steps
        return self._event(step) if step // every > self._last_step // every else None  # also when numbers are skipped

    @property
    def should_stop(self) -> bool:
        return self._stop.reason is not None

    @property
    def stop_reason(self) -> str | None:
        return self._stop.reason

    def close(self) -> None:
        """Close the sinks; safe to call again."""
        if not self._closed:
            self._closed = True
            self.sinks.close()

    # --- one event ---------------------------------------------------------------------------------------------------

    def _event(self, step: int) -> Report | None:
        """observe -> remember -> maps, regions, calibration, verdicts -> stop -> report -> sinks."""
        if self._closed or self.faults.is_off(LOOKING):
            return None
        self._last_step = step
        started = time.perf_counter()
        observations = self._observe(step)
        if observations is None:
            return None
        self.baselines.remember(step, observations, self.observer.trainable_weights, self.faults)
        self.accelerator.wait_for_everyone()  # what one process wrote the others will read
        findings, controls, self._states = judge_event(observations, self._states, step, self.config)
        self._stop = self.ranks.broadcast(decide_stop(self._stop, findings, step, self.config.stop))
        report = Report(
            step,
            self.config,
            findings=tuple(findings),
            controls=controls,
            calibrated=self.observer.has_controls,
            seconds=time.perf_counter() - started,
            errors=self.faults.count,
            stop_reason=self.stop_reason,
            pictures=pictures_of(findings, self.config) if self.accelerator.is_main_process else {},
        )
        if self.accelerator.is_main_process:
            hook_end_training(self.accelerator, self.close)
            self.sinks.write(report, self.accelerator.trackers)
            tqdm.write(report.summary())
        return report

    def _observe(self, step: int) -> list[Observation] | None:
        """Every rank looks at its share, and all get everything in the order of the probes.

        A failure on one rank is one on all.
        """
        mine: list[Observation] = []
        error: Exception | None = None
        last_clean = {name: state.last_clean for name, state in self._states.items()}
        hidden = not self.accelerator.is_main_process
        try:
            with self.observer.borrowed():
                share = self.ranks.share(self.observer.probes)  # as a trained text encoder understands them now
                said = f"memwatch step {step}"
                with tqdm(total=len(share), desc=said, leave=False, disable=hidden, unit="probe") as bar:
                    mine = self.observer.observe(share, self.baselines, last_clean, bar.update)
        except Exception as caught:  # a monitor never kills a run
            error = caught
        observations, failed = self.ranks.gather(mine, repr(error) if error else None)
        if failed is not None:
            self.faults.failed(LOOKING, failed, error)
            return None
        self.faults.worked(LOOKING)
        return self.observer.in_order(observations)

    # --- telling -----------------------------------------------------------------------------------------------------

    def _say_hello(self) -> None:
        """What will be watched, and what stands in the way of it."""
        c, observer, probes = self.config, self.observer, [p.probe for p in self.observer.probes]
        num_controls = sum(probe.is_control for probe in probes)
        num_references = sum(probe.is_reference and not probe.is_control for probe in probes)
        if observer.unconditional is None and c.signals.unconditional:
            logger.info("memwatch: this model has no unconditional branch; only snapshot baselines are used")
        if not any(p.requires_grad for p in observer.model.parameters()) and not observer.trains_text:
            found = "neither the model nor a text encoder passed to memwatch has trainable parameters"
            logger.warning("memwatch: %s; nothing can change", found)
        if not num_controls:
            consequence = "maps are shown, but alerts are uncalibrated and nothing is called memorized"
            logger.warning("memwatch has no controls: %s", consequence)
        elif 1 / (1 + num_controls) > (max_p := c.alerts.max_p):
            needed = math.ceil(1 / max_p) - 1
            logger.warning("memwatch: %d controls cannot give p <= %g; it takes %d", num_controls, max_p, needed)
        if self.accelerator.is_main_process:
            logger.info(
                f"memwatch: {observer.denoiser.name}, {observer.denoiser.schedule.prediction_type}; {num_references} "
                f"reference and {len(probes) - num_controls - num_references} prompt probes, {num_controls} controls; "
                f"timesteps {c.levels.timesteps}, {c.levels.draws} draws, {c.curvature.vectors} vectors; "
                f"baseline {c.signals.baseline}; every {c.every_steps} steps; {c.output_dir}"
            )

    # --- resume ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values only; measurements and weights lie in ``output_dir``."""
        return {
            "last_step": self._last_step,
            "errors": self.faults.count,
            "stop": asdict(self._stop),
            "states": {name: asdict(state) | {"verdict": str(state.verdict)} for name, state in self._states.items()},
            **self.baselines.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; what was written after it is forgotten."""
        self._last_step, self.faults.count = state["last_step"], state["errors"]
        self._stop = StopState(**state["stop"])
        saved = state["states"].items()
        self._states = {name: ProbeState(**(s | {"verdict": Verdict(s["verdict"])})) for name, s in saved}
        if not self.baselines.load_state_dict(state):
            missing = f"some earlier baselines are missing from {self.config.output_dir}"
            logger.warning("memwatch: %s; later ones are used instead", missing)
        if self._last_step is not None and self.accelerator.is_main_process:
            with self.faults.surviving("rewinding the history", "it keeps the events after this checkpoint"):
                self.sinks.files.rewind(self._last_step)
