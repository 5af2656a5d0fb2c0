"""Observer: borrows the model, looks at every probe, and gives the model back exactly as found."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memwatch.config import MemWatchConfig, SamplingConfig, require
from memwatch.denoiser import Components, Conditioning, borrow, can_checkpoint, checkpointed, unwrap
from memwatch.measure.adapt import adapt, require_of_model
from memwatch.measure.baselines import Baselines
from memwatch.measure.batches import Batches
from memwatch.measure.disk_offload import ShelvedNetwork, shelved
from memwatch.measure.images import decode_latents
from memwatch.measure.lora_off import lora_off
from memwatch.measure.measure import measure, run_forward
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.passes import Passes, count_passes
from memwatch.measure.prepare import PreparedProbe, named_as_controls, named_as_peers, on_shelf, prepare
from memwatch.measure.probes import Probe, as_probes
from memwatch.measure.reading import Reading
from memwatch.measure.views import View, generate, noised, prompt_view, reference_view
from memwatch.measure.weights import (
    averages,
    reshard,
    swapped,
    trainable,
    with_conditioning,
    without_conditioning,
)
from memwatch.ranks import Ranks

NO_PROMPT = "/no prompt"  # stands for the unconditional branch among the names of probes
FORWARD = 4  # times as many noisy latents fit at once where no graph is kept


class Observer:
    """Reads and encodes the probes once, and measures them whenever it is asked.

    Args:
        ranks: how the model lies on the processes.
        model: what the loop trains, as ``MemWatch`` takes it.
        pretrained: where parts that are not given are loaded from; they are used once and freed.
        given: parts that the caller passes.
        probes, controls, peers: as ``MemWatch`` takes them; ``None`` takes the configuration's.
        ema: diffusers' ``EMAModel`` of ``model``, for ``weights: ema``.

    Attributes:
        model: the bare network. ``forward_module``: what is called, and whose parameters are swapped.
        denoiser: ``forward_module`` with one signature.
        probes: watched ones first, then controls, then peers. ``has_controls``: whether there are any.
        unconditional: conditioning of the branch without a prompt; ``None`` where the model has no such branch.
        text_encoders: those that the caller passed. ``trains_text``: whether any of them is trained.
        resolution: side of the images, pixels. ``side``: of the latents.
        parts: what is still needed of the pipeline. An autoencoder that only proofs need lies on disk if it was loaded
            here.

    Raises:
        ConfigError, ProbeError, ValueError: as ``MemWatch`` does.
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
        peers: Any = None,
        ema: Any = None,
    ) -> None:
        self.ranks, self.config, self.ema, self._folder = ranks, config, ema, Path(config.output_dir)
        self.model, self.forward_module = unwrap(model), ranks.forward_module(model)
        self.text_encoders = tuple(unwrap(part) if part is not None else None for part in given.text_encoders)
        parameters = (p for part in self.text_encoders if part is not None for p in part.parameters())
        self.trains_text = any(p.requires_grad for p in parameters)
        require_of_model(config, self.model, self.text_encoders, ema)
        off = (self.forward_module, *self.text_encoders) if config.signals.baseline == "base" else ()
        self._without_lora = [{} if part is None else lora_off(part) for part in off]  # of what is trained at the start
        with self._borrowed(given.vae):
            watched = as_probes(probes if probes is not None else config.probes, seed=config.seed)
            held_out = as_probes(controls if controls is not None else config.controls, "controls", seed=config.seed)
            allowed = "prompts, Probes, an image folder or a dataset"
            require(bool(watched), "probes", probes if probes is not None else config.probes, allowed)
            ordinary = as_probes(peers if peers is not None else config.peers, "peers", seed=config.seed)
            everything = [*(replace(probe, is_control=False, is_peer=False) for probe in watched)]
            everything += [*named_as_controls(held_out), *named_as_peers(ordinary)]
            has_prompts = any(not probe.is_reference for probe in everything)
            given = replace(given, text_encoders=self.text_encoders)
            found = adapt(self.model, self.forward_module, pretrained, given, config, ranks, has_prompts)
            self.denoiser, parts = found.denoiser, found.parts
            where = pretrained if isinstance(pretrained, str | os.PathLike) else "the pipeline"
            self._reading = Reading(self.denoiser.schedule, str(where) if given.scheduler is None else None)
            self.resolution, self.side = found.resolution, found.side
            says = bool(ranks.accelerator.is_main_process)
            encoded = prepare(everything, self.denoiser, parts, self.resolution, says=says)
            self.prepared = on_shelf(encoded, self._folder)
            self._rotated_in: frozenset[str] = frozenset()
            self.unconditional = self.denoiser.encode_unconditional(parts, self.resolution)
        ok = self.unconditional is not None or config.signals.against != "unconditional"
        allowed = "snapshot or both, because this model has no unconditional branch"
        require(ok, "signals.against", config.signals.against, allowed)
        self.has_controls = bool(held_out)
        encoders = parts.text_encoders if self.trains_text else ()
        needed = has_prompts or config.proof.enabled
        self.parts = replace(parts, vae=parts.vae if needed else None, text_encoders=encoders)
        is_ours = given.vae is None and isinstance(pretrained, str | os.PathLike)
        rests = is_ours and not has_prompts and self.parts.vae is not None
        self._resting = ShelvedNetwork(self.parts.vae, self._folder) if rests else None
        self._pictures: dict[str, np.ndarray] = {}
        self._generated: dict[tuple[str, int], tuple[Tensor, np.ndarray]] = {}  # latents and pictures
        self._set_batches(config.curvature.batch_size)

    def _set_batches(self, size: int) -> None:
        """Begin with ``size`` noisy latents per forward pass where a graph is kept; with guidance a row is two."""
        sparing = partial(checkpointed, self.model) if can_checkpoint(self.model) else None
        self._with_gradients, self._forward_only = Batches(size, sparing), Batches(FORWARD * size)
        self._sampling = Batches(max(1, size // 2))

    def limit_batches(self, rows: int) -> None:
        """On a GPU an event needs about as much memory as a step of the loop, which has ``rows`` rows per device.

        A row of a look keeps what a row of training does, less the gradients of the weights; twice as much in float32
        beside a loop in mixed precision. Forward only, activations are not kept at all.
        """
        accelerator = self.ranks.accelerator
        if accelerator.device.type == "cpu":
            return
        mixed = accelerator.mixed_precision in ("fp16", "bf16") and self.denoiser.dtype is torch.float32
        rows = rows // 2 if mixed and self.config.precision == "full" else rows
        self._with_gradients.limit(rows)
        self._forward_only.limit(max(1, FORWARD * rows))
        self._sampling.limit(max(1, FORWARD * rows // 2))

    # --- who is looked at ---------------------------------------------------------------------------------------------

    @property
    def probes(self) -> list[PreparedProbe]:
        """What is looked at at this event: everything but the rows whose turn it is not."""
        return [p for p in self.prepared if not p.probe.in_rotation or p.name in self._rotated_in]

    @property
    def fixed(self) -> list[PreparedProbe]:
        """What is looked at at every event."""
        return [p for p in self.prepared if not p.probe.in_rotation]

    @property
    def rotation(self) -> list[PreparedProbe]:
        """What takes rotation, in their order."""
        return [p for p in self.prepared if p.probe.in_rotation]

    def rotate(self, event: int, kept: Collection[str]) -> None:
        """Choose whose turn it is at the run's event of that number; 0 is the first, the baseline, and nobody's.

        Args:
            kept: names of those that keep their place, of which there may be as many as there are places.
        """
        rows, places = [p.name for p in self.rotation], self.config.rotation.per_event
        begin = (event - 1) * places
        new = [rows[i % len(rows)] for i in range(begin, begin + places)] if rows and event > 0 else []
        stay = [name for name in rows if name in kept and event > 0]
        self._rotated_in = frozenset(new + stay[:places])

    def num_rotating(self, planned: int | None) -> int:
        """How many rows will have had their turn at the end of the run.

        Args:
            planned: how many events it will have after its first, if known.
        """
        rows = len(self.rotation)
        return rows if planned is None else min(rows, planned * self.config.rotation.per_event)

    @property
    def passes(self) -> Passes:
        """What an event costs, over all ranks. What takes rotation is screened, now and under the first weights."""
        fixed, branches = [p.probe for p in self.fixed], self.branches
        references = sum(probe.is_reference for probe in fixed)
        passes = count_passes(self.config, references, len(fixed) - references, branches)
        places = min(self.config.rotation.per_event, len(self.rotation))
        return replace(passes, screen=passes.screen + 2 * count_passes(self.config, places, 0, branches).screen)

    @property
    def branches(self) -> int:
        """Of the model: with the prompt and, where it knows that, without."""
        return 1 if self.unconditional is None else 2

    # --- looking -----------------------------------------------------------------------------------------------------

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Inside, the watched weights are in place and a trained text encoder has said anew what each prompt means."""
        with self._borrowed(self.parts.vae), self.watched_weights():
            self._encode_again()
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
        """Look at ``probes``; call it inside ``borrowed``.

        First the live weights, probe by probe. Then once per set of earlier weights, for the probes that need it.

        Args:
            last_clean: by probe, the step of the last event in which it raised no suspicion.
            tick: called after each probe of the first pass.
            curvature: False runs the network forward only; reference probes at the screen's noise draws.
        """
        views: dict[str, View] = {}
        found: dict[str, Observation] = {}
        by_weights: dict[int | None, list[PreparedProbe]] = {}
        for p in probes:
            step = baselines.step_of(p.probe, last_clean.get(p.name))
            views[p.name], found[p.name] = self._observe_now(p, step, baselines, curvature)
            if baselines.needs_weights(p.probe, step, curvature=curvature):
                by_weights.setdefault(step, []).append(p)
            tick()
        for step, group in by_weights.items():
            weights, conditioning = without_conditioning(baselines.weights_at(step))
            with swapped(self.forward_module, weights):
                for p in group:
                    view = replace(views[p.name], conditioning=conditioning.get(p.name, p.conditioning))
                    branch = conditioning.get(NO_PROMPT, self.unconditional)
                    looks = found[p.name].unconditional is not None
                    earlier, without = self.measure_both(view, branch if looks else None, curvature)
                    baselines.keep(p.probe, step, earlier, without)
                    found[p.name] = replace(found[p.name], baseline=earlier, unconditional_baseline=without)
        return list(found.values())

    def _observe_now(
        self, p: PreparedProbe, step: int | None, baselines: Baselines, curvature: bool
    ) -> tuple[View, Observation]:
        """What needs no other weights: the view, and the observation with the baseline where the ledger has it."""
        view, generations = self.view(p)
        screened = not curvature and p.probe.is_reference  # sampling costs a prompt probe more than its draws do
        view = view.first_draws(self.config.levels.screen_draws) if screened else view
        looks = self.config.signals.unconditional and self.knows_prompt(p)
        draws = view.noisy_latents.shape[1]
        recalled = baselines.recall(p.probe, step, curvature=curvature)
        baseline, without = (None if m is None else m.first_draws(draws) for m in recalled)
        now, unconditional = self.measure_both(view, self.unconditional if looks else None, curvature)
        return view, Observation(
            p.probe,
            view.timesteps,
            now=now,
            unconditional=unconditional,
            baseline=baseline,
            unconditional_baseline=without if looks else None,
            baseline_step=step,
            eps=view.eps,
            image=p.image if generations is None else generations[0],
            generations=generations,
        )

    def view(self, p: PreparedProbe) -> tuple[View, np.ndarray | None]:
        """Where a probe is looked at, and what its prompt generates, RGB uint8 ``(n, H, W, 3)``.

        Of a reference probe nothing is generated. What a prompt generates is kept until ``forget_generations``.
        """
        config, scheduler, draws = self.config, self.parts.scheduler, self.config.levels.draws
        if p.probe.is_reference:
            return reference_view(p, self.denoiser, config.levels, config.seed), None
        if config.sampling.look == "last_step":
            where = self.unconditional, self.denoiser, scheduler
            view, finished = prompt_view(p, *where, config.sampling, draws, self.side)
            return view, self._decoded(finished[None])
        latents, pictures = self._generations(p)
        return noised(p, latents, self.denoiser, config.levels, config.seed), pictures

    def forget_generations(self) -> None:
        """The model has moved on: prompts are generated from anew."""
        self._generated.clear()

    def _generations(self, p: PreparedProbe) -> tuple[Tensor, np.ndarray]:
        """Of a prompt probe, shared by all with the same prompt and seed."""
        key = self.caption_of(p.probe), p.probe.seed
        if key not in self._generated:
            seeds = range(p.probe.seed, p.probe.seed + self.config.seeds)
            latents = self._sampled(p.conditioning, self.config.sampling, seeds)
            self._generated[key] = latents, self._decoded(latents)
        return self._generated[key]

    def measure_both(
        self, view: View, unconditional: Conditioning | None, curvature: bool
    ) -> tuple[Measurement, Measurement | None]:
        """A view with its prompt, and at the same noisy latents without it where ``unconditional`` is given."""
        if not curvature:
            return run_forward(self.denoiser, view, unconditional, self._forward_only)
        now = self.measure(view)
        return now, None if unconditional is None else self.measure(replace(view, conditioning=unconditional))

    def measure(self, view: View) -> Measurement:
        """One view with curvature."""
        return measure(self.denoiser, view, self.config.curvature, self.config.seed, self._with_gradients)

    def knows_prompt(self, p: PreparedProbe) -> bool:
        """Whether the probe's prompt is another one than the unconditional branch's, which would say the same."""
        return self.unconditional is not None and not same(p.conditioning, self.unconditional)

    def misread(self, observations: Sequence[Observation]) -> str | None:
        """Why these observations cannot be judged: the model means another prediction type, see ``Reading``."""
        latents = {p.name: p.latents for p in self.prepared if p.latents is not None}
        return self._reading.contradiction(observations, latents)

    def in_order(self, observations: Sequence[Observation]) -> list[Observation]:
        """Observations of any ranks in the order of the probes; those that were not made are left out."""
        by_name = {o.name: o for o in observations}
        return [by_name[p.name] for p in self.probes if p.name in by_name]

    # --- generating --------------------------------------------------------------------------------------------------

    def caption_of(self, probe: Probe) -> str:
        """What its image would be generated from; nothing where the model takes no prompts."""
        return probe.prompt if self.denoiser.text_encoders else ""

    def generate(self, caption: str, count: int) -> np.ndarray:
        """Generations from the caption of a probe, RGB uint8 ``(count, H, W, 3)``; call it inside ``borrowed``."""
        sampling = replace(self.config.sampling, num_inference_steps=self.config.proof.num_inference_steps)
        conditioning = next(p.conditioning for p in self.probes if self.caption_of(p.probe) == caption)
        seeds = range(self.config.seed, self.config.seed + count)
        return self._decoded(self._sampled(conditioning, sampling, seeds))

    def pictures(self) -> dict[str, np.ndarray]:
        """The image of every reference probe as the autoencoder gives it back, by name; call it inside ``borrowed``.

        What the autoencoder loses is nobody's copying error.
        """
        known = {p.name: p.latents for p in self.probes if p.latents is not None and p.name not in self._pictures}
        if known:
            decoded = self._decoded(torch.stack(list(known.values())))
            tensors = {name: torch.from_numpy(picture.copy()) for name, picture in zip(known, decoded, strict=True)}
            self._pictures |= {name: kept.numpy() for name, kept in shelved(tensors, self._folder).items()}
        return self._pictures

    def _sampled(self, conditioning: Conditioning, sampling: SamplingConfig, seeds: Sequence[int]) -> Tensor:
        """Finished latents ``(n, c, h, w)``."""
        where = self.unconditional, self.side, self._sampling
        return generate(self.denoiser, self.parts.scheduler, sampling, seeds, conditioning, *where)

    def _decoded(self, latents: Tensor) -> np.ndarray:
        """RGB uint8 ``(n, H, W, 3)``, one by one, since that takes the most memory."""
        with nullcontext() if self._resting is None else self._resting.on(self.ranks.accelerator.device):
            return np.stack([decode_latents(z, self.parts.vae) for z in latents])

    # --- weights and conditioning ------------------------------------------------------------------------------------

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
            said = {p.name: p.conditioning for p in self.prepared} if self.trains_text else {}
            if self.trains_text and self.unconditional is not None:
                said[NO_PROMPT] = self.unconditional
            return with_conditioning(trainable(self.forward_module), said)

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

    def _encode_again(self) -> None:
        """All probes of this event on all ranks, since any rank may have to look at them."""
        if self.trains_text:
            said = self.encoded_by(self.parts, self.probes)
            self.unconditional = said.get(NO_PROMPT)
            self.prepared = [replace(p, conditioning=said.get(p.name, p.conditioning)) for p in self.prepared]

    def encoded_by(self, parts: Components, probes: Sequence[PreparedProbe] | None = None) -> dict[str, Conditioning]:
        """The conditioning of ``probes`` and of ``NO_PROMPT``, where there is that branch, by these text encoders.

        Args:
            probes: ``None`` for everything that is ever looked at.
        """
        asked = self.prepared if probes is None else probes
        said = {p.name: self.denoiser.encode(p.probe.prompt, parts, self.resolution) for p in asked}
        without = self.denoiser.encode_unconditional(parts, self.resolution)
        return said if without is None else said | {NO_PROMPT: without}


def same(a: Conditioning, b: Conditioning) -> bool:
    """Whether two conditionings are equal tensor for tensor."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
