"""The pictures of the report page as data URIs, small enough to send by mail.

A map has its own few pixels, which the browser enlarges. Events whose pictures are no longer kept are left out; so are
quiet events where the page would become too large.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from memwatch.report.drawing import colours, opacity, scaled
from memwatch.report.history import Event, Run
from memwatch.report.retention import worth_of
from memwatch.run_folder import stem_of

LEVELS = 16  # colours of a map
MAP_SIDE = 64  # pixels of a map at most
IMAGE_SIDE, GENERATION_SIDE = 192, 96  # pixels of a picture at most
MOST_MAPS = 4000  # on a page; about 3 kB each
NOTHING = -1  # in place of a picture that does not exist


@dataclass
class Frames:
    """Pictures, each stored once in ``pool``, as a data URI, and named by its index there, ``NOTHING`` for none.

    Attributes:
        side: of the pictures that were measured, pixels; regions are given in them.
        steps: the events that the page's slider stops at. images, maps: by probe, one per step.
        generations: by probe, of its newest proof that is kept: the step and one picture per generation.
    """

    side: int
    steps: list[int] = field(default_factory=list)
    pool: dict[str, int] = field(default_factory=dict)
    images: dict[str, list[int]] = field(default_factory=dict)
    maps: dict[str, list[int]] = field(default_factory=dict)
    generations: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def add(self, uri: str | None) -> int:
        """The picture's index."""
        return NOTHING if uri is None else self.pool.setdefault(uri, len(self.pool))


def frames_of(run: Run) -> Frames:
    """All pictures of a run that the page can hold; files that are gone or broken leave a gap."""
    images, names = run.folder / "images", [row.name for row in run.last.rows]
    first = (opened(file) for file in sorted([*images.glob("*.png"), *images.glob("*/step_*")])[:8])
    frames = Frames(next((max(picture.size) for picture in first if picture is not None), 1))
    fixed = [frames.add(picture_uri(opened(images / f"{name}.png"), IMAGE_SIDE)) for name in names]
    add_generations(run, frames)
    kept: dict[int, list[tuple[int, int]]] = {}
    events = by_priority([event for event in run.events if event.rows and has_pictures(run, event)])
    for event in events[: MOST_MAPS // max(1, len(names)) or 1]:
        stem, kept[event.step] = stem_of(event.step), []
        maps = maps_of(run.folder / "maps" / f"{stem}.safetensors")
        for name in names:
            image = picture_uri(opened(images / name / f"{stem}.jpg"), GENERATION_SIDE)  # of a prompt probe
            kept[event.step].append((frames.add(image), frames.add(map_uri(maps.get(name)))))
    frames.steps = sorted(kept)
    for i, name in enumerate(names):
        pairs = [kept[step][i] for step in frames.steps]
        frames.images[name] = [fixed[i] if image == NOTHING else image for image, _ in pairs]
        frames.maps[name] = [shown for _, shown in pairs]
    return frames


def by_priority(events: Sequence[Event]) -> list[Event]:
    """The last, the first, the stop, those with news; then the others, evenly spread at any point of the list."""
    stop = next((event for event in events if event.stop_reason is not None), None)
    first = [events[i] for i in (-1, 0) if events] + ([] if stop is None else [stop])
    news = [event for event in events if event.has_news]
    quiet = [event for event in events if not event.has_news]
    spread = [quiet[rank] for rank in sorted(range(len(quiet)), key=worth_of, reverse=True)]
    return list({event.step: event for event in [*first, *news, *spread]}.values())


def has_pictures(run: Run, event: Event) -> bool:
    """Whether an event's pictures are kept; see ``retention``. A run that draws none has no ``overview``."""
    overview, stem = run.folder / "overview", stem_of(event.step)
    there = (run.folder / "maps" / f"{stem}.safetensors").is_file() or (overview / f"{stem}.jpg").is_file()
    return there or event in (run.events[0], run.events[-1]) or not overview.is_dir()


def maps_of(file: Path) -> dict[str, np.ndarray]:
    """The heatmaps of an event, by probe; none where the file cannot be read."""
    with suppress(OSError, SafetensorError), safe_open(file, "np") as maps:
        keys = [key for key in maps.keys() if key.endswith("/heatmap")]  # noqa: SIM118
        return {key.removesuffix("/heatmap"): maps.get_tensor(key) for key in keys}
    return {}


def map_uri(log_values: np.ndarray | None) -> str | None:
    """Log factors ``(h, w)`` as a PNG of few colours, the more opaque the higher; ``None`` where it shows nothing."""
    if log_values is None:
        return None
    side = -(-max(log_values.shape) // MAP_SIDE)
    if side > 1:  # the mean of each block
        h, w = (n // side for n in log_values.shape)
        log_values = log_values[: h * side, : w * side].reshape(h, side, w, side).mean((1, 3))
    index = (scaled(log_values) * (LEVELS - 1)).round().astype(np.uint8)
    if not index.any():
        return None
    scale = np.linspace(0, 1, LEVELS)
    picture = Image.fromarray(index).convert("P")
    picture.putpalette(colours(scale[None])[0].tobytes())
    return encoded(picture, "PNG", transparency=opacity(scale).tobytes(), bits=4, optimize=False)


def opened(file: Path) -> Image.Image | None:
    """A picture; ``None`` where it cannot be read."""
    with suppress(OSError), Image.open(file) as picture:
        return picture.convert("RGB")
    return None


def picture_uri(picture: Image.Image | None, side: int) -> str | None:
    """A picture no larger than ``side`` pixels. A smaller one stays as it is, without loss."""
    if picture is None:
        return None
    if max(picture.size) <= side // 2:
        return encoded(picture, "PNG", optimize=True)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return encoded(picture, "JPEG", quality=80, optimize=True)


def encoded(picture: Image.Image, kind: str, **options: Any) -> str:
    """A data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def add_generations(run: Run, frames: Frames) -> None:
    """Find ``Frames.generations``: those of one event lie side by side in one file."""
    for step, row in reversed(run.rows):
        if not row.copied or row.name in frames.generations:
            continue
        together = opened(run.folder / "generations" / row.name / f"{stem_of(step)}.jpg")
        if together is not None:
            width, height = together.width // row.copied["generations"], together.height
            lefts = range(0, width * row.copied["generations"], width)
            parts = [together.crop((left, 0, left + width, height)) for left in lefts]
            frames.generations[row.name] = step, [frames.add(picture_uri(part, GENERATION_SIDE)) for part in parts]
