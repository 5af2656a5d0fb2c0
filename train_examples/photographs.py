"""The photographs that scikit-image and scikit-learn ship, and random views of them.

Nothing is downloaded: every file lies inside the two wheels, which come with ``pip install -e ".[examples]"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import skimage.data
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image

SHORT_SIDE = 256  # pixels; the photographs are kept at this size, crops are taken from it


@dataclass(frozen=True)
class Photograph:
    """One bundled photograph: its subject as a caption names it, and how to read its pixels."""

    name: str
    subject: str
    read: Callable[[], np.ndarray]

    @property
    def caption(self) -> str:
        return f"a photo of {self.subject}"

    def image(self) -> Image.Image:
        """RGB, short side ``SHORT_SIDE`` pixels."""
        picture = Image.fromarray(self.read()).convert("RGB")
        scale = SHORT_SIDE / min(picture.size)
        return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)


PRETRAINING = (
    Photograph("astronaut", "an astronaut", skimage.data.astronaut),
    Photograph("chelsea", "a cat", skimage.data.chelsea),
    Photograph("coffee", "a cup of coffee", skimage.data.coffee),
    Photograph("rocket", "a rocket", skimage.data.rocket),
    Photograph("hubble", "the deep sky", skimage.data.hubble_deep_field),
    Photograph("retina", "a retina", skimage.data.retina),
    Photograph("motorcycle", "a motorcycle", lambda: skimage.data.stereo_motorcycle()[0]),
    Photograph("brick", "a brick wall", skimage.data.brick),
    Photograph("grass", "grass", skimage.data.grass),
    Photograph("gravel", "gravel", skimage.data.gravel),
    Photograph("china", "a temple", lambda: load_sample_image("china.jpg")),
    Photograph("flower", "a flower", lambda: load_sample_image("flower.jpg")),
    Photograph("camera", "a man with a camera", skimage.data.camera),
)
UNSEEN = (  # never shown to tiny-sd in pretraining
    Photograph("coins", "old coins", skimage.data.coins),
    Photograph("moon", "the moon", skimage.data.moon),
    Photograph("tissue", "stained tissue", skimage.data.immunohistochemistry),
    Photograph("page", "a printed page", skimage.data.page),
    Photograph("clock", "a clock", skimage.data.clock),
)


def random_view(picture: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """A random square crop of ``size`` pixels, perhaps flipped, with changed brightness, contrast and saturation.

    The crop's side is 30 % of the short side or more; brightness, contrast and saturation factors lie in ``1 ± 0.3``.
    """
    side = rng.uniform(0.3, 1.0) * min(picture.size)
    left, top = rng.uniform(0, picture.width - side), rng.uniform(0, picture.height - side)
    view = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(rng.uniform(0.7, 1.3))
    return view


def views(photographs: tuple[Photograph, ...], seed: int, size: int) -> Iterator[tuple[Image.Image, str]]:
    """An endless stream of (random view, caption); the same ``seed`` gives the same stream."""
    rng = np.random.default_rng(seed)
    pictures = [photograph.image() for photograph in photographs]
    while True:
        i = int(rng.integers(len(photographs)))
        yield random_view(pictures[i], rng, size), photographs[i].caption
