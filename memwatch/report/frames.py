"""The pictures of the report page as data URIs, small enough to send by mail.

A training image is there once. A map is a PNG of its own few pixels, which the browser enlarges. Events whose pictures
are no longer kept are left out; so are quiet events where the page would become too large.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from memwatch.report.heatmap import colours, scaled
from memwatch.report.history import Event, Run
from memwatch.report.retention import stem_of, worth_of

LEVELS = 16  # colours of a map
MAP_SIDE = 64  # pixels of a map at most
IMAGE_SIDE, GENERATION_SIDE = 192, 96  # pixels of a picture at most
MOST_MAPS = 4000  # on a page; about 3 kB each
NOTHING = -1  # in place of a picture that does not exist


@dataclass
class Frames:
    """Pictures, each stored once and named by its index.

    Attributes:
        steps: the events that the page's slider stops at.
        side: of the pictures that were measured, pixels; regions are given in them.
        pool: every picture once, as a data URI, with its index. The others are indices, ``NOTHING`` for none.
        images: by probe, one per step. maps: likewise.
        generations: by probe, of its newest proof: the step and one picture per generation.
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
    names, frames = [row.name for row in run.last.rows], Frames(side_of(run.folder))
    fixed = {name: frames.add(picture_uri(run.folder / "images" / f"{name}.png", IMAGE_SIDE)) for name in names}
    frames.generations = newest_generations(run, frames)
    events = by_priority([event for event in run.events if event.rows and has_pictures(run, event)])
    kept: dict[int, list[tuple[int, int]]] = {}
    for event in events[: max(1, MOST_MAPS // max(1, len(names)))]:
        uris = event_uris(run.folder, event.step, names)
        kept[event.step] = [(frames.add(image), frames.add(shown)) for image, shown in uris]
    frames.steps = sorted(kept)
    for i, name in enumerate(names):
        pairs = [kept[step][i] for step in frames.steps]
        frames.images[name] = [fixed[name] if image == NOTHING else image for image, _ in pairs]
        frames.maps[name] = [shown for _, shown in pairs]
    return frames


def by_priority(events: Sequence[Event]) -> list[Event]:
    """The last, the first, the stop, those with news; then the others, evenly spread at any point of the list."""
    stop = next((event for event in events if event.stop_reason is not None), None)
    quiet = [event for event in events if not event.has_news]
    ranks = {event.step: worth_of(rank) for rank, event in enumerate(quiet)}

    def order(event: Event) -> tuple[bool, bool, bool, bool, float]:
        ends = event is not events[-1], event is not events[0], event is not stop
        return *ends, not event.has_news, -ranks.get(event.step, 0.0)

    return sorted(events, key=order)


def has_pictures(run: Run, event: Event) -> bool:
    """Whether an event's pictures are kept; see ``retention``. A run that draws none has no ``overview``."""
    stem, overview = stem_of(event.step), run.folder / "overview"
    there = (run.folder / "maps" / f"{stem}.safetensors").is_file() or (overview / f"{stem}.jpg").is_file()
    return there or event in (run.events[0], run.events[-1]) or not overview.is_dir()


def event_uris(folder: Path, step: int, names: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Of every probe, what a prompt probe had generated at this event, and the map that decides."""
    maps: dict[str, np.ndarray] = {}
    try:
        with safe_open(folder / "maps" / f"{stem_of(step)}.safetensors", "np") as file:
            known = set(file.keys())
            maps = {name: file.get_tensor(f"{name}/decisive") for name in names if f"{name}/decisive" in known}
    except (OSError, SafetensorError):
        pass
    images = [picture_uri(folder / "images" / name / f"{stem_of(step)}.jpg", GENERATION_SIDE) for name in names]
    return [(image, map_uri(maps[n]) if n in maps else None) for n, image in zip(names, images, strict=True)]


def map_uri(log_values: np.ndarray) -> str | None:
    """A map as a PNG of its own size with few colours, the more opaque the higher; ``None`` where it shows nothing.

    Args:
        log_values: log factors ``(h, w)``.
    """
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
    opacity = bytes((np.sqrt(scale) * 0.85 * 255).round().astype(np.uint8))
    return encoded(picture, "PNG", transparency=opacity, bits=4, optimize=False)


def picture_uri(file: Path, side: int) -> str | None:
    """A picture no larger than ``side`` pixels; ``None`` where it cannot be read."""
    picture = opened(file)
    return None if picture is None else small_uri(picture, side)


def opened(file: Path) -> Image.Image | None:
    """A picture; ``None`` where it cannot be read."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except OSError:
        return None


def small_uri(picture: Image.Image, side: int) -> str:
    """A picture no larger than ``side`` pixels. A smaller one stays as it is, without loss."""
    if max(picture.size) <= side // 2:
        return encoded(picture, "PNG", optimize=True)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return encoded(picture, "JPEG", quality=80, optimize=True)


def encoded(picture: Image.Image, kind: str, **options: object) -> str:
    """A data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)  # type: ignore[arg-type]
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def side_of(folder: Path) -> int:
    """The larger side of the pictures that were measured, all of one size; 1 where there are none."""
    images = folder / "images"
    first = map(opened, sorted([*images.glob("*.png"), *images.glob("*/step_*")])[:8])
    return next((max(picture.size) for picture in first if picture is not None), 1)


def newest_generations(run: Run, frames: Frames) -> dict[str, tuple[int, list[int]]]:
    """By probe, the step of its newest proof whose generations are kept, and those: side by side in one file."""
    found: dict[str, tuple[int, list[int]]] = {}
    for event in reversed(run.events):
        for row in event.rows:
            if not row.copied or row.name in found:
                continue
            together = opened(run.folder / "generations" / row.name / f"{stem_of(event.step)}.jpg")
            if together is None:
                continue
            width, height = together.width // row.copied["generations"], together.height
            parts = [together.crop((i * width, 0, (i + 1) * width, height)) for i in range(row.copied["generations"])]
            found[row.name] = event.step, [frames.add(small_uri(part, GENERATION_SIDE)) for part in parts]
    return found
