"""MemWatch: the loop's contract, the run's state, and the conductor of one event."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from memwatch.act.actions import Actions, refuse_other_controls
from memwatch.act.flagged import Flagged
from memwatch.config import MemWatchConfig, require
from memwatch.config_file import load_config
from memwatch.denoiser import Components, as_tuple
from memwatch.faults import Faults, PartError
from memwatch.guard import GuardedLoader, hook_end_training, hook_log, rows_in, rows_per_device
from memwatch.judge.compared import Screened
from memwatch.judge.findings import Judgement, judge_event
from memwatch.judge.proof import prove
from memwatch.judge.screen import LOOKING, SCREENING, observe
from memwatch.judge.stop import EXIT_CODE, decide_stop
from memwatch.measure.baselines import Baselines, open_stores
from memwatch.measure.measurement import Observation, fingerprints
from memwatch.measure.observer import Observer
from memwatch.measure.weights import read_safetensors
from memwatch.pace import Prices, choose_pace, planned_events
from memwatch.picking.for_run import for_run
from memwatch.ranks import Ranks
from memwatch.report.about import About
from memwatch.report.files import FileSink
from memwatch.report.startup_log import say_hello, say_pace
from memwatch.report.report import Report
from memwatch.report.sinks import Sinks
from memwatch.resume import Progress, hook_checkpoints, warn_of_baselines, with_evidence
from memwatch.run_folder import RunFolder

logger = logging.getLogger("memwatch")

ENTERING, KEEPING = "making room in output_dir", "keeping what was seen"
JUDGING, STOPPING, REPORTING = "judging what was seen", "deciding whether to stop", "writing the report"
RESUMING, NOTING = "going on from the checkpoint", "noting a validation loss"
READING = "telling epsilon from v_prediction"
SAVING = "saving a checkpoint before the stop"


class MemWatch:
    """Watches a Stable Diffusion fine-tune for what it stores.

    Construct it after ``accelerator.prepare`` and ``init_trackers`` and before ``load_state``. The loop that it
    expects::

        picked = memwatch.pick(dataset["train"])       # before transforms and DataLoader; train on picked.train
        ...
        watch = MemWatch(accelerator, unet, path, picked, scheduler=noise_scheduler)
        for batch in watch.guard(train_dataloader):
            ...                                # one optimizer step
            watch.on_step_end(global_step)     # on every rank
        accelerator.end_training()             # closes the watch as well

    A checkpoint of ``accelerator.save_state`` holds memwatch's state as ``memwatch.json``, and ``load_state`` goes on
    from it in the same ``output_dir``. One that was saved without memwatch is loaded as well, and memwatch starts
    afresh; one with that file is loaded without memwatch, too. A run that starts afresh where another has left files
    moves those to ``output_dir/earlier/NNNN``.

    Args:
        accelerator: the loop's.
        model: what the loop trains: prepared, compiled, PEFT-wrapped.
        pretrained: folder, hub id or ``DiffusionPipeline``. Parts that are not passed are loaded from it, used, and
            freed.
        picked: what ``memwatch.pick`` has returned, or a folder that ``memwatch pick`` has written.
        config: YAML file, dict or ``MemWatchConfig``.
        probes: prompts, ``Probe``s, image folder, text file of prompts, or rows with image and text, besides those
            picked; goes before the config's.
        controls: the same, of the training data's own kind but held out; without any controls alerts are uncalibrated.
        peers: the same, ordinary training images, as a second reference.
        vae, text_encoder, tokenizer, scheduler: used instead of ``pretrained``'s. Several text encoders are a list in
            the pipeline's order, with ``None`` for those to be loaded. If any is trained (also a textual inversion's
            embedding), prompts are encoded afresh at every event.
        ema: diffusers' ``EMAModel`` of ``model``, for ``weights: ema``, and for what is rolled back to.
        on_alert: called with every ``Alert`` on the main process: one callable or several. What it raises is counted.
        overrides: top-level config keys.

    Attributes:
        config: as it was read, with an absolute ``output_dir``, since a script may change its working directory.
        about: what stays the same over the run. picked: what was picked from the training set; ``None`` without it.
        observer, baselines, faults, sinks: the parts that do the work.

    Raises:
        ConfigError: wrong configuration, or another live run in ``output_dir``.
        ProbeError: unusable probe.
        ValueError: unknown model family, or something missing.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        pretrained: Any = None,
        picked: Any = None,
        *,
        config: Any = None,
        probes: Any = None,
        controls: Any = None,
        peers: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scheduler: Any = None,
        ema: Any = None,
        on_alert: Any = None,
        **overrides: Any,
    ) -> None:
        self.accelerator = accelerator
        wanted = load_config(config, **overrides)
        self.config: MemWatchConfig = replace(wanted, output_dir=str(Path(wanted.output_dir).absolute()))
        self.ranks = Ranks.of(accelerator)
        given = Components(scheduler, vae, as_tuple(text_encoder), as_tuple(tokenizer))
        kind, file = self.config.signals.baseline_parts
        allowed = "path: and an existing safetensors file"
        outside = Path(file).absolute()
        require(kind != "path" or outside.is_file(), "signals.baseline", self.config.signals.baseline, allowed)
        has_rotation = self.config.screens and self.ranks.swappable
        run = for_run(picked, self.config, probes, controls, peers, has_rotation=has_rotation)
        self.picked = run.picked
        self.observer = Observer(
            self.ranks,
            model,
            pretrained,
            given,
            config=self.config,
            probes=run.probes or None,
            controls=run.controls or None,
            peers=run.peers or None,
            ema=ema,
        )
        self.folder = RunFolder(Path(self.config.output_dir))
        stores = open_stores(self.folder.folder, self.ranks)
        fixed = self.observer.weights_without_lora if kind == "base" else lambda: read_safetensors(outside)
        reading = self.observer.denoiser.schedule.prediction_type
        marks = fingerprints(self.config, self.observer.prepared, str(accelerator.mixed_precision), reading)
        self.baselines = Baselines(self.config.signals, *stores, fixed, marks)
        self.faults = Faults(strict=self.config.strict)
        self.actions = Actions(self.config, self.observer, self.faults, run.picked, run.control_keys, on_alert)
        self.sinks = Sinks(FileSink(self.folder.folder), self.faults, self.actions.sinks)
        self.about = replace(About.of(self.observer), settings=wanted.to_show())  # no folder of this machine in it
        self._progress, self._closed = self._fresh(), False
        free = self.ranks.broadcast(self.folder.lock() if accelerator.is_main_process else True)
        require(free, "output_dir", self.config.output_dir, "a folder that no other live run uses (close() ends one)")
        self._unhook_checkpoints = hook_checkpoints(self)
        hook_end_training(accelerator, self.close)
        hook_log(accelerator, self.note_losses)
        say_hello(self.config, self.observer, () if run.picked is None else run.picked.notes)

    # --- what the loop calls -----------------------------------------------------------------------------------------

    def guard(self, dataloader: Any) -> Any:
        """``dataloader``, but the baseline comes before its first batch, and iteration ends when a stop is decided.

        Batches, sampler and length are its own.

        Raises:
            ConfigError: it gives rows that are held out as controls.
        """
        if (rows := rows_per_device(dataloader, self.accelerator.num_processes)) is not None:
            self.observer.limit_batches(rows)
        self.about = replace(self.about, training_rows=rows_in(dataloader))
        self.actions.guard(dataloader)
        return GuardedLoader(dataloader, self.begin, lambda: self.should_stop, self.actions.on_batch)

    def begin(self, step: int = 0) -> Report | None:
        """Take the first baseline, unless there is one. ``guard`` calls it; a loop without it may, on every rank."""
        if self._progress.last_step is not None:  # the guard calls it at every pass
            return None
        with self._timed(step):
            return self._event(step)

    def on_step_end(self, step: int) -> Report | None:
        """Call after every optimizer step, on every rank. Returns the event's report, or ``None`` when none is due.

        An event that failed has a report, too, with a ``failure`` and no findings.
        """
        if self._closed:
            return None
        with self._timed(step):
            if (last := self._progress.last_step) is None:
                hint = "iterate over watch.guard(dataloader)"
                logger.warning("memwatch takes its first baseline only now, after step %d: %s", step, hint)
                return self._event(step)
            every = self.every_steps
            is_due = every is not None and step // every > last // every  # also when numbers are skipped
            return self._event(step) if is_due else None

    @contextmanager
    def _timed(self, step: int) -> Iterator[None]:
        """Inside is memwatch's time, outside the loop's."""
        clock = self._progress.clock
        clock.arrive(step)
        try:
            yield
        finally:
            clock.leave()

    @property
    def every_steps(self) -> int | None:
        """Optimizer steps between events: the user's, or memwatch's own choice; ``None`` until it has chosen.

        All ranks have timed the same steps by then, and take rank 0's choice.
        """
        progress = self._progress
        known = self.config.every_steps or progress.every_steps
        if known is None and (step_seconds := progress.clock.step_seconds) is not None:
            prices = Prices.of(step_seconds, progress.clock.first, self.observer.passes)
            pace = self.ranks.broadcast(choose_pace(prices, self.config))
            progress.every_steps = pace.every_steps
            if self.accelerator.is_main_process:
                say_pace(pace, self.config)
            return pace.every_steps
        return known

    @property
    def should_stop(self) -> bool:
        return self._progress.stop.reason is not None

    @property
    def stop_reason(self) -> str | None:
        return self._progress.stop.reason

    @property
    def exit_code(self) -> int:
        """For ``sys.exit`` at the end of a script: 3 where memwatch has decided to stop, else 0."""
        return EXIT_CODE if self.should_stop else 0

    def flagged(self) -> list[Flagged]:
        """The training rows behind every alert so far, worst first; the main process knows them."""
        return self.actions.flagged()

    def close(self) -> None:
        """End the events, write ``last_clean``, leave ``output_dir`` to others, and close the sinks.

        Call it on every rank; again is safe.
        """
        if not self._closed:
            self._closed = True
            self.actions.end()
            self._unhook_checkpoints()
            self.folder.release()
            self.sinks.close()

    def note_losses(self, values: Mapping[str, Any], step: int) -> None:
        """Keep the validation losses among what the loop logs; ``losses.jsonl`` and the report page hold them.

        Whatever ``accelerator.log`` gets comes here by itself. A loop that logs elsewhere may call it.
        """
        if self.accelerator.is_main_process and not self._closed:
            with self.faults.surviving(NOTING, "memwatch keeps it, and writes it with the next one"):
                self.sinks.losses.note(values, step)

    # --- one event ---------------------------------------------------------------------------------------------------

    def _event(self, step: int) -> Report | None:
        """screen, observe -> remember -> maps, regions, calibration, verdicts -> proof -> stop -> report -> sinks.

        What fails costs this event, on every rank, and is tried again at the next one.
        """
        if self._closed or any(map(self.faults.is_off, (ENTERING, LOOKING, SCREENING, KEEPING, JUDGING, STOPPING))):
            return None
        started, together, progress = time.perf_counter(), self.ranks.together, self._progress
        judgement, failure = Judgement(), None
        progress.last_step, full = step, self.config.is_full_event(progress.events)
        self.observer.rotate(progress.events, with_evidence(progress.states))
        progress.events += 1
        try:
            seen, screened = self._observe(step, full)
            if misread := self.ranks.broadcast(together(READING, self.faults, lambda: self.observer.misread(seen))):
                raise PartError(misread)
            read = self.observer.trainable_weights
            rotation = [p.name for p in self.observer.rotation]
            together(KEEPING, self.faults, lambda: self.baselines.remember(step, seen, read, self.faults, rotation))
            observations = self.observer.in_order(seen)
            planned = planned_events(self.config.max_train_steps, self.every_steps)
            rotating = self.observer.num_rotating(planned)

            def judged() -> Judgement:
                return judge_event(observations, progress.states, step, self.config, planned, rotating, screened)

            judgement = together(JUDGING, self.faults, judged)
            found = prove(judgement.findings, observations, self.observer, self.faults, progress.stop.copied)
            judgement = replace(judgement, findings=found)
            stop = together(STOPPING, self.faults, lambda: decide_stop(progress.stop, found, step, self.config.stop))
            progress.states, progress.stop = dict(judgement.states), self.ranks.broadcast(stop)
            self.actions.follow(step, judgement)
        except PartError as failed:
            judgement, failure = Judgement(), str(failed)
        self.faults.count = self.ranks.largest(self.faults.count)  # a disk may be full on one machine only
        seconds, calibrated, errors = time.perf_counter() - started, self.observer.has_controls, self.faults.count
        progress.clock.first = progress.clock.first or seconds
        report = Report(step, self.config, judgement, calibrated, seconds, errors, self.stop_reason, failure=failure)
        report = self._write(replace(report, overhead=progress.clock.overhead, about=self.about))
        if progress.stop.reason is not None:
            self._end_well()
        return report

    def _end_well(self) -> None:
        """Once a stop is decided: write the weights of before the first alert, and the checkpoint that is wanted."""
        if self._progress.has_ended_well:
            return
        self._progress.has_ended_well = True
        self.actions.end()
        if self.config.stop.checkpoint:
            with self.faults.surviving(SAVING, "the last one before it is the newest"):
                self.accelerator.save_state(str(self.folder.folder / "stopped"))  # waits for all ranks

    def _observe(self, step: int, full: bool) -> tuple[list[Observation], Screened | None]:
        """What was seen of every probe, the same on every rank, see ``screen.observe``."""
        if not self._progress.has_entered:
            self._enter(self._progress.run)
            self._progress.has_entered = True
        return observe(self.observer, self.baselines, self._progress.states, self.faults, step, full=full)

    def _write(self, report: Report) -> Report:
        """To all sinks, by the main process, which alone draws pictures."""
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        with suppress(PartError):
            if not self.faults.is_off(REPORTING):
                return self.ranks.together(
                    REPORTING, self.faults, lambda: self.sinks.write(report, accelerator.trackers) if main else report
                )
        return report

    # --- run and resume ----------------------------------------------------------------------------------------------

    def _fresh(self) -> Progress:
        """A run that has just begun."""
        return Progress(self.ranks.broadcast(uuid4().hex))

    def _enter(self, run: str) -> None:
        """From now on ``output_dir`` holds the files of this run."""
        main = self.accelerator.is_main_process
        self.ranks.together(ENTERING, self.faults, lambda: self.folder.enter(run) if main else None)
        self.baselines.run = run

    def state_dict(self) -> dict[str, Any]:
        """Plain values only; measurements and weights lie in ``output_dir``."""
        noted = {"faults": self.faults.state_dict(), "losses": self.sinks.losses.count}
        return self._progress.to_dict() | self.baselines.state_dict() | noted | {"actions": self.actions.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, on every rank; what was written after it is forgotten.

        From the state of an older version, and from an empty one, memwatch starts afresh.

        Raises:
            ConfigError: a control was not held out by the run that is resumed.
        """
        refuse_other_controls(self.actions.controls, state.get("actions", {}).get("controls"))
        with suppress(PartError):
            if "run" in state:
                self._enter(state["run"])
                return self.ranks.together(RESUMING, self.faults, lambda: self._restore(state))
        self._progress = self._fresh()
        self.baselines.load_state_dict({"ledger": [], "weights": []})
        self.actions.load_state_dict({}, None)
        if self.accelerator.is_main_process:
            afresh = "it starts afresh from the checkpoint's weights, and its next event takes a new baseline"
            logger.warning("memwatch has no state of its own in this checkpoint; %s", afresh)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._progress = replace(Progress.from_dict(state), has_entered=True)
        self.faults.load_state_dict(state["faults"])
        self.actions.load_state_dict(state.get("actions", {}), self._progress.last_step)
        complete = self.baselines.load_state_dict(state)
        if not self.accelerator.is_main_process:
            return
        warn_of_baselines(self.baselines, [p.probe for p in self.observer.fixed], complete, self.config.output_dir)
        if self._progress.last_step is not None:
            with self.faults.surviving("rewinding the history", "it keeps the events after this checkpoint"):
                self.sinks.files.rewind(self._progress.last_step)
                self.sinks.losses.rewind(state.get("losses", 0))
