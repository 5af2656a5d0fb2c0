"""``memwatch.pick``: what to watch of a training set, and what to hold out of it, before a DataLoader exists."""

from __future__ import annotations

from typing import Any

from memwatch.config import require
from memwatch.denoiser import untouched_streams
from memwatch.measure.probes import MIN_CONTROLS
from memwatch.picking.cache import shared_survey
from memwatch.picking.choose import choose
from memwatch.picking.picked import Picked
from memwatch.picking.rows import as_training_set


def pick(
    source: Any,
    *,
    probes: int = 16,
    controls: int = 20,
    seed: int = 0,
    prompt: str | None = None,
    class_images: Any = None,
    class_prompt: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Picked:
    """Pick what to watch of a training set, and what to hold out of it as controls.

    It is a pure function of the rows and the seed, the same on every rank, and draws from no global random state. Call
    it before transforms and DataLoader, train on ``picked.train``, and give ``picked`` to ``MemWatch``::

        picked = memwatch.pick(dataset["train"])
        train_dataset = picked.train.with_transform(preprocess)

    The first process surveys the images (duplicates, shared parts, outliers) and keeps the result in the user's cache;
    others wait for it, and later calls read it.

    Args:
        source: an image folder, a ``datasets.Dataset`` (its raw rows are read), a list, a ``Subset``, or anything
            indexable whose rows have image and text.
        probes: how many rows are watched, at least 0.
        controls: how many are held out, at least 11, or 0 for none. One row in five at most, and where that is fewer
            than 11, none; ``picked.notes`` say so.
        prompt: the caption of rows that have none (DreamBooth's ``--instance_prompt``).
        class_images: DreamBooth's class (prior preservation) images, like ``source``; up to half of them become
            controls. Train on ``picked.class_train``.
        class_prompt: their caption.
        image_column, caption_column: where they have other names than training scripts use.

    Raises:
        ConfigError: a number that is not allowed.
        ProbeError: rows that cannot be read, or are transformed at random.
    """
    require(isinstance(probes, int) and probes >= 0, "probes", probes, "0 or greater")
    ok = isinstance(controls, int) and (controls == 0 or controls >= MIN_CONTROLS)
    require(ok, "controls", controls, f"{MIN_CONTROLS} or greater, as judging takes, or 0 for none")
    require(isinstance(seed, int) and seed >= 0, "seed", seed, "0 or greater")
    columns = {"image_column": image_column, "caption_column": caption_column}
    with untouched_streams():
        rows = as_training_set(source, **columns, prompt=prompt)
        others = None if class_images is None else as_training_set(class_images, **columns, prompt=class_prompt)
        found = shared_survey(rows)
        return choose(rows, found, probes=probes, controls=controls, seed=seed, class_images=others)
