"""Folders of runs that nobody has trained: events, maps and images as a run of that size would have left them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

SETTINGS: dict[str, Any] = {
    "max_train_steps": 1000,
    "alerts": {"max_p": 0.01},
    "levels": {"timesteps": [141, 501]},
}
BOX = [16, 8, 48, 40]


def write_run(folder: Path, probes: list[dict[str, Any]], events: list[dict[str, Any]], **about: Any) -> Path:
    """A run's folder from its parts: what differs from quiet events of images of the training set with captions.

    Probes have a ``name``, events a ``step`` and, by probe, ``rows``; ``about`` is of ``about.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = [{"prompt": f"a photo of {p['name']}", "is_reference": True, "role": "probe"} | p for p in probes]
    saved = {"model": "Stable Diffusion 1.x / 2.x, epsilon", "probes": known, "settings": SETTINGS} | about
    (folder / "about.json").write_text(json.dumps(saved), encoding="utf-8")
    with (folder / "history.jsonl").open("w", encoding="utf-8") as history:
        for event in events:
            failed, rows = event.get("failure") is not None, event.get("rows", {})
            line = {"calibrated": True, "controls": {f"control/{i}": 1 + i / 10 for i in range(0 if failed else 3)}}
            line |= {"standing": "20 controls scored 2.9 at most so far", "seconds": 2.0, "errors": 0}
            line |= {"overhead": 0.017, "stop_reason": None, "failure": None}
            line |= {"scalars": {} if failed else {"memwatch/measured": 3.0}}
            line |= {key: value for key, value in event.items() if key != "rows"}
            line |= {"findings": [] if failed else [row(p, **rows.get(p["name"], {})) for p in known]}
            history.write(json.dumps(line) + "\n")
    return folder


def row(probe: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A finding of a quiet event, with whatever differs."""
    quiet = {"verdict": "no evidence", "severity": 1.05, "p": 0.5, "since": None, "alert": False}
    said = {"reason": "the controls show as much", "baseline": "step 0", "alert_text": None}
    measured = {"timesteps": [141, 501], "levels": [1.1, 1.2], "regions": [], "copied": None}
    shared = {key: probe[key] for key in ("name", "prompt", "is_reference")}
    return shared | {"title": f"{probe['prompt']} ({probe['name']})"} | quiet | said | measured | parts


def memorized(severity: float = 2.0, since: int = 100, **parts: Any) -> dict[str, Any]:
    """What differs in a finding that is memorized."""
    region = {"box": BOX, "area": 0.25, "effect": math.log(severity), "sem": 0.05}
    found = {"verdict": "memorized", "severity": severity, "p": 1e-9, "since": since, "regions": [region]}
    return found | {"reason": f"evidence since step {since}"} | parts


def save_map(folder: Path, step: int, maps: dict[str, np.ndarray]) -> None:
    """The heatmaps of one event, ``(h, w)`` log factors, by probe."""
    (folder / "maps").mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}/heatmap": torch.from_numpy(m.astype(np.float32)) for name, m in maps.items()}
    save_file(tensors, folder / "maps" / f"step_{step:07d}.safetensors")


def save_image(folder: Path, *parts: str, side: int = 64, seed: int = 0, count: int = 1) -> Image.Image:
    """An image that looks like a photo to a codec: a few smooth waves and some noise. ``count`` side by side."""
    rng, grid = np.random.default_rng(seed), np.linspace(0, 2 * np.pi, side)
    pictures = []
    for _ in range(count):
        x, y = rng.uniform(0, 4, (2, 1, 3)) * grid[:, None]
        waves = np.sin(x[:, None] + y + rng.uniform(0, 6, 3)) + rng.normal(0, 0.08, (side, side, 3))
        pictures.append(((waves + 1.2) / 2.4 * 255).clip(0, 255).astype(np.uint8))
    picture, file = Image.fromarray(np.concatenate(pictures, 1)), folder.joinpath(*parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
    return picture


def large_run(folder: Path, num_probes: int, num_events: int, *, side: int = 512, map_side: int = 64) -> Path:
    """As many probes and events as asked for, one in ten memorized from the middle on; noisy maps everywhere."""
    names, steps = [f"probe-{i:03d}" for i in range(num_probes)], [100 * (i + 1) for i in range(num_events)]
    rng, bad, middle = np.random.default_rng(0), names[::10], steps[num_events // 2]
    events = []
    for step in steps:
        late = step >= middle
        rows = {name: memorized(1.6 + step / 1e5, middle, alert=step == middle) for name in bad if late}
        rows |= {n: {"severity": float(rng.uniform(1, 1.2)), "levels": [1.05, 1.1]} for n in names if n not in rows}
        events.append({"step": step, "rows": rows})
        noise = rng.normal(0, 0.15, (num_probes, map_side, map_side))
        for i, name in enumerate(names):
            if late and name in bad:
                noise[i, : map_side // 2, : map_side // 2] += 0.8
        save_map(folder, step, dict(zip(names, noise, strict=True)))
    for i, name in enumerate(names):
        save_image(folder, "images", f"{name}.png", side=side, seed=i)
    return write_run(folder, [{"name": name} for name in names], events)
