"""MemWatch: the loop's contract and the run's state. ``event`` conducts one event."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from memwatch.act.actions import Actions, refuse_other_controls
from memwatch.act.flagged import Flagged
from memwatch.act.stop import EXIT_CODE
from memwatch.config import MemWatchConfig, require
from memwatch.config_file import load_config
from memwatch.denoiser import Components, as_tuple
from memwatch.event import NEEDED, Observed, conduct, looks_in, observe_all
from memwatch.faults import Faults, PartError
from memwatch.guard import GuardedLoader, hook_end_training, hook_log, rows_in, rows_per_device
from memwatch.judge.findings import Judgement
from memwatch.measure.baselines import Baselines, open_stores
from memwatch.measure.measurement import fingerprints
from memwatch.measure.observer import Observer
from memwatch.measure.weights import read_safetensors
from memwatch.pace import Prices, choose_pace, planned_events
from memwatch.picking.for_run import for_run
from memwatch.ranks import Ranks
from memwatch.report.about import About, say_hello, say_pace, say_threshold
from memwatch.report.files import FileSink
from memwatch.report.report import Report
from memwatch.report.sinks import Sinks
from memwatch.resume import Progress, hook_checkpoints, warn_of_baselines
from memwatch.run_folder import RunFolder

logger = logging.getLogger("memwatch")

ENTERING, RESUMING, NOTING = "preparing output_dir", "resuming from the checkpoint", "noting a validation loss"


class MemWatch:
    """Watches a Stable Diffusion fine-tune for what the model stores of its training images.

    Construct it after ``accelerator.prepare`` and ``init_trackers`` and before ``load_state``, for a loop like this::

        picked = memwatch.pick(dataset["train"])       # before transforms and DataLoader; train on picked.train
        ...
        watch = MemWatch(accelerator, unet, path, picked, scheduler=noise_scheduler)
        for batch in watch.guard(train_dataloader):
            ...                                # one optimizer step
            watch.on_step_end(global_step)     # on every rank
        accelerator.end_training()             # closes the watch as well

    ``accelerator.save_state`` saves memwatch's state as ``memwatch.json``, and ``load_state`` resumes from it in the
    same ``output_dir``. From a checkpoint without that file memwatch starts afresh. A run that starts afresh moves the
    files of another run in ``output_dir`` to ``output_dir/earlier/NNNN``.

    Args:
        accelerator: the loop's.
        model: what the loop trains: prepared, compiled, PEFT-wrapped.
        pretrained: folder, hub id or ``DiffusionPipeline``. Parts that are not passed are loaded from it, used, and
            freed.
        picked: what ``memwatch.pick`` has returned, or a folder that ``memwatch pick`` has written.
        config: YAML file, dict or ``MemWatchConfig``.
        probes: prompts, ``Probe``s, image folder, text file of prompts, or rows with image and text, besides those
            picked; replaces the config's.
        controls: the same, of the training data's own kind but held out; without any controls alerts are uncalibrated.
        vae, text_encoder, tokenizer, scheduler: used instead of ``pretrained``'s. Several text encoders are a list in
            the pipeline's order, with ``None`` for those to be loaded. If any is trained (also a textual inversion's
            embedding), prompts are encoded anew at every event.
        ema: diffusers' ``EMAModel`` of ``model``, for ``weights: ema``, and for ``last_clean``.
        on_alert: called with every ``Alert`` on the main process: one callable or several. Its errors are counted.
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
        kind, file = wanted.signals.baseline_parts
        outside, allowed = Path(file).absolute(), "path: and an existing safetensors file"
        require(kind != "path" or outside.is_file(), "signals.baseline", wanted.signals.baseline, allowed)
        run = for_run(picked, wanted, probes, controls, has_rotation=wanted.screens and self.ranks.swappable)
        self.picked = run.picked
        watched = {"probes": run.probes or None, "controls": run.controls or None}
        self.observer = Observer(self.ranks, model, pretrained, given, config=self.config, ema=ema, **watched)
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
        self.progress, self._closed = self._fresh(), False
        is_file = Path(self.config.output_dir).is_file()
        require(not is_file, "output_dir", self.config.output_dir, "a folder's path; this is a file")
        free = self.ranks.broadcast(self.folder.lock() if accelerator.is_main_process else True)
        require(free, "output_dir", self.config.output_dir, "a folder that no other live run uses (close() ends one)")
        self._unhook_checkpoints = hook_checkpoints(self)
        hook_end_training(accelerator, self.close)
        hook_log(accelerator, self.note_losses)
        say_hello(self.config, self.observer, () if run.picked is None else run.picked.notes)
        if self.config.every_steps is not None:
            self._say_threshold()

    # --- what the loop calls -----------------------------------------------------------------------------------------

    def guard(self, dataloader: Any) -> Any:
        """The same dataloader, which takes the baseline before its first batch and ends when memwatch decides to stop.

        Raises:
            ConfigError: it gives rows that are held out as controls.
        """
        if (rows := rows_per_device(dataloader, self.accelerator.num_processes)) is not None:
            self.observer.limit_batches(rows)
        self.about = replace(self.about, training_rows=rows_in(dataloader))
        self.actions.guard(dataloader)
        return GuardedLoader(dataloader, self.begin, lambda: self.should_stop, self.actions.on_batch)

    def begin(self, step: int = 0) -> Report | None:
        """Take the baseline, unless there is one. ``guard`` calls it; a loop without a guard may, on every rank."""
        if self.progress.last_step is not None:  # the guard calls it at every pass
            return None
        with self._timed(step):
            return self._event(step)

    def on_step_end(self, step: int) -> Report | None:
        """Call after every optimizer step, on every rank. Returns the event's report; ``None`` when no event is due."""
        if self._closed:
            return None
        with self._timed(step):
            if (last := self.progress.last_step) is None:
                logger.warning("baseline taken only now, after step %d; iterate over watch.guard(dataloader)", step)
                return self._event(step)
            every = self.every_steps
            is_due = every is not None and step // every > last // every  # also when numbers are skipped
            return self._event(step) if is_due else None

    @contextmanager
    def _timed(self, step: int) -> Iterator[None]:
        """Inside is memwatch's time, outside the loop's."""
        clock = self.progress.clock
        clock.arrive(step)
        try:
            yield
        finally:
            clock.leave()

    @property
    def every_steps(self) -> int | None:
        """Optimizer steps between events: the user's, or memwatch's choice (rank 0's); ``None`` until it has chosen."""
        progress = self.progress
        chosen = self.config.every_steps or progress.every_steps
        if chosen is None and (step_seconds := progress.clock.step_seconds) is not None:
            prices = Prices.of(step_seconds, progress.clock.first, self.observer.passes)
            pace = self.ranks.broadcast(choose_pace(prices, self.config))
            progress.every_steps = chosen = pace.every_steps
            if self.accelerator.is_main_process:
                say_pace(pace, self.config)
            self._say_threshold()
        return chosen

    @property
    def planned(self) -> int | None:
        """How many events will be judged, if known."""
        return planned_events(self.config.max_train_steps, self.every_steps)

    def _say_threshold(self) -> None:
        if self.accelerator.is_main_process:
            say_threshold(self.observer, looks_in(self.observer, self.planned), self.planned)

    @property
    def should_stop(self) -> bool:
        return self.progress.stop.reason is not None

    @property
    def stop_reason(self) -> str | None:
        return self.progress.stop.reason

    @property
    def exit_code(self) -> int:
        """For ``sys.exit`` at the end of a script: 3 if memwatch has decided to stop, else 0."""
        return EXIT_CODE if self.should_stop else 0

    def flagged(self) -> list[Flagged]:
        """The training rows behind every alert so far, worst first, on the main process."""
        return self.actions.flagged()

    def close(self) -> None:
        """End the events, say where ``last_clean`` is, unlock ``output_dir``, close the sinks; on every rank."""
        if not self._closed:
            self._closed = True
            self.actions.end()
            self._unhook_checkpoints()
            self.folder.release()
            self.sinks.close()

    def note_losses(self, values: Mapping[str, Any], step: int) -> None:
        """Keep the validation losses among what the loop logs, for ``losses.jsonl`` and the report page.

        ``accelerator.log`` calls it; a loop that logs elsewhere may.
        """
        if self.accelerator.is_main_process and not self._closed:
            with self.faults.surviving(NOTING, "memwatch keeps the loss in memory and writes it with the next one"):
                self.sinks.losses.note(values, step)

    # --- one event, see ``memwatch.event`` ---------------------------------------------------------------------------

    def _event(self, step: int) -> Report | None:
        """One event; ``None`` once memwatch is switched off."""
        if self._closed or any(map(self.faults.is_off, (ENTERING, *NEEDED))):
            return None
        was_stopped = self.should_stop
        report = conduct(self, step)
        if self.should_stop and not was_stopped:
            self.actions.end()
        return report

    def observe(self, step: int, *, full: bool) -> Observed:
        """See ``event.Watched``. ``output_dir`` holds this run's files from then on."""
        if not self.progress.has_entered:
            self._enter(self.progress.run)
            self.progress.has_entered = True
        return observe_all(self, step, full=full)

    def act(self, step: int, judgement: Judgement) -> None:
        """See ``event.Watched``."""
        self.actions.follow(step, judgement)

    # --- run and resume ----------------------------------------------------------------------------------------------

    def _fresh(self) -> Progress:
        """A run that has just begun."""
        return Progress(self.ranks.broadcast(uuid4().hex))

    def _enter(self, run: str) -> None:
        """Make ``output_dir`` the folder of this run."""
        main = self.accelerator.is_main_process
        self.ranks.together(ENTERING, self.faults, lambda: self.folder.enter(run) if main else None)
        self.baselines.run = run

    def state_dict(self) -> dict[str, Any]:
        """Plain values only; measurements and weights lie in ``output_dir``."""
        noted = {"faults": self.faults.state_dict(), "losses": self.sinks.losses.count}
        return self.progress.to_dict() | self.baselines.state_dict() | noted | {"actions": self.actions.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``, on every rank, and forget what was written after it; from an empty one start afresh.

        Raises:
            ConfigError: a control was not held out by the run that is resumed.
        """
        refuse_other_controls(self.actions.controls, state.get("actions", {}).get("controls"))
        with suppress(PartError):
            if "run" in state:
                self._enter(state["run"])
                return self.ranks.together(RESUMING, self.faults, lambda: self._restore(state))
        self.progress = self._fresh()
        self.baselines.load_state_dict({"ledger": [], "weights": []})
        self.actions.load_state_dict({})
        if self.accelerator.is_main_process:
            logger.warning("this checkpoint has no state of memwatch, which starts afresh with a new baseline")

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.progress = replace(Progress.from_dict(state), has_entered=True)
        self.faults.load_state_dict(state["faults"])
        self.actions.load_state_dict(state.get("actions", {}))
        complete = self.baselines.load_state_dict(state)
        if self.accelerator.is_main_process:
            warn_of_baselines(self.baselines, [p.probe for p in self.observer.fixed], complete, self.config.output_dir)
        if self.accelerator.is_main_process and self.progress.last_step is not None:
            logger.info("resuming after the event of step %d in %s", self.progress.last_step, self.config.output_dir)
            with self.faults.surviving("rewinding the history", "it keeps the events after this checkpoint"):
                self.sinks.files.rewind(self.progress.last_step)
                self.sinks.losses.rewind(state.get("losses", 0))
