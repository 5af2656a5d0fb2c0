"""Pictures: cut to the square that training sees. What is no file yet is read as everywhere else."""

from __future__ import annotations

from PIL import Image

from memwatch.measure.images import decoded as decoded


def square(picture: Image.Image, side: int) -> Image.Image:
    """The middle square, ``side`` pixels wide, as training scripts resize the short side and crop."""
    short = min(picture.size)
    left, top = (picture.width - short) / 2, (picture.height - short) / 2
    box = (left, top, left + short, top + short)
    return picture.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
