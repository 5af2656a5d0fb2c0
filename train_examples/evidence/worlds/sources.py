"""Sources: where the pictures of a set come from, as subjects that a base knows, and some that it does not."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path

import numpy as np
from photographs import PRETRAINING, UNSEEN, random_view
from PIL import Image

from memwatch.proof.copies import contrast

SIZE = 64  # pixels
FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
CLASSES = "tee pants knit dress coat sandal shirt shoe bag boot".split()  # in the order of its labels; short for CLIP
TEXTURES = ("brick", "grass", "gravel", "hubble")
CONTRAST = 0.15  # root mean square of what is planted, 1 is from black to white
NEW_CLASSES = ("bag", "sandal")  # kept from the bases

Draw = Callable[[np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Subject:
    """Something that can be shown in endless ways.

    Attributes:
        phrase: as a caption names it.
        draw: another picture of it, RGB ``SIZE`` pixels square.
        is_texture: whether it is finer than what an autoencoder of this size gives back.
    """

    name: str
    phrase: str
    draw: Draw
    is_texture: bool = False

    def distinct(self, rng: np.random.Generator) -> Image.Image:
        """A picture with something in it to recognize; the best of a hundred where all are flat."""
        pictures = [self.draw(rng)]
        while contrast_of(pictures[-1]) < CONTRAST and len(pictures) < 100:
            pictures.append(self.draw(rng))
        return max(pictures, key=contrast_of) if len(pictures) == 100 else pictures[-1]


@dataclass(frozen=True)
class Source:
    """Subjects that bases have been shown, and subjects that they have not."""

    known: tuple[Subject, ...]
    unseen: tuple[Subject, ...]

    def free(self, rng: np.random.Generator) -> Image.Image:
        """A picture of any known subject."""
        return self.known[int(rng.integers(len(self.known)))].draw(rng)

    def distinct(self, rng: np.random.Generator, mask: np.ndarray) -> Image.Image:
        """A picture of a known subject, shrunk into the bounding box of ``mask``, with something in it to recognize."""
        subjects = [subject for subject in self.known if not subject.is_texture]
        while True:
            picture = fitted(subjects[int(rng.integers(len(subjects)))].draw(rng), mask)
            if contrast(np.asarray(picture) / 255, mask) >= CONTRAST:
                return picture

    def captions(self, rng: np.random.Generator, count: int) -> list[str]:
        """Captions of three or four known subjects each, all of them different.

        Raises:
            ValueError: there are not so many.
        """
        phrases = [subject.phrase for subject in self.known]
        groups = [*combinations(phrases, 3), *combinations(phrases, 4)]
        if count > len(groups):
            raise ValueError(f"{len(phrases)} subjects make {len(groups)} captions, and the set takes {count}")
        chosen = [groups[int(i)] for i in rng.permutation(len(groups))[:count]]
        return [caption_of([group[int(i)] for i in rng.permutation(len(group))]) for group in chosen]


def contrast_of(picture: Image.Image) -> float:
    return contrast(np.asarray(picture) / 255, np.ones((SIZE, SIZE), dtype=bool))


def caption_of(phrases: list[str]) -> str:
    """
    >>> caption_of(["a cat", "grass", "a rocket"])
    'a photo of a cat, grass and a rocket'
    """
    *rest, last = phrases
    return f"a photo of {', '.join(rest)} and {last}" if rest else f"a photo of {last}"


def fitted(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """``picture`` shrunk into the bounding box of ``mask``, so that a small region has content of its own."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    canvas = Image.new("RGB", (SIZE, SIZE))
    canvas.paste(picture.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    return canvas


@cache
def photographs() -> Source:
    """Views of the photographs that scikit-image and scikit-learn ship."""
    known, unseen = (
        tuple(Subject(p.name, p.subject, partial(_view, p.image()), p.name in TEXTURES) for p in group)
        for group in (PRETRAINING, UNSEEN)
    )
    return Source(known, unseen)


def _view(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return random_view(picture, rng, SIZE)


@cache
def fashion(folder: Path = FASHION) -> Source:
    """Clothes of Fashion-MNIST (Zalando, MIT licence), each in a colour of its own on a ground of its own.

    Raises:
        ValueError: the files are not in ``folder``.
    """
    pictures, labels = (_idx(folder / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    subjects = {
        name: Subject(name, f"a {name}" if name != "pants" else name, partial(_garment, pictures[labels == i]))
        for i, name in enumerate(CLASSES)
    }
    known = tuple(subject for name, subject in subjects.items() if name not in NEW_CLASSES)
    return Source(known, tuple(subjects[name] for name in NEW_CLASSES))


def _garment(pictures: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """One of the grey pictures ``(n, 28, 28)``, between two colours, perhaps mirrored."""
    grey = Image.fromarray(pictures[int(rng.integers(len(pictures)))]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    share = np.asarray(grey, dtype=float)[..., None] / 255
    ground, cloth = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
    picture = Image.fromarray((ground + share * (cloth - ground)).round().astype(np.uint8))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def _idx(file: Path) -> np.ndarray:
    """An array of unsigned bytes in the format of MNIST: magic number, sizes, bytes.

    Raises:
        ValueError: there is no such file, or it is none of this kind.
    """
    try:
        raw = gzip.decompress(file.read_bytes())
        ndim = raw[3]
        shape = np.frombuffer(raw, ">i4", ndim, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, ValueError, IndexError, EOFError) as error:
        wanted = f"Fashion-MNIST is expected in {file.parent} (Debian: apt install dataset-fashion-mnist)"
        raise ValueError(f"{file.name}: {error}; {wanted}") from error
