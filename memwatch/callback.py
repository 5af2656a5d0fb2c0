"""MemWatch: the only class that holds state or meets a model, a loop, a sink."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from memwatch.alerts import ProbeState, StopState, Verdict, decide_stop
from memwatch.calibration import expected_false_alarms
from memwatch.config import MemWatchConfig, check, load_config
from memwatch.denoiser import Components, Conditioning, as_tuple, borrow, dtype_of, family_of, load_components, unwrap
from memwatch.judging import Look, judge_event
from memwatch.loop import Closer, GuardedLoader
from memwatch.measure import measure
from memwatch.noise import NoiseSchedule
from memwatch.probes import PreparedProbe, View, as_probes, decode_latents, prepare, prompt_view, reference_view
from memwatch.ranks import Ranks
from memwatch.report import Finding, Report
from memwatch.signals import Measurement
from memwatch.snapshots import (
    SnapshotStore,
    from_ledger,
    reshard,
    swapped,
    to_ledger,
    trainable,
    with_conditioning,
    without_conditioning,
    without_lora,
)
from memwatch.trackers import Sink, tracker_sinks
from memwatch.trackers.files import FileSink

logger = logging.getLogger("memwatch")


class MemWatch:
    """Watches a Stable Diffusion fine-tune for what it stores.

    Construct it after ``accelerator.prepare`` and ``init_trackers`` and before ``load_state``; call ``on_step_end`` on every rank.

    Args:
        accelerator: the loop's.
        model: what the loop trains: prepared, compiled, PEFT-wrapped.
        pretrained: folder, hub id or ``DiffusionPipeline``; what is not passed is loaded from it, used, and freed.
        config: YAML file, dict or ``MemWatchConfig``.
        probes: prompts, ``Probe``s, image folder, text file of prompts, or a dataset; goes before the config's.
        controls: the same, of the training data's own kind but held out; without them alerts are uncalibrated.
        vae, text_encoder, tokenizer, scheduler: used instead of ``pretrained``'s; lists where the pipeline has several text encoders, in
            its order, ``None`` for those to be loaded. If any has trainable parameters (also a textual inversion's embedding), prompts are
            encoded afresh at every event.
        ema: diffusers' ``EMAModel`` of ``model``, for ``weights: ema``.
        overrides: top-level config keys.

    Raises:
        ConfigError: wrong configuration. ProbeError: unusable probe. ValueError: unknown model family, or something missing.
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
        self.accelerator, self.ema = accelerator, ema
        self.config: MemWatchConfig = load_config(config, **overrides)
        check(
            ema is not None or self.config.weights == "live",
            "weights",
            self.config.weights,
            "live, since no ema was passed",
        )
        self.ranks = Ranks.of(accelerator)
        self.model, self._entrance = unwrap(model), self.ranks.entrance(model)
        self._text_encoders = tuple(unwrap(part) if part is not None else None for part in as_tuple(text_encoder))
        self._live_text = any(
            p.requires_grad for part in self._text_encoders if part is not None for p in part.parameters()
        )
        self._check_against_model()

        given = Components(scheduler, vae, self._text_encoders, as_tuple(tokenizer))
        with self._borrowed(vae):
            self._prepare(pretrained, given, probes, controls)

        folder = Path(self.config.output_dir)
        keep, on_disk = self.config.snapshots.keep, self.config.snapshots.on_disk
        self._ledger = SnapshotStore(folder / "ledger", keep, in_memory=True, writes=accelerator.is_local_main_process)
        weights = self.ranks.weights_folder(folder / "snapshots") if on_disk else None
        self._weights = SnapshotStore(weights, keep, writes=self.ranks.writes_weights)
        self._fixed: dict[str, Measurement] = {}  # base and path baselines of reference probes: never change
        self._files = FileSink(folder)
        self._sinks: list[Sink] | None = None
        self._states: dict[str, ProbeState] = {}
        self._stop = StopState()
        self._last_step: int | None = None
        self._errors = 0
        self._disabled = self._closed = False
        accelerator.register_for_checkpointing(self)
        self._hook_closing()
        self._say_hello()

    def _check_against_model(self) -> None:
        """What the configuration asks of this very model."""
        kind, file = self.config.signals.baseline_parts
        ok = kind != "base" or any(
            without_lora(part) for part in (self.model, *self._text_encoders) if part is not None
        )
        check(ok, "signals.baseline", "base", "another one, since the model has no LoRA layers to switch off")
        check(
            kind != "path" or Path(file).is_file(),
            "signals.baseline",
            self.config.signals.baseline,
            "path: and an existing safetensors file",
        )
        averaged = len(self.ema.shadow_params) if self.config.weights == "ema" else 0
        sizes = {len(list(self.model.parameters())), sum(p.requires_grad for p in self.model.parameters())}
        fits = self.config.weights == "live" or averaged in sizes
        check(
            fits,
            "weights",
            "ema",
            f"live, since the EMA averages {averaged} tensors and the model has {' or '.join(map(str, sizes))}",
        )

    def _prepare(self, pretrained: Any, given: Components, probes: Any, controls: Any) -> None:
        """Read and encode probes and controls, then free what was loaded for it."""
        config = self.config
        watched = as_probes(probes if probes is not None else config.probes, seed=config.seed)
        held_out = as_probes(controls if controls is not None else config.controls, seed=config.seed)
        check(
            bool(watched),
            "probes",
            probes if probes is not None else config.probes,
            "prompts, Probes, an image folder or a dataset",
        )
        has_prompts = any(not probe.is_reference for probe in watched + held_out)
        if config.signals.decide == "loss_log_ratio":
            check(
                not has_prompts,
                "signals.decide",
                "loss_log_ratio",
                "another one with prompt probes, whose true noise is unknown",
            )
        self.ranks.check(config, has_prompts)
        family = family_of(self.model)
        with self.ranks.whole():
            parts = load_components(
                pretrained,
                given,
                needs_vae=not family.in_pixels,
                text_encoders=family.text_encoders,
                optional=family.optional,
                device=self.accelerator.device,
                dtype=dtype_of(self.model),
            )
        self.denoiser = family(self.model, NoiseSchedule.from_scheduler(parts.scheduler))
        self.denoiser.model, self.denoiser.once = self._entrance, self.ranks.once
        last = self.denoiser.schedule.num_train_timesteps - 1
        check(
            max(config.levels.timesteps) <= last, "levels.timesteps", config.levels.timesteps, f"timesteps up to {last}"
        )
        scale = 2 ** (len(parts.vae.config.block_out_channels) - 1) if parts.vae is not None else 1
        resolution = config.resolution or (self.denoiser.sample_size or 0) * scale
        unit = scale * self.denoiser.patch
        check(
            resolution > 0 and resolution % unit == 0,
            "resolution",
            config.resolution,
            f"a multiple of {unit} (the model names no size)",
        )
        self._resolution, self._side = resolution, resolution // scale
        self._prepared = prepare(watched, held_out, self.denoiser, parts, resolution)
        self._null = self.denoiser.encode_null(parts, resolution)
        allowed = "another one, because this model has no unconditional branch"
        check(
            self._null is not None or config.signals.decide != "log_ratio_null",
            "signals.decide",
            config.signals.decide,
            allowed,
        )
        self._parts = replace(
            parts, vae=parts.vae if has_prompts else None, text_encoders=parts.text_encoders if self._live_text else ()
        )

    # --- what the loop calls ---------------------------------------------------------------------------------------------------------

    def guard(self, dataloader: Any) -> Any:
        """``dataloader``, but the baseline is taken before its first batch, and iteration ends when a stop is decided."""
        return GuardedLoader(dataloader, self.begin, lambda: self.should_stop)

    def begin(self, step: int = 0) -> Report | None:
        """Take the first baseline, unless there is one. ``guard`` calls it; a loop without the guard may, on every rank."""
        return self._event(step) if self._last_step is None else None

    def on_step_end(self, step: int) -> Report | None:
        """Call after every optimizer step, on every rank. Returns the event's report on every rank, or ``None`` when none is due."""
        if self._last_step is None:
            logger.warning(
                "memwatch takes its first baseline only now, after step %d: iterate over watch.guard(dataloader)", step
            )
            return self._event(step)
        every = self.config.every_steps
        return (
            self._event(step) if step // every > self._last_step // every else None
        )  # also for a loop that skips numbers

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
            for sink in self._sinks or []:
                with self._surviving(f"closing {sink.name}"):
                    sink.close()

    # --- one event -------------------------------------------------------------------------------------------------------------------

    def _event(self, step: int) -> Report | None:
        if self._disabled or self._closed:
            return None
        self._last_step = step
        started = time.perf_counter()
        looks = self._look_on_all_ranks(step)
        if looks is None:
            return None
        self._remember(step, looks)
        findings, controls, self._states = judge_event(looks, self._states, step, self.config)
        verdicts = [(f.name, f.verdict, f.severity, f.p) for f in findings]
        self._stop = self.ranks.first(decide_stop(self._stop, verdicts, step, self.config.stop))
        report = self._report(step, findings, controls, time.perf_counter() - started)
        if self.accelerator.is_main_process:
            self._write(report)
            tqdm.write(report.summary())
        return report

    def _look_on_all_ranks(self, step: int) -> list[Look] | None:
        """Every rank looks at its share; all get all looks, in the order of the probes. A failure on any rank is one on all."""
        mine: list[Look] = []
        error: Exception | None = None
        try:
            with self._borrowed(self._parts.vae), self._watched_weights():
                self._encode_again()
                mine = self._look(step, self.ranks.share(self._prepared))
        except Exception as caught:  # a monitor never kills a run
            error = caught
        looks, failed = self.ranks.gather(mine, repr(error) if error else None)
        if failed is not None:
            self._disabled = True
            self._failed("looking at the model", failed, error)
            return None
        by_name = {look.name: look for look in looks}
        return [by_name[prepared.name] for prepared in self._prepared if prepared.name in by_name]

    def _look(self, step: int, share: Sequence[PreparedProbe]) -> list[Look]:
        """noisy latents -> epsilon and rho, now -> the unconditional branch -> the baselines that need other weights."""
        views, images = self._views(share)
        by_null = [i for i, p in enumerate(share) if self._needs_null(p)]
        steps = {
            p.name: self._baseline_step(p.name, self._ledger if p.probe.is_reference else self._weights) for p in share
        }
        null = self._null or {}  # by_null is empty where there is no such branch
        beside = [views[i].beside(null, self.config.null_draws) for i in by_null]
        rows = sum(view.noisy_latents.shape[0] * view.noisy_latents.shape[1] for view in [*views, *beside])
        hidden = not self.accelerator.is_main_process
        with tqdm(total=rows, desc=f"memwatch step {step}", leave=False, disable=hidden, unit="latents") as bar:
            now = self._measure(views, bar.update)
            nulls = dict(zip(by_null, self._measure(beside, bar.update), strict=True))
        baselines = self._baselines(share, views, steps)
        return [
            Look(
                p.name,
                p.probe.prompt,
                p.probe.is_reference,
                p.is_control,
                view.timesteps,
                now[i],
                nulls.get(i),
                baselines.get(p.name),
                steps[p.name],
                view.eps,
                images[i],
            )
            for i, (p, view) in enumerate(zip(share, views, strict=True))
        ]

    def _encode_again(self) -> None:
        """What a trained text encoder says now; all probes on all ranks, since any rank may have to remember it."""
        if self._live_text:
            self._null = self.denoiser.encode_null(self._parts, self._resolution)
            self._prepared = [replace(p, conditioning=self._encoded(p)) for p in self._prepared]

    def _encoded(self, prepared: PreparedProbe) -> Conditioning:
        return self.denoiser.encode(prepared.probe.prompt, self._parts, self._resolution)

    def _needs_null(self, prepared: PreparedProbe) -> bool:
        return (
            self._null is not None
            and self.config.signals.unconditional
            and (not prepared.is_control or self._null_of_controls)
        )

    @property
    def _null_of_controls(self) -> bool:
        return self.config.signals.decide in ("log_ratio_null", "both_baselines")

    def _measure(self, views: Sequence[View], tick: Callable[[int], object] = lambda rows: None) -> list[Measurement]:
        """View by view: a batch never holds two probes, so rounding is the same at every event, for every baseline and number of ranks."""
        return [measure(self.denoiser, [view], self.config.curvature, self.config.seed, tick)[0] for view in views]

    def _views(self, share: Sequence[PreparedProbe]) -> tuple[list[View], list[Any]]:
        views, images = [], []
        for p in share:
            if p.probe.is_reference:
                views.append(reference_view(p, self.denoiser, self.config.levels, self.config.seed))
                images.append(p.image)
            else:
                view, latents = prompt_view(
                    p,
                    self._null,
                    self.denoiser,
                    self._parts.scheduler,
                    self.config.sampling,
                    self.config.levels.draws,
                    self._side,
                )
                views.append(view)
                images.append(decode_latents(latents, self._parts.vae))
        return views, images

    def _baseline_step(self, name: str, store: SnapshotStore) -> int | None:
        """Step of the configured baseline; ``None`` before there is one, and for baselines that are no step."""
        kind, argument = self.config.signals.baseline_parts
        if self.config.signals.baseline_is_fixed or not store.steps:
            return None
        if kind == "last_clean":
            clean = self._states.get(name, ProbeState()).last_clean
            return clean if clean in store else store.steps[0]
        back = {"first": len(store.steps), "previous": 1}.get(kind) or int(argument)
        return store.steps[-back] if back <= len(store.steps) else store.steps[0]

    def _baselines(
        self, share: Sequence[PreparedProbe], views: Sequence[View], steps: Mapping[str, int | None]
    ) -> dict[str, Measurement]:
        """Measurements to compare with: from the ledger where x_t is fixed, by earlier weights where it moves with the model."""
        found: dict[str, Measurement] = {}
        by_weights: dict[int | None, list[int]] = {}
        for i, p in enumerate(share):
            if p.name in self._fixed:
                found[p.name] = self._fixed[p.name]
            elif self.config.signals.baseline_is_fixed or (not p.probe.is_reference and steps[p.name] is not None):
                by_weights.setdefault(steps[p.name], []).append(i)
            elif (s := steps[p.name]) is not None and (entry := from_ledger(self._ledger.get(s), p.name)) is not None:
                found[p.name] = entry
        for s, indices in by_weights.items():
            weights, conditioning = without_conditioning(
                self._weights.get(s) if s is not None else self._fixed_weights()
            )
            with swapped(self._entrance, weights):
                measured = self._measure(
                    [
                        replace(v, conditioning=conditioning.get(v.key, v.conditioning))
                        for v in (views[i] for i in indices)
                    ]
                )
            found |= {share[i].name: m for i, m in zip(indices, measured, strict=True)}
            if s is None:
                self._fixed |= {share[i].name: found[share[i].name] for i in indices if share[i].probe.is_reference}
        return found

    def _fixed_weights(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        kind, file = self.config.signals.baseline_parts
        if kind == "path":
            return load_file(file)
        weights = without_lora(self._entrance)
        if not self._live_text:
            return weights
        with ExitStack() as stack:  # adapters of text encoders off as well
            for text_encoder in self._parts.text_encoders:
                if text_encoder is not None:
                    stack.enter_context(swapped(text_encoder, without_lora(text_encoder)))
            return with_conditioning(weights, {p.name: self._encoded(p) for p in self._prepared})

    def _remember(self, step: int, looks: Sequence[Look]) -> None:
        """This event becomes a baseline of later ones."""
        finite = {look.name: look.now for look in looks if look.is_reference and look.now.finite}
        if finite:
            with self._surviving("writing the ledger to disk (kept in memory)"):
                self._ledger.add(step, to_ledger(finite))
        prompts = any(not look.is_reference and look.now.finite for look in looks)
        if prompts and not self.config.signals.baseline_is_fixed:
            with self._surviving("writing weights to disk (kept in memory)"), self._watched_weights():
                conditioning = {p.name: p.conditioning for p in self._prepared} if self._live_text else {}
                self._weights.add(step, with_conditioning(trainable(self._entrance), conditioning))
            self.accelerator.wait_for_everyone()  # what one process wrote the others will read

    def _report(self, step: int, findings: list[Finding], controls: dict[str, float], seconds: float) -> Report:
        top = self.config.heatmap.max_factor
        pictures = (
            {f.name: picture for f in findings if (picture := f.picture(top)) is not None}
            if self.accelerator.is_main_process
            else {}
        )
        calibrated = any(p.is_control for p in self._prepared)
        false_alarms = expected_false_alarms(len(findings), self.config.alerts.max_p)
        return Report(
            step,
            tuple(findings),
            controls,
            calibrated,
            false_alarms,
            top,
            seconds,
            self._errors,
            self.stop_reason,
            pictures,
        )

    # --- borrowing, failing, telling -------------------------------------------------------------------------------------------------

    @contextmanager
    def _borrowed(self, vae: Any = None) -> Iterator[None]:
        with borrow(*(m for m in (self.model, self._entrance, *self._text_encoders, vae) if m is not None)):
            try:
                yield
            finally:
                reshard(self._entrance)

    def _watched_weights(self) -> Any:
        """The EMA weights in place of the live ones, when the config says so."""
        if self.config.weights == "live":
            return nullcontext()
        named = list(self._entrance.named_parameters())
        if len(self.ema.shadow_params) != len(named):  # an average of what is trained only, as for LoRA
            named = [(name, p) for name, p in named if p.requires_grad]
        names = [name for name, _ in named]
        return swapped(self._entrance, dict(zip(names, self.ema.shadow_params, strict=True)))

    def _write(self, report: Report) -> None:
        if self._sinks is None:
            self._sinks = [self._files, *tracker_sinks(self.accelerator.trackers)]
            self._hook_closing()
        for sink in list(self._sinks):
            try:
                sink.write(replace(report, errors=self._errors))
            except Exception as error:  # a full disk or a tracker's trouble is not the run's
                self._sinks.remove(sink)
                self._failed(f"sink '{sink.name}'", repr(error), error)

    @contextmanager
    def _surviving(self, part: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed(part, repr(error), error)

    def _failed(self, part: str, what: str, error: Exception | None) -> None:
        """One warning and the counter; ``strict`` raises."""
        self._errors += 1
        if self.config.strict:
            raise RuntimeError(f"memwatch: {part} failed: {what}") from error
        logger.warning("memwatch: %s failed and is switched off, training goes on: %s", part, what)

    def _hook_closing(self) -> None:
        """``accelerator.end_training()`` finishes every tracker; one of them is ours."""
        trackers = self.accelerator.trackers
        if self.accelerator.is_main_process and not any(tracker.name == "memwatch" for tracker in trackers):
            trackers.append(Closer(self.close))

    def _say_hello(self) -> None:
        c, names = self.config, [p.name for p in self._prepared]
        references = sum(p.probe.is_reference and not p.is_control for p in self._prepared)
        num_controls = sum(p.is_control for p in self._prepared)
        if self._null is None and c.signals.unconditional:
            logger.info("memwatch: this model has no unconditional branch; only snapshot baselines are used")
        if not any(p.requires_grad for p in self.model.parameters()) and not self._live_text:
            logger.warning(
                "memwatch: neither the model nor a text encoder passed to memwatch has trainable parameters; nothing can change"
            )
        if not num_controls:
            logger.warning(
                "memwatch has no controls: maps are shown, but alerts are uncalibrated and nothing is called memorized"
            )
        elif 1 / (1 + num_controls) > c.alerts.max_p:
            needed = math.ceil(1 / c.alerts.max_p) - 1
            logger.warning(
                "memwatch: %d controls cannot give p <= %g; it takes %d", num_controls, c.alerts.max_p, needed
            )
        if self.accelerator.is_main_process:
            logger.info(
                "memwatch: %s, %s; %d reference and %d prompt probes, %d controls; timesteps %s, %d draws, %d vectors; "
                "baseline %s; every %d steps; %s",
                self.denoiser.name,
                self.denoiser.schedule.prediction_type,
                references,
                len(names) - num_controls - references,
                num_controls,
                c.levels.timesteps,
                c.levels.draws,
                c.curvature.vectors,
                c.signals.baseline,
                c.every_steps,
                c.output_dir,
            )

    # --- resume ----------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values only; measurements and weights lie in ``output_dir``."""
        return {
            "last_step": self._last_step,
            "errors": self._errors,
            "stop": asdict(self._stop),
            "states": {name: asdict(state) | {"verdict": str(state.verdict)} for name, state in self._states.items()},
            "ledger": self._ledger.protect(),
            "weights": self._weights.protect(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; what was written after it is forgotten."""
        self._last_step, self._errors = state["last_step"], state["errors"]
        self._stop = StopState(**state["stop"])
        self._states = {
            name: ProbeState(**(s | {"verdict": Verdict(s["verdict"])})) for name, s in state["states"].items()
        }
        self._ledger.resume(state["ledger"])
        self._weights.resume(state["weights"])
        if self._ledger.steps != state["ledger"] or self._weights.steps != state["weights"]:
            logger.warning(
                "memwatch: some earlier baselines are missing from %s; later ones are used instead",
                self.config.output_dir,
            )
        if self._last_step is not None and self.accelerator.is_main_process:
            with self._surviving("rewinding history"):
                self._files.rewind(self._last_step)
