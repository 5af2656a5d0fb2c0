"""``memwatch scan``: the callback's own engine on finished checkpoints, with no training loop around it.

One model is one event, compared with an earlier model, with its own unconditional branch, or with its base (LoRA off). A folder of
``checkpoint-N`` folders is a history, as if the callback had been there. What was measured on a probe is kept in ``looks/``, under a name
that stands for everything it depends on: a scan that was cut off goes on, and one with other settings measures anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from memwatch.callback import MemWatch
from memwatch.checkpoints import (
    CheckpointError,
    copy_into,
    is_pipeline,
    load_model,
    read_text_encoder,
    read_weights,
    text_encoders,
)
from memwatch.config import MemWatchConfig
from memwatch.curvature import CurvatureMap
from memwatch.denoiser import Components, Denoiser, family_of, load_components
from memwatch.judging import Look
from memwatch.noise import NoiseSchedule
from memwatch.probes import PreparedProbe, View
from memwatch.report import Report
from memwatch.signals import Measurement
from memwatch.snapshots import SnapshotStore, with_conditioning, without_conditioning, write_safetensors

logger = logging.getLogger("memwatch")

RELEVANT = ("levels", "curvature", "sampling", "resolution", "seed", "weights")  # settings that change what is measured


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step; ``source`` is anything that ``memwatch.checkpoints`` knows."""

    step: int
    source: str


class Scan(MemWatch):
    """MemWatch on checkpoints instead of a loop.

    Args:
        accelerator: gives device, ranks and trackers; nothing is prepared with it.
        checkpoints: by step, smallest first. Those that cannot be read are named and skipped.
        pretrained: the pipeline that text encoder, VAE and scheduler come from, and the base of a LoRA.
        config, probes, controls: as for ``MemWatch``; ``signals.baseline`` may be ``path:SOURCE`` with any source of
            ``memwatch.checkpoints``.

    Attributes:
        failed: (step, probe or source, why) of everything skipped; the same on every rank.

    Raises:
        CheckpointError: no checkpoint can be read, or the baseline is of another family or size.
    """

    def __init__(
        self,
        accelerator: Any,
        checkpoints: Sequence[Checkpoint],
        pretrained: Any,
        *,
        config: MemWatchConfig,
        probes: Any,
        controls: Any = None,
    ) -> None:
        self.failed: list[tuple[int, str, str]] = []
        self.folder = Path(config.output_dir)
        if (self.folder / "history.jsonl").exists() and not (self.folder / "looks").is_dir():
            raise ValueError(f"{self.folder} holds a history that no scan wrote; choose another output folder")
        self.checkpoints = list(checkpoints)
        self._stamps = {c.step: stamp(c.source) for c in checkpoints}
        self.pretrained = pretrained
        model = self._first_readable().to(accelerator.device)
        self._loaded: int | None = None
        text: list[Any] | None = None
        if any(text_encoders(c.source) and c.source != str(pretrained) for c in self.checkpoints):
            text = list(text_parts(pretrained, family_of(model), accelerator.device).text_encoders)
            for encoder in text:
                if encoder is not None:
                    encoder.requires_grad_(True)  # so that it is asked afresh at every event
        super().__init__(
            accelerator, model, pretrained, config=config, probes=probes, controls=controls, text_encoder=text
        )
        self._weights = Reread(self._read)
        kind, source = self.config.signals.baseline_parts
        self._earlier = Earlier(source, self) if kind == "path" else None
        self._files.rewind(-1)  # the history is written anew; what is expensive lies in looks/

    def _first_readable(self) -> torch.nn.Module:
        """The first checkpoint's model; those before it that cannot be read are dropped."""
        while True:
            try:
                return load_model(self.checkpoints[0].source, self.pretrained)
            except CheckpointError as error:
                if len(self.checkpoints) == 1:
                    raise
                self._skip(self.checkpoints.pop(0), error)

    def run(self) -> Report | None:
        """All events; the last one's report."""
        report = None
        for checkpoint in list(self.checkpoints):
            try:
                if self._live_text or not all(self._file(checkpoint.step, p).is_file() for p in self._prepared):
                    self._load(checkpoint.step)
            except CheckpointError as error:
                self._skip(checkpoint, error)
                self.checkpoints.remove(checkpoint)
                continue
            report = self._event(checkpoint.step)
            if report is not None and self.accelerator.is_main_process:
                self._write_deciding(report)
        self.close()
        return report

    def _write_deciding(self, report: Report) -> None:
        """``decisive/step_NNNNNNN/PROBE.npy``: the deciding maps, natural logs of a factor, as ``memwatch eval`` reads them."""
        folder = self.folder / "decisive" / f"step_{report.step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        for finding in report.findings:
            if finding.signals is not None and finding.signals.decisive is not None:
                np.save(folder / f"{finding.name}.npy", finding.signals.decisive.mean.numpy())

    def _skip(self, checkpoint: Checkpoint, error: Exception) -> None:
        logger.error("memwatch: checkpoint %d is skipped: %s", checkpoint.step, error)
        self.failed.append((checkpoint.step, checkpoint.source, str(error)))

    def _source(self, step: int) -> str:
        return next(c.source for c in self.checkpoints if c.step == step)

    def _read(self, step: int) -> dict[str, Tensor]:
        return read_weights(self._source(step), self.model)

    def _load(self, step: int) -> None:
        if self._loaded == step:
            return
        copy_into(self.model, self._read(step))
        copy_text_encoders(self._source(step), self.denoiser, self._text_encoders)
        self._loaded = step

    def _check_against_model(self) -> None:
        """``path:`` names any source here; whether it can be read is found out by reading it."""
        if self.config.signals.baseline_parts[0] != "path":
            super()._check_against_model()

    # --- what differs from training --------------------------------------------------------------------------------------------------

    def _look(self, step: int, share: Sequence[PreparedProbe]) -> list[Look]:
        """Probe by probe: each is kept as soon as it is measured, and one that fails fails alone."""
        looks, failed = [], []
        for p in tqdm(
            share, desc=f"memwatch scan, step {step}", unit="probe", disable=not self.accelerator.is_main_process
        ):
            try:
                looks.append(self._kept_or_new(step, p))
            except Exception as error:  # named, counted, and the others go on
                logger.error("memwatch: probe %s is skipped at step %d: %s", p.name, step, error)
                failed.append((step, p.name, str(error)))
        self.failed += gather_object(failed) if self.accelerator.num_processes > 1 else failed
        return looks

    def _kept_or_new(self, step: int, p: PreparedProbe) -> Look:
        file = self._file(step, p)
        if file.is_file():
            try:
                return from_tensors(load_file(file), p)
            except (OSError, SafetensorError, KeyError) as error:
                logger.warning("memwatch: %s is measured again: %s", file, error)
        self._load(step)
        look = super()._look(step, [p])[0]
        write_safetensors(file, to_tensors(look))
        return look

    def _file(self, step: int, p: PreparedProbe) -> Path:
        """Where a look is kept; the name changes with everything that the look depends on."""
        config, signals = self.config.to_dict(), self.config.signals
        settings = [config[key] for key in RELEVANT] + [
            signals.baseline,
            signals.unconditional,
            self.config.null_draws,
            self._null_of_controls,
        ]
        sources = [(c.step, c.source, self._stamps[c.step]) for c in self.checkpoints if c.step <= step]
        baseline = None if self._earlier is None else self._earlier.stamp
        image = None if p.image is None else hashlib.sha256(p.image.tobytes()).hexdigest()
        parts = (settings, sources, baseline, str(self.pretrained), p.name, p.probe.prompt, p.probe.seed, image)
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
        return self.folder / "looks" / f"step_{step:07d}" / f"{p.name}-{digest}.safetensors"

    def _baselines(
        self, share: Sequence[PreparedProbe], views: Sequence[View], steps: Mapping[str, int | None]
    ) -> dict[str, Measurement]:
        if self._earlier is not None:
            views = [self._earlier.seen_by(view, p) for p, view in zip(share, views, strict=True)]
        return super()._baselines(share, views, steps)

    def _fixed_weights(self) -> dict[str, Tensor]:
        return self._earlier.weights if self._earlier is not None else super()._fixed_weights()


class Reread(SnapshotStore):
    """Earlier weights that lie in checkpoints already: only their steps are kept, and what a trained text encoder said then."""

    def __init__(self, read: Callable[[int], dict[str, Tensor]]) -> None:
        super().__init__(None, keep=1_000_000)
        self._read = read

    def add(self, step: int, tensors: dict[str, Tensor]) -> None:
        super().add(step, with_conditioning({}, without_conditioning(tensors)[1]))

    def get(self, step: int) -> dict[str, Tensor]:
        return self._read(step) | self._held[step]


class Earlier:
    """The model compared with: its weights, and its own text encoder where it comes with one.

    Raises:
        CheckpointError: it does not fit the model, or predicts something else.
    """

    def __init__(self, source: str, scan: Scan) -> None:
        self.stamp, self._denoiser, device = stamp(source), scan.denoiser, scan.accelerator.device
        self._resolution = scan._resolution
        self.weights = {name: tensor.to(device) for name, tensor in read_weights(source, scan.model).items()}
        self._parts: Components | None = None
        if is_pipeline(source):
            self._parts = text_parts(source, self._denoiser, device)
            theirs, ours = (
                NoiseSchedule.from_scheduler(self._parts.scheduler).prediction_type,
                scan.denoiser.schedule.prediction_type,
            )
            if theirs != ours:
                raise CheckpointError(
                    f"{source}: predicts {theirs}, the model {ours}; epsilon can be compared, weights cannot be exchanged"
                )
        elif text_encoders(source):
            self._parts = text_parts(scan.pretrained, self._denoiser, device)
            copy_text_encoders(source, self._denoiser, self._parts.text_encoders)

    def seen_by(self, view: View, p: PreparedProbe) -> View:
        """``view`` with the conditioning that the earlier model's own text encoder gives."""
        if self._parts is None:
            return view
        return replace(view, conditioning=self._denoiser.encode(p.probe.prompt, self._parts, self._resolution))


def text_parts(pretrained: Any, family: Denoiser | type[Denoiser], device: torch.device) -> Components:
    """Scheduler, and what encodes prompts."""
    names, optional = family.text_encoders, family.optional
    return load_components(
        pretrained, Components(None), needs_vae=False, text_encoders=names, optional=optional, device=device
    )


def copy_text_encoders(source: str, family: Denoiser, encoders: Sequence[Any]) -> None:
    """Overwrite those that ``source`` has of its own."""
    for name, encoder in zip(family.text_encoders, encoders, strict=False):  # none at all where none is trained
        if encoder is not None and name in text_encoders(source):
            copy_into(encoder, read_text_encoder(source, name, encoder))


def stamp(source: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local source's weight files; empty for a hub id."""
    path = Path(source)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def to_tensors(look: Look) -> dict[str, Tensor]:
    """A look as safetensors can hold it; what the probe says itself is left out."""
    tensors = {"timesteps": torch.tensor(look.timesteps)}
    for name, m in (("now", look.now), ("null", look.null), ("baseline", look.baseline)):
        if m is not None:
            tensors |= {f"{name}/rho": m.rho.samples, f"{name}/epsilon": m.epsilon}
    if look.baseline_step is not None:
        tensors["baseline_step"] = torch.tensor(look.baseline_step)
    if look.eps is not None:
        tensors["eps"] = look.eps
    if look.image is not None:
        tensors["image"] = torch.from_numpy(look.image.copy())
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], p: PreparedProbe) -> Look:
    """The look that ``to_tensors`` took apart."""

    def measurement(name: str) -> Measurement | None:
        rho = tensors.get(f"{name}/rho")
        return None if rho is None else Measurement(CurvatureMap(rho), tensors[f"{name}/epsilon"])

    now = Measurement(CurvatureMap(tensors["now/rho"]), tensors["now/epsilon"])
    step, image = tensors.get("baseline_step"), tensors.get("image")
    return Look(
        p.name,
        p.probe.prompt,
        p.probe.is_reference,
        p.is_control,
        tuple(tensors["timesteps"].tolist()),
        now,
        measurement("null"),
        measurement("baseline"),
        None if step is None else int(step),
        tensors.get("eps"),
        None if image is None else image.numpy(),
    )
