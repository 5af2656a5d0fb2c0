"""Random images, a training loop as users write it on ``families.save_pipeline``, and the rules of judging bent."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, cast_training_params
from PIL import Image
from safetensors.torch import load_file
from support.families import SIZE, TOKENS
from support.processes import new_process
from torch.utils.data import DataLoader

import memwatch.event
import memwatch.judge.findings
import memwatch.measure.regions
from memwatch import MemWatch, MemWatchConfig, Probe
from memwatch.act.stop import StopState
from memwatch.judge.verdict import Evidence
from memwatch.measure.measurement import Observation

CONFIG: dict[str, Any] = {
    "every_steps": 2,
    "levels": {"timesteps": [61, 301], "draws": 2},
    "curvature": {"vectors": 4, "tile": 4, "batch_size": 8},
    "sampling": {"num_inference_steps": 3, "guidance_scale": 3.0},
}
SMALL: dict[str, Any] = CONFIG | {  # one level; a failure is an error
    "strict": True,
    "levels": {"timesteps": [61], "draws": 2},
    "curvature": {"vectors": 2, "tile": 2},
}
SCREENS = MemWatchConfig.screens  # the real rule; most tests measure everything at every event
MemWatchConfig.screens = False  # type: ignore[assignment,method-assign]
SNAPSHOT_MAPS = ("collapse", "log_ratio", "score", "loss_log_ratio")


def picture(seed: int, size: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def moved(network: torch.nn.Module, by: float = 0.3, seed: int = 0) -> None:
    """As if: whatever is trained moves."""
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel())))


def probes_of_both_kinds() -> list[Probe]:
    return [Probe("a photo of a cat", picture(0), name="cat"), Probe("a red poster", seed=3, name="poster")]


def call_every_change(monkeypatch: Any) -> None:
    """Let every watched probe that has changed be strong and rare; from there on the real rule judges.

    Random networks store nothing that ten controls would not show as well. Controls stay as they are.
    """
    real = memwatch.judge.findings.evidence_of

    def strong(compared: Any, *others: Any) -> Evidence:
        evidence = real(compared, *others)
        if compared.observation.probe.is_control or evidence.severity == 1:
            return evidence
        found = {"severity": 5.0, "p": 1e-9, "lasting_p": 1e-9, "z_score": 30.0}
        return replace(evidence, **found, any_controls=True, num_controls=20)

    monkeypatch.setattr(memwatch.judge.findings, "evidence_of", strong)
    monkeypatch.setattr(memwatch.measure.regions, "MIN_FACTOR", 1.000001)


def choose(monkeypatch: Any, *names: str) -> None:
    """Let the screen choose these, from the first event with a baseline on."""

    def chosen(observations: list[Observation], config: Any) -> set[str]:
        return {o.name for o in observations if o.baseline is not None} & set(names)

    monkeypatch.setattr(memwatch.event, "chosen", chosen)


def stop_at(step: int, monkeypatch: Any) -> None:
    """Let every watch stop at that step, whatever it has found."""

    def decide(state: StopState, findings: Any, now: int, rule: Any) -> StopState:
        return StopState("enough") if now >= step else state

    monkeypatch.setattr(memwatch.event, "decide_stop", decide)


class Loop:
    """A fine-tune as users write it. ``dtype``: of the frozen weights. ``adapt`` makes of the UNet what is prepared."""

    def __init__(
        self,
        pretrained: Path,
        folder: Path | None = None,
        *,
        lora: bool = False,
        ema: bool = False,
        checkpointing: bool = False,
        precision: str = "no",
        lr: float = 1e-2,
        accumulation: int = 1,
        log_with: Any = None,
        dtype: torch.dtype = torch.float32,
        adapt: Any = None,
    ) -> None:
        new_process()
        set_seed(1)
        self.folder, self.step = folder, 0
        self.accelerator = self.make_accelerator(
            mixed_precision=precision, gradient_accumulation_steps=accumulation, log_with=log_with, project_dir=folder
        )
        self.dtype, unet = dtype, self.make_unet(pretrained, dtype, lora, checkpointing)
        self.ema = EMAModel(unet.parameters(), decay=0.9) if ema else None
        optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        generator = torch.Generator().manual_seed(2)
        unet = adapt(unet) if adapt is not None else unet
        rows = [torch.randn(size, generator=generator) for _ in range(8) for size in ((4, 8, 8), (TOKENS, 16))]
        loader = DataLoader(list(zip(rows[::2], rows[1::2], strict=True)), batch_size=2, shuffle=True)
        self.unet, self.optimizer, self.loader = self.accelerator.prepare(unet, optimizer, loader)
        self.bare = self.accelerator.unwrap_model(self.unet)
        if self.ema is not None:
            self.accelerator.register_for_checkpointing(self.ema)
        self.scheduler = DDIMScheduler.from_pretrained(pretrained, subfolder="scheduler")
        if log_with is not None:
            self.accelerator.init_trackers("run")

    @staticmethod
    def make_unet(pretrained: Path, dtype: torch.dtype, lora: bool, checkpointing: bool) -> UNet2DConditionModel:
        unet = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet").to(dtype).train()
        if lora:
            from peft import LoraConfig

            unet.requires_grad_(False)
            unet.add_adapter(LoraConfig(r=2, lora_alpha=2, lora_dropout=0.2, target_modules=["to_q", "to_v"]))
            cast_training_params(unet, torch.float32)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        return unet

    def make_accelerator(self, **options: Any) -> Accelerator:
        return Accelerator(cpu=True, **options)

    def watch(self, pretrained: Any, probes: Any = None, **overrides: Any) -> MemWatch:
        overrides.setdefault("output_dir", str((self.folder or Path("memwatch")) / "memwatch"))
        overrides.setdefault("config", CONFIG)
        probes = probes if probes is not None else probes_of_both_kinds()
        return MemWatch(self.accelerator, self.unet, pretrained, probes=probes, ema=self.ema, **overrides)

    def loss(self, latents: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Draws from the streams of Python, NumPy and torch: all three are watched."""
        noise = torch.randn_like(latents) * (1 + 0.1 * float(np.random.rand()))
        timesteps = torch.randint(0, 1000, (len(latents),))
        hidden = hidden * float(random.random() > 0.3)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        output = self.unet(noisy_latents.to(self.dtype), timesteps, hidden.to(self.dtype)).sample
        return torch.nn.functional.mse_loss(output.float(), noise)

    def run(self, watch: MemWatch | None, steps: int, *, each: Any = None, epochs: int = 1_000) -> list[Any]:
        """Train up to ``steps`` optimizer steps; the reports of all events but the first."""
        loader = watch.guard(self.loader) if watch is not None else self.loader
        reports = []
        for _ in range(epochs):
            batches = 0
            for latents, hidden in loader:
                batches += 1
                with self.accelerator.accumulate(self.unet):
                    self.accelerator.backward(self.loss(latents, hidden))
                    self.optimizer.step()
                    if self.accelerator.sync_gradients:
                        self.step += 1
                        if self.ema is not None:
                            self.ema.step(self.bare.parameters())
                        if watch is not None and (report := watch.on_step_end(self.step)) is not None:
                            reports.append(report)
                        if each is not None:
                            each(self)
                    self.optimizer.zero_grad()
                if self.step >= steps:
                    return reports
            if not batches:
                return reports
        return reports

    def state(self) -> dict[str, Any]:
        """Everything that a monitor could disturb."""
        named = dict(self.bare.named_parameters())
        return {
            "weights": {name: p.detach().clone() for name, p in named.items()},
            "grad": {name: None if p.grad is None else p.grad.clone() for name, p in named.items()},
            "requires_grad": {name: p.requires_grad for name, p in named.items()},
            "training": {name: module.training for name, module in self.unet.named_modules()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "ema": [p.clone() for p in self.ema.shadow_params] if self.ema is not None else [],
            "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
            "modes": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")],
        }

    def identities(self) -> dict[str, Any]:
        """What must remain the very same objects."""
        return {
            "forward": [m.__dict__.get("forward") for m in self.unet.modules()],
            "processors": list(map(id, self.bare.attn_processors.values())),
            "parameters": [(id(p), p.data_ptr()) for p in self.bare.parameters()],
            "gradients": [None if p.grad is None else p.grad.data_ptr() for p in self.bare.parameters()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in self.unet.modules()],
        }


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Bit-identical nested structures; says where they differ."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def history(folder: Path) -> list[dict[str, Any]]:
    """Every event of the run in ``folder``, as it was written."""
    text = (folder / "memwatch" / "history.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same events, less how long they took."""
    rows = copy.deepcopy(rows)
    for row in rows:
        for key in ("seconds", "overhead"):
            del row[key]
            row["scalars"].pop(f"memwatch/{key}", None)
    return rows


def maps(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The maps of one event of the run in ``folder``."""
    return load_file(folder / "memwatch" / "maps" / f"step_{step:07d}.safetensors")
