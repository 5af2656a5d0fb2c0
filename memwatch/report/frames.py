"""Frames: the pictures of the report page as data URIs, small enough to send by mail.

A training image is there once. A map is a PNG of its own few pixels, which the browser enlarges. Events whose pictures
are kept no longer are left out, and where all others would be too much, quiet ones of them; events with news, the first
and the last go first.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from memwatch.report.heatmap import colours, scaled
from memwatch.report.history import Event, Run
from memwatch.report.retention import stem_of

LEVELS = 16  # colours of a map
MAP_SIDE = 64  # pixels of a map at most
IMAGE_SIDE, GENERATION_SIDE = 192, 96  # pixels of a picture at most
FEW, SMALL_PAGE, LARGE_PAGE = 800, 2_500_000, 12_000_000  # bytes of pictures: up to 800 maps, and at most
NOTHING = -1  # in place of a picture that does not exist


@dataclass(frozen=True)
class Frames:
    """Pictures by place.

    Attributes:
        steps: the events that the page's slider stops at.
        left_out: how many events it passes over. gone: of how many of those no pictures are kept.
        side: of the pictures that memwatch looked at, pixels; regions are given in them.
        pool: every picture once, as a data URI. The others are indices into it, ``NOTHING`` for none.
        images: by probe, one per step. maps: likewise.
        generations: by probe, of its newest proof: the step and one picture per generation.
    """

    steps: tuple[int, ...]
    left_out: int = 0
    gone: int = 0
    side: int = 1
    pool: tuple[str, ...] = ()
    images: dict[str, list[int]] = field(default_factory=dict)
    maps: dict[str, list[int]] = field(default_factory=dict)
    generations: dict[str, tuple[int, list[int]]] = field(default_factory=dict)


class Pool:
    """Pictures that are kept once each. ``bytes`` is what they come to."""

    def __init__(self) -> None:
        self.uris: dict[str, int] = {}
        self.bytes = 0

    def add(self, uri: str | None) -> int:
        """The picture's index."""
        if uri is None:
            return NOTHING
        if uri not in self.uris:
            self.uris[uri] = len(self.uris)
            self.bytes += len(uri) + 3  # quotes and comma
        return self.uris[uri]


def frames_of(run: Run, max_factor: float) -> Frames:
    """All pictures of a run that the page can hold; files that are gone or broken leave a gap.

    Args:
        max_factor: the reduction factor at the top of the colour scale.
    """
    names = [row.name for row in run.last.rows]
    judged = [event for event in run.events if event.rows]
    pool, events = Pool(), [event for event in judged if has_pictures(run, event)]
    fixed = {name: pool.add(picture_uri(run.folder / "images" / f"{name}.png", IMAGE_SIDE)) for name in names}
    generations = newest_generations(run, pool)
    budget = min(LARGE_PAGE, SMALL_PAGE * max(1.0, len(names) * len(events) / FEW))
    kept: dict[int, tuple[list[int], list[int]]] = {}
    for event in by_priority(events):
        uris = [*event_uris(run.folder, event.step, names, max_factor)]
        new = {uri for pair in uris for uri in pair if uri is not None and uri not in pool.uris}
        if kept and pool.bytes + sum(map(len, new)) > budget:
            break
        images, maps = ([pool.add(pair[i]) for pair in uris] for i in (0, 1))
        kept[event.step] = images, maps
    steps = tuple(sorted(kept))
    return Frames(
        steps,
        len(run.events) - len(steps),
        len(judged) - len(events),
        side_of(run.folder),
        tuple(pool.uris),
        {n: [i if (i := kept[s][0][k]) != NOTHING else fixed[n] for s in steps] for k, n in enumerate(names)},
        {n: [kept[s][1][k] for s in steps] for k, n in enumerate(names)},
        generations,
    )


def by_priority(events: Sequence[Event]) -> list[Event]:
    """The last, the first, those with news; then the others, evenly spread at any point of the list."""
    order = [events[-1], events[0]] if events else []
    order += [e for e in events if e.stop_reason is not None][:1] + [e for e in events if e.has_news]
    quiet = [i for i, event in enumerate(events) if not event.has_news]
    order += [events[quiet[i]] for i in spread(len(quiet))]
    return list({event.step: event for event in order}.values())


def has_pictures(run: Run, event: Event) -> bool:
    """Whether an event's pictures are kept; see ``retention``. A run that draws none has no ``overview``."""
    stem, overview = stem_of(event.step), run.folder / "overview"
    there = (run.folder / "maps" / f"{stem}.safetensors").is_file() or picture_at(overview, stem).is_file()
    return there or event.step in (run.events[0].step, run.events[-1].step) or not overview.is_dir()


def spread(count: int) -> Iterator[int]:
    """0 to ``count - 1``, the middle first, then the middles of both halves, and so on.

    >>> list(spread(7))
    [3, 1, 5, 0, 2, 4, 6]
    """
    parts = [(0, count)]
    while parts:
        middles = [(low + high) // 2 for low, high in parts if low < high]
        yield from middles
        parts = [half for low, high in parts if low < high for half in halves(low, high)]


def halves(low: int, high: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What is left of a range without its middle."""
    middle = (low + high) // 2
    return (low, middle), (middle + 1, high)


def event_uris(
    folder: Path, step: int, names: Sequence[str], max_factor: float
) -> Iterator[tuple[str | None, str | None]]:
    """Of every probe, what a prompt probe had generated at this event, and the map."""
    stem = stem_of(step)
    maps = read_maps(folder / "maps" / f"{stem}.safetensors", names)
    for name in names:
        shot = picture_uri(picture_at(folder / "images" / name, stem), GENERATION_SIDE)
        yield shot, map_uri(maps[name], max_factor) if name in maps else None


def read_maps(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """By probe, the map that decides, ``(h, w)``, log factors; without those that a file does not hold."""
    try:
        with safe_open(file, "np") as opened:
            known = set(opened.keys())
            found = {name: opened.get_tensor(f"{name}/decisive") for name in names if f"{name}/decisive" in known}
            return {name: values.astype(np.float32) for name, values in found.items()}
    except (OSError, SafetensorError):
        return {}


def map_uri(log_values: np.ndarray, max_factor: float) -> str | None:
    """A map as a PNG of its own size with few colours, the more opaque the higher; ``None`` where it shows nothing."""
    side = -(-max(log_values.shape) // MAP_SIDE)
    if side > 1:  # the mean of each block
        h, w = (n // side for n in log_values.shape)
        log_values = log_values[: h * side, : w * side].reshape(h, side, w, side).mean((1, 3))
    index = (scaled(log_values, max_factor) * (LEVELS - 1)).round().astype(np.uint8)
    if not index.any():
        return None
    scale = np.linspace(0, 1, LEVELS)
    picture = Image.fromarray(index).convert("P")
    picture.putpalette(colours(scale[None])[0].tobytes())
    opacity = bytes((np.sqrt(scale) * 0.85 * 255).round().astype(np.uint8))
    return encoded(picture, "PNG", transparency=opacity, bits=4, optimize=False)


def picture_at(folder: Path, stem: str) -> Path:
    """An event's picture; a run of an older version has PNGs."""
    older = folder / f"{stem}.png"
    return older if older.is_file() else folder / f"{stem}.jpg"


def picture_uri(file: Path, side: int) -> str | None:
    """A picture no larger than ``side`` pixels; ``None`` where it cannot be read."""
    try:
        with Image.open(file) as opened:
            return small_uri(opened.convert("RGB"), side)
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
    """The larger side of the pictures that were looked at, all of one size; 1 where there are none."""
    images = folder / "images"
    for file in sorted([*images.glob("*.png"), *images.glob("*/step_*")])[:8]:
        try:
            with Image.open(file) as opened:
                return max(opened.size)
        except OSError:
            continue
    return 1


def newest_generations(run: Run, pool: Pool) -> dict[str, tuple[int, list[int]]]:
    """By probe, the step of its newest proof whose generations are kept, and those."""
    found: dict[str, tuple[int, list[int]]] = {}
    for event in reversed(run.events):
        for row in event.rows:
            if row.copied and row.name not in found:
                file = picture_at(run.folder / "generations" / row.name, stem_of(event.step))
                if uris := split(file, row.copied["generations"]):
                    found[row.name] = event.step, [pool.add(uri) for uri in uris]
    return found


def split(file: Path, count: int) -> list[str]:
    """The ``count`` generations that lie side by side in a file; none where it cannot be read."""
    try:
        with Image.open(file) as opened:
            strip = opened.convert("RGB")
    except OSError:
        return []
    width = strip.width // count
    return [small_uri(strip.crop((i * width, 0, (i + 1) * width, strip.height)), GENERATION_SIDE) for i in range(count)]
