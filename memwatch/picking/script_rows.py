"""The dataset classes of diffusers' example scripts, known by their attributes.

They hand out tensors that are cropped, flipped and tokenized already, so memwatch reads the pictures they were made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memwatch.picking.dataset_rows import dataset_rows
from memwatch.picking.training_set import TrainingSet, as_caption


def script_rows(source: Any) -> TrainingSet | None:
    """Rows of such a dataset; ``None`` where it is none.

    Known are ``DreamBoothDataset`` of all ages, ``CustomDiffusionDataset``, ``TextualInversionDataset``, and those of
    the amused script.
    """
    if hasattr(source, "instance_images_path"):
        return _from_files(source, source.instance_images_path, getattr(source, "instance_prompt", ""))
    if hasattr(source, "instance_images"):
        return _from_pictures(source)
    if hasattr(source, "image_paths") and hasattr(source, "placeholder_token"):
        return _from_files(source, source.image_paths, str(source.placeholder_token))
    if hasattr(source, "hf_dataset") and hasattr(source, "image_key"):
        found = dataset_rows(source.hf_dataset, source.image_key, getattr(source, "prompt_key", None))
        found.source = source
        return found
    return None


def _from_files(source: Any, entries: Sequence[Any], caption: str) -> TrainingSet:
    """Rows of files, or of pairs of file and caption."""
    pairs = [(Path(e[0]), as_caption(e[1])) if isinstance(e, tuple | list) else (Path(e), caption) for e in entries]
    folders = {file.parent for file, _ in pairs}
    return TrainingSet(
        source,
        len(pairs),
        lambda row: pairs[row][0],
        lambda row: pairs[row][1],
        folder=folders.pop() if len(folders) == 1 else None,
        class_images=_class_images(source),
    )


def _from_pictures(source: Any) -> TrainingSet:
    """Rows of opened pictures. One that ``--repeats`` holds several times is several rows, as in the dataset."""
    pictures, captions = source.instance_images, getattr(source, "custom_instance_prompts", None)

    def caption(row: int) -> str:
        own = as_caption(captions[row]) if captions is not None and row < len(captions) else ""
        return own or as_caption(getattr(source, "instance_prompt", ""))

    return TrainingSet(source, len(pictures), pictures.__getitem__, caption, class_images=_class_images(source))


def _class_images(source: Any) -> TrainingSet | None:
    """The images of prior preservation, where the dataset has them."""
    entries = getattr(source, "class_images_path", None)
    if not entries:
        return None
    number = getattr(source, "num_class_images", len(entries))
    caption = as_caption(getattr(source, "class_prompt", ""))
    pairs = [(Path(e[0]), as_caption(e[1])) if isinstance(e, tuple | list) else (Path(e), caption) for e in entries]
    pairs = pairs[:number]
    return TrainingSet(pairs, len(pairs), lambda row: pairs[row][0], lambda row: pairs[row][1])
