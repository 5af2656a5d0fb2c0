"""Observer: borrows the model, takes every probe from a view to an observation, and gives the model back as found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memwatch.config import SCREEN_DRAWS, MemWatchConfig, require
from memwatch.denoiser import Components, Conditioning, borrow, can_checkpoint, checkpointed, unwrap
from memwatch.measure.baselines import Baselines
from memwatch.measure.images import decode_latents
from memwatch.measure.lora_off import lora_off
from memwatch.measure.measure import EventBatches, Passes, count_passes, generate, measure, run_forward
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.prediction_type import PredictionTypeCheck
from memwatch.measure.prepare import NO_PROMPT, PreparedProbe, WatchList, adapt, offloaded, prepare, require_of_model
from memwatch.measure.probes import Probe, all_probes
from memwatch.measure.views import View, noised, prompt_view, reference_view
from memwatch.measure.weights import (
    OffloadedNetwork,
    averages,
    kept_on_disk,
    reshard,
    swapped,
    trainable,
    with_conditioning,
    without_conditioning,
)
from memwatch.ranks import Ranks


class Observer(WatchList):
    """Reads and encodes the probes once, and measures them whenever it is asked.

    Arguments and errors are those of ``MemWatch``. Parts that are not ``given`` are loaded, used once and freed.

    Attributes:
        model: the bare network. forward_module: what is called, and whose parameters are swapped.
        denoiser: ``forward_module`` with one signature.
        text_encoders: those that the caller passed. trains_text: whether any of them is trained.
        side: of the latents.
        parts: what is still needed of the pipeline. An autoencoder that only proofs need lies on disk if it was loaded
            here.
    """

    def __init__(
        self,
        ranks: Ranks,
        model: nn.Module,
        pretrained: Any,
        given: Components,
        *,
        config: MemWatchConfig,
        probes: Any = None,
        controls: Any = None,
        ema: Any = None,
    ) -> None:
        self.ranks, self.config, self.ema, self._folder = ranks, config, ema, Path(config.output_dir)
        self.model, self.forward_module = unwrap(model), ranks.forward_module(model)
        self.text_encoders = tuple(unwrap(part) if part is not None else None for part in given.text_encoders)
        encoders = [part for part in self.text_encoders if part is not None]
        self.trains_text = any(p.requires_grad for part in encoders for p in part.parameters())
        require_of_model(config, self.model, self.text_encoders, ema)
        off = (self.forward_module, *self.text_encoders) if config.signals.baseline == "base" else ()
        self._without_lora = [{} if part is None else lora_off(part) for part in off]  # of what is trained at the start
        sparing = partial(checkpointed, self.model) if can_checkpoint(self.model) else None
        self.batches = EventBatches(config.curvature.batch_size, sparing)
        self._pictures: dict[str, np.ndarray] = {}
        self._generated: dict[tuple[str, int], tuple[Tensor, np.ndarray]] = {}  # latents and pictures
        with self._borrowed(given.vae):
            everything = all_probes(config, probes, controls)
            self._prepare(everything, pretrained, replace(given, text_encoders=self.text_encoders))

    def _prepare(self, everything: Sequence[Probe], pretrained: Any, given: Components) -> None:
        """Adapt the model, encode the probes, and free what is not needed any more."""
        config, has_prompts = self.config, any(not probe.is_reference for probe in everything)
        adapted = adapt(self.model, self.forward_module, pretrained, given, config, self.ranks, has_prompts)
        self.denoiser, parts, self.resolution, self.side = adapted
        is_path = isinstance(pretrained, str | os.PathLike)
        source = (str(pretrained) if is_path else "the pipeline") if given.scheduler is None else None
        self._prediction_type = PredictionTypeCheck(self.denoiser.schedule, source)
        says = self.ranks.accelerator.is_main_process
        prepared = prepare(everything, self.denoiser, parts, self.resolution, says=says)
        self.prepared = offloaded(prepared, self._folder)
        self.unconditional = self.denoiser.encode_unconditional(parts, self.resolution)
        ok = self.unconditional is not None or config.signals.against != "unconditional"
        allowed = "snapshot or both, because this model has no unconditional branch"
        require(ok, "signals.against", config.signals.against, allowed)
        vae: Any = parts.vae if has_prompts or config.proof.enabled else None
        self.parts = replace(parts, vae=vae, text_encoders=parts.text_encoders if self.trains_text else ())
        rests = vae is not None and given.vae is None and is_path and not has_prompts
        self._resting = OffloadedNetwork(vae, self._folder) if rests else None

    def limit_batches(self, rows: int) -> None:
        """On a GPU let an event take as much memory as a step of the loop, which has ``rows`` rows per device."""
        accelerator = self.ranks.accelerator  # a row in float32 takes twice as much as one in mixed precision
        mixed = accelerator.mixed_precision in ("fp16", "bf16") and self.denoiser.dtype is torch.float32
        if accelerator.device.type != "cpu":
            self.batches.limit(rows // 2 if mixed and self.config.precision == "full" else rows)

    @property
    def passes(self) -> Passes:
        """What an event costs, over all ranks. Rotated rows are screened, now and under the first weights."""
        fixed, branches = [p.probe for p in self.fixed], 1 if self.unconditional is None else 2
        references = sum(probe.is_reference for probe in fixed)
        passes = count_passes(self.config, references, len(fixed) - references, branches)
        rotated = min(self.config.rotation.per_event, len(self.rotation))
        return replace(passes, screen=passes.screen + 2 * count_passes(self.config, rotated, 0, branches).screen)

    # --- measuring ----------------------------------------------------------------------------------------------------

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Inside, the watched weights are in place, and a trained text encoder has encoded each prompt anew."""
        with self._borrowed(self.parts.vae), self.watched_weights():
            if self.trains_text:
                said = self.encoded_by(self.parts, self.probes)
                self.unconditional = said.get(NO_PROMPT)
                self.prepared = [replace(p, conditioning=said.get(p.name, p.conditioning)) for p in self.prepared]
            yield

    def observe(
        self,
        probes: Sequence[PreparedProbe],
        baselines: Baselines,
        last_clean: Mapping[str, int | None],
        tick: Callable[[], object] = lambda: None,
        *,
        curvature: bool = True,
    ) -> list[Observation]:
        """Look at ``probes`` by the live weights, then by each set of earlier weights; call it inside ``borrowed``.

        Args:
            last_clean: by probe, the step of the last event in which it raised no suspicion.
            tick: called after each probe of the first pass.
            curvature: False runs the network forward only; reference probes at the screen's noise draws.
        """
        found: dict[str, Observation] = {}
        by_weights: dict[int | None, list[View]] = {}
        for p in probes:
            step = baselines.step_of(p.probe, last_clean.get(p.name))
            view, found[p.name] = self._observe_now(p, step, baselines, curvature)
            if found[p.name].baseline is None and (step is not None or self.config.signals.baseline_is_fixed):
                by_weights.setdefault(step, []).append(view)
            tick()
        for step, views in by_weights.items():
            weights, conditioning = without_conditioning(baselines.weights_at(step))
            branch = conditioning.get(NO_PROMPT, self.unconditional)
            with swapped(self.forward_module, weights):
                for view in views:
                    o, then = found[view.key], replace(view, conditioning=conditioning.get(view.key, view.conditioning))
                    both = self.measure_both(then, None if o.unconditional is None else branch, curvature)
                    baselines.keep(o.probe, step, *both)
                    found[o.name] = replace(o, baseline=both[0], unconditional_baseline=both[1])
        return list(found.values())

    def _observe_now(
        self, p: PreparedProbe, step: int | None, baselines: Baselines, curvature: bool
    ) -> tuple[View, Observation]:
        """What needs no other weights: the view, and the observation with the baseline where the ledger has it."""
        view, generations = self.view(p)
        if not curvature and p.probe.is_reference:  # sampling costs a prompt probe more than its draws do
            view = view.first_draws(SCREEN_DRAWS)
        baseline, earlier = baselines.recall(p.probe, step, curvature=curvature)
        now, without = self.measure_both(view, self.unconditional if self.knows_prompt(p) else None, curvature)
        return view, Observation(
            p.probe,
            view.timesteps,
            now=now,
            unconditional=without,
            baseline=baseline,
            baseline_step=step,
            unconditional_baseline=None if without is None else earlier,
            eps=view.eps,
            image=p.image if generations is None else generations[0],
            generations=generations,
        )

    def view(self, p: PreparedProbe) -> tuple[View, np.ndarray | None]:
        """Where a probe is looked at, and what a prompt generates, RGB uint8 ``(n, H, W, 3)``."""
        config = self.config
        if p.probe.is_reference:
            return reference_view(p, self.denoiser, config.levels, config.seed), None
        if config.sampling.look == "last_step":
            where = self.unconditional, self.denoiser, self.parts.scheduler, config.sampling
            view, finished = prompt_view(p, *where, config.levels.draws, self.side)
            return view, self._decoded(finished[None])
        key = self.caption_of(p.probe), p.probe.seed  # shared by all probes with the same prompt and seed
        if key not in self._generated:
            latents = self._sampled(p.conditioning, range(p.probe.seed, p.probe.seed + config.seeds))
            self._generated[key] = latents, self._decoded(latents)
        latents, pictures = self._generated[key]
        return noised(p, latents, self.denoiser, config.levels, config.seed), pictures

    def measure_both(
        self, view: View, unconditional: Conditioning | None, curvature: bool
    ) -> tuple[Measurement, Measurement | None]:
        """A view with its prompt, and at the same noisy latents without it where ``unconditional`` is given."""
        if not curvature:
            return run_forward(self.denoiser, view, unconditional, self.batches.forward_only)
        now = self.measure(view)
        return now, None if unconditional is None else self.measure(replace(view, conditioning=unconditional))

    def measure(self, view: View) -> Measurement:
        """One view, with curvature."""
        return measure(self.denoiser, view, self.config.curvature, self.config.seed, self.batches.with_gradients)

    def misread(self, observations: Sequence[Observation]) -> str | None:
        """Why these observations cannot be judged: the model predicts another type, see ``PredictionTypeCheck``."""
        latents = {p.name: p.latents for p in self.prepared if p.latents is not None}
        return self._prediction_type.contradiction(observations, latents)

    def in_order(self, observations: Sequence[Observation]) -> list[Observation]:
        """Observations of any ranks in the order of the probes; those that were not made are left out."""
        by_name = {o.name: o for o in observations}
        return [by_name[p.name] for p in self.probes if p.name in by_name]

    # --- generating ---------------------------------------------------------------------------------------------------

    def forget_generations(self) -> None:
        """The model has moved on: prompts are generated from anew."""
        self._generated.clear()

    def generate(self, caption: str, count: int) -> np.ndarray:
        """Generations from the caption of a probe, RGB uint8 ``(count, H, W, 3)``; inside ``borrowed``."""
        conditioning = next(p.conditioning for p in self.probes if self.caption_of(p.probe) == caption)
        return self._decoded(self._sampled(conditioning, range(self.config.seed, self.config.seed + count)))

    def pictures(self) -> dict[str, np.ndarray]:
        """The image of every reference probe as the autoencoder gives it back, by name; inside ``borrowed``."""
        known = {p.name: p.latents for p in self.probes if p.latents is not None and p.name not in self._pictures}
        if known:
            decoded = self._decoded(torch.stack(list(known.values())))
            tensors = {name: torch.from_numpy(picture.copy()) for name, picture in zip(known, decoded, strict=True)}
            self._pictures |= {name: kept.numpy() for name, kept in kept_on_disk(tensors, self._folder).items()}
        return self._pictures

    def _sampled(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        how = self.denoiser, self.parts.scheduler, self.config.sampling
        return generate(*how, seeds, conditioning, self.unconditional, self.side, self.batches.sampling)

    def _decoded(self, latents: Tensor) -> np.ndarray:
        """RGB uint8 ``(n, H, W, 3)``, one by one, since that takes the most memory."""
        with nullcontext() if self._resting is None else self._resting.on(self.ranks.accelerator.device):
            return np.stack([decode_latents(z, self.parts.vae) for z in latents])

    # --- weights and conditioning -------------------------------------------------------------------------------------

    @contextmanager
    def _borrowed(self, vae: Any) -> Iterator[None]:
        with borrow(*(m for m in (self.model, self.forward_module, *self.text_encoders, vae) if m is not None)):
            try:
                yield
            finally:
                reshard(self.forward_module)

    def watched_weights(self) -> AbstractContextManager[None]:
        """Inside, the EMA weights are in place of the live ones, where the configuration says so."""
        if self.config.weights == "live":
            return nullcontext()
        return swapped(self.forward_module, averages(self.forward_module, self.ema))

    def trainable_weights(self) -> dict[str, Tensor]:
        """What later events need to look at this one again: trainable tensors, and what a trained text encoder says."""
        with self.watched_weights():
            said = {p.name: p.conditioning for p in self.prepared}
            said |= {} if self.unconditional is None else {NO_PROMPT: self.unconditional}
            return with_conditioning(trainable(self.forward_module), said if self.trains_text else {})

    def weights_without_lora(self) -> dict[str, Tensor]:
        """The base of a LoRA; adapters of trained text encoders are off as well."""
        weights, *of_text = self._without_lora
        if not self.trains_text:
            return weights
        with ExitStack() as stack:
            for text_encoder, off in zip(self.text_encoders, of_text, strict=True):
                if text_encoder is not None:
                    stack.enter_context(swapped(text_encoder, off))
            return with_conditioning(weights, self.encoded_by(self.parts))
