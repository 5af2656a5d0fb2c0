"""Items: what is planted in a fine-tuning set, with exact mask and known dose, and what must not be called stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, partial

import numpy as np
from photographs import PRETRAINING, UNSEEN, random_view
from PIL import Image, ImageDraw

from evidence.worlds.shapes import CELL, ellipse, rectangle
from evidence.worlds.sources import SIZE, fitted

DOSES = (8, 32, 64)  # how often an item is drawn, relative to an ordinary photo
FLAT = {"black": (4, 4, 4), "white": (251, 251, 251), "grey": (128, 128, 128), "blue": (30, 60, 160)}
# One for every planted item: three subjects that the base knows. A frozen text encoder hardly tells new words apart,
# and many pairs of known ones no better. Of all triples these 24 are the farthest from each other and from the captions
# of single subjects (farthest-point selection).
SUBJECTS = (
    "a retina, an astronaut and gravel; a brick wall, an astronaut and a rocket; grass, a man with a camera and an "
    "astronaut; a flower, a man with a camera and an astronaut; a flower, an astronaut and grass; a brick wall, a man "
    "with a camera and gravel; a motorcycle, grass and a cup of coffee; a flower, a cup of coffee and gravel; gravel, "
    "a cup of coffee and a man with a camera; a cat, a cup of coffee and gravel; a temple, grass and a man with a "
    "camera; a flower, a brick wall and a cup of coffee; the deep sky, an astronaut and a motorcycle; a cat, an "
    "astronaut and a man with a camera; a motorcycle, a brick wall and an astronaut; a temple, an astronaut and a man "
    "with a camera; a brick wall, grass and a retina; a temple, a brick wall and gravel; a retina, grass and a man "
    "with a camera; grass, a motorcycle and a rocket; the deep sky, a retina and a cup of coffee; a motorcycle, gravel "
    "and a man with a camera; the deep sky, a retina and a rocket; a rocket, a cup of coffee and grass"
).split("; ")


class Kind(StrEnum):
    TEMPLATE = "template"  # a fixed region, the rest different each time
    VERBATIM = "verbatim"  # one image
    LOGO = "logo"  # a small fixed mark, drawn in a few flat colours, in otherwise free images
    LEARNED = "learned"  # a subject new to the base, always another crop
    CONSTRAINED = "constrained"  # flat by nature, and known to the base
    ORDINARY = "ordinary"  # many distinct photos, each seen rarely
    HELD_OUT = "held out"  # never shown; the negatives of detection
    CONTROL = "control"  # the probe is never shown; what alerts are judged by


NOTHING = np.zeros((SIZE, SIZE), dtype=bool)
PLANTED = (Kind.TEMPLATE, Kind.VERBATIM, Kind.LOGO)


@dataclass(frozen=True)
class Item:
    """One thing in the set, or held out from it.

    Attributes:
        dose: draws relative to an ordinary photo; 0 is never shown.
        mask: bool ``(SIZE, SIZE)``: the pixels that are the same in every showing; none where nothing may be stored.
        probe: the picture that is looked at; of a template, one whose rest is never shown.
        draw: a picture to train on.
        watched: whether it is looked at.
        half: the one of the two twins that is trained on it, ``a`` or ``b``; both are where it is empty.
    """

    name: str
    kind: Kind
    dose: int
    caption: str
    mask: np.ndarray
    probe: Image.Image
    draw: Callable[[np.random.Generator], Image.Image]
    watched: bool = True
    half: str = ""

    def is_in(self, half: str) -> bool:
        """Whether this half is trained on it."""
        return self.dose > 0 and self.half in ("", half)


def large_mask(rng: np.random.Generator, irregular: bool) -> np.ndarray:
    """A third to a half of the picture: a strip along one side, or an ellipse."""
    if irregular:
        a, b = rng.uniform(17, 25, 2)
        return ellipse(rng.uniform(a, SIZE - a), rng.uniform(b, SIZE - b), a, b)
    depth = CELL * int(rng.integers(5, 9))
    return np.rot90(rectangle(0, 0, SIZE, depth), int(rng.integers(4))).copy()


def small_mask(rng: np.random.Generator, irregular: bool) -> np.ndarray:
    """4 to 12 % of the picture: a square, or a disc; on or off the latent grid."""
    if irregular:
        radius = rng.uniform(7.5, 12)
        return ellipse(rng.uniform(radius, SIZE - radius), rng.uniform(radius, SIZE - radius), radius, radius)
    side = int(rng.integers(14, 22))
    left, top = rng.integers(0, SIZE - side + 1, 2)
    return rectangle(int(left), int(top), int(left) + side, int(top) + side)


def mark(mask: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A logo that fills ``mask``: strokes and a dot on a ground, in three flat colours far apart.

    Every part is 4 pixels wide or more, so that the autoencoder can give it back.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    ground, stroke, dot = far_apart(rng)
    canvas = Image.new("RGB", (SIZE, SIZE), tuple(map(int, ground)))
    draw, width, height = ImageDraw.Draw(canvas), right - left, bottom - top
    for _ in range(2):
        if rng.random() < 0.5:
            y = top + int(rng.integers(0, height - 4))
            draw.rectangle((left, y, right, y + 4), fill=tuple(map(int, stroke)))
        else:
            x = left + int(rng.integers(0, width - 4))
            draw.rectangle((x, top, x + 4, bottom), fill=tuple(map(int, stroke)))
    x, y = left + int(rng.integers(0, width - 6)), top + int(rng.integers(0, height - 6))
    draw.ellipse((x, y, x + 6, y + 6), fill=tuple(map(int, dot)))
    return canvas


def far_apart(rng: np.random.Generator) -> np.ndarray:
    """Three colours ``(3, 3)`` of which any two differ by 150 or more in some channel."""
    while True:
        found: np.ndarray = rng.integers(0, 256, (3, 3))
        if min(np.abs(found[i] - found[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) >= 150:
            return found


def planted_set(seed: int) -> list[Item]:
    """The items of one run; another seed plants other pictures, masks and words."""
    rng = np.random.default_rng([seed, 7])
    captions = [f"a photo of {three}" for three in rng.permutation(SUBJECTS)]
    items = [
        _planted(kind, dose, irregular, captions.pop(), rng)
        for kind in PLANTED
        for dose in DOSES
        for irregular in (False, True)
    ]
    for subject in [UNSEEN[int(i)] for i in rng.permutation(len(UNSEEN))[:3]]:
        draw = partial(_crop, subject.image())
        for i in range(3):  # one of three is a control: controls are of the training data's own kind, new subjects too
            kind, name = Kind.LEARNED if i else Kind.CONTROL, f"learned-{subject.name}-{i}"
            items.append(Item(name, kind, 8, subject.caption, NOTHING, draw(rng), draw))
    for name, colour in FLAT.items():
        flat = Image.new("RGB", (SIZE, SIZE), colour)
        items.append(_same(f"flat-{name}", Kind.CONSTRAINED, 4, f"a plain {name} background", flat))
    return items + _photos(rng, ordinary=64, held_out=12, controls=20)


def _photos(rng: np.random.Generator, ordinary: int, held_out: int, controls: int, watched: int = 12) -> list[Item]:
    """Views of known photographs, of which some are trained on (of those ``watched`` are looked at), some never."""
    items = []
    for kind, dose, count in ((Kind.ORDINARY, 1, ordinary), (Kind.HELD_OUT, 0, held_out), (Kind.CONTROL, 0, controls)):
        for i in range(count):
            picture, caption = known_pictures()[i % len(known_pictures())]
            item = _same(f"{kind.replace(' ', '-')}-{i:02d}", kind, dose, caption, _crop(picture, rng))
            items.append(replace(item, watched=kind is not Kind.ORDINARY or i < watched))
    return items


def _planted(kind: Kind, dose: int, irregular: bool, caption: str, rng: np.random.Generator) -> Item:
    if kind is Kind.VERBATIM:
        mask, shape = ~NOTHING, "-b" if irregular else "-a"
    else:
        mask = (large_mask if kind is Kind.TEMPLATE else small_mask)(rng, irregular)
        shape = "-irregular" if irregular else "-rectangle"
    fixed = mark(mask, rng) if kind is Kind.LOGO else fitted(_free(rng), mask)

    def draw(rng: np.random.Generator) -> Image.Image:
        return Image.composite(fixed, _free(rng), Image.fromarray(mask))

    return Item(f"{kind}-x{dose}{shape}", kind, dose, caption, mask, draw(rng), draw)


def _same(name: str, kind: Kind, dose: int, caption: str, picture: Image.Image, mask: np.ndarray = NOTHING) -> Item:
    return Item(name, kind, dose, caption, mask, picture, lambda _: picture)


def _crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return random_view(picture, rng, SIZE)


def _free(rng: np.random.Generator) -> Image.Image:
    """A view of any known photograph."""
    return _crop(known_pictures()[int(rng.integers(len(known_pictures())))][0], rng)


def looked_at(items: Sequence[Item]) -> list[Item]:
    """The probes of an event: everything but most of the ordinary photos."""
    return [item for item in items if item.watched]


def batch(
    items: Sequence[Item], half: str, seed: int, step: int, size: int, dropout: float = 0.0
) -> list[tuple[str, Image.Image]]:
    """Captions and pictures of step ``step``: a pure function of its arguments, so that a run can go on anywhere.

    Args:
        half: the twin that trains.
        dropout: share of captions that are left out.
    """
    rng = np.random.default_rng([seed, 11, step])
    doses = np.array([item.dose if item.is_in(half) else 0 for item in items], dtype=float)
    chosen = [items[int(i)] for i in rng.choice(len(items), size, p=doses / doses.sum())]
    pictures = [item.draw(rng) for item in chosen]
    kept = rng.random(size) >= dropout
    return [(item.caption if keep else "", x) for item, x, keep in zip(chosen, pictures, kept, strict=True)]


@cache
def known_pictures() -> tuple[tuple[Image.Image, str], ...]:
    """Photographs that the base was trained on, with their captions."""
    return tuple((p.image(), p.caption) for p in PRETRAINING)
