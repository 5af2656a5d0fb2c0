"""Training sets of every kind: the same pictures and captions come out, and wrong ones are named."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.picked import hugging_face, photo, save_folder
from torch.utils.data import Dataset, Subset

from memwatch.measure.captions import ProbeError
from memwatch.picking.rows import as_training_set
from memwatch.picking.training_set import RowError, TrainingSet

datasets = pytest.importorskip("datasets")  # the lowest versions are tested without it

PHOTOS = [photo(i, 32) for i in range(4)]
TEXTS = [f"a photo of number {i}" for i in range(4)]
PAIRS = [*zip(PHOTOS, TEXTS, strict=True)]


def same(rows: TrainingSet, which=range(4), texts=TEXTS) -> None:
    """Rows that show the photos of these numbers."""
    assert len(rows) == len(which)
    for row, i in enumerate(which):
        picture = rows.image(row)
        assert picture.mode == "RGB"
        assert np.array_equal(picture, PHOTOS[i])
        assert rows.caption(row) == texts[i]
    assert len({rows.name(row) for row in range(len(rows))}) == len(rows)


def folder_of(path: Path, captions: bool = True) -> Path:
    pictures = {f"{i}.png": picture for i, picture in enumerate(PHOTOS)}
    return save_folder(path, pictures, dict(zip(pictures, TEXTS, strict=True)) if captions else None)


def pictures_and(**columns):
    known = {"image": PHOTOS, "text": TEXTS} | columns
    return hugging_face(**{key: value for key, value in known.items() if value is not None})


def preprocessed():
    return pictures_and().with_transform(lambda rows: {"pixel_values": [0 for _ in rows["image"]]})


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def signed(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(
    ("source", "which"),
    [
        (lambda folder: preprocessed(), range(4)),
        (lambda folder: pictures_and().with_format("torch"), range(4)),
        (lambda folder: pictures_and(text=[[text, "another one"] for text in TEXTS]), range(4)),
        (lambda folder: pictures_and(image=[str(folder / f"{i}.png") for i in range(4)]), range(4)),
        (lambda folder: Subset(pictures_and(), [3, 1]), [3, 1]),
        (lambda folder: Subset(Subset(PAIRS, [3, 1, 0]), [2]), [0]),
        (lambda folder: folder, range(4)),
        (lambda folder: str(folder), range(4)),
        (lambda folder: [{"image": p, "caption": t} for p, t in PAIRS], range(4)),
        (lambda folder: [{"image": np.asarray(p), "caption": t} for p, t in PAIRS], range(4)),
        (lambda folder: [(encoded(p), t) for p, t in PAIRS], range(4)),
        (lambda folder: tuple((signed(p), t) for p, t in PAIRS), range(4)),
        (lambda folder: [{"image": str(folder / f"{i}.png"), "prompt": TEXTS[i]} for i in range(4)], range(4)),
        (lambda folder: [(Image.open(folder / f"{i}.png"), TEXTS[i]) for i in range(4)], range(4)),
    ],
)
def test_rows_of_every_kind(source, which, tmp_path):
    given = source(folder_of(tmp_path))
    rows = as_training_set(given)
    same(rows, which)
    is_folder = isinstance(given, str | Path)
    assert rows.source == (tmp_path if is_folder else given)
    assert rows.name(0) == ("0.png" if is_folder else "row-00000")


def test_what_is_read_anew_and_what_stays_encoded(tmp_path):
    folder = folder_of(tmp_path)
    source = preprocessed()
    assert isinstance(as_training_set(source).raw(0), bytes)
    assert set(source[0]) == {"pixel_values"}  # what the loop reads is as it was
    opened = [(Image.open(folder / f"{i}.png"), TEXTS[i]) for i in range(4)]
    for given in (folder, pictures_and(image=[str(folder / f"{i}.png") for i in range(4)]), opened):
        assert as_training_set(given).file(2) == folder / "2.png"


def test_columns_are_chosen_by_name(tmp_path):
    assert as_training_set(pictures_and(other=["x"] * 4), caption_column="other").caption(0) == "x"
    assert as_training_set(pictures_and(text=None)).caption(0) == as_training_set(PHOTOS).caption(0) == ""
    folder = folder_of(tmp_path)
    assert as_training_set(folder, caption_column="file_name").caption(2) == "2.png"
    for source, key in (
        (pictures_and(), "caption_column"),
        (pictures_and(), "image_column"),
        (folder, "caption_column"),
    ):
        with pytest.raises(ProbeError, match=f"{key} is 'txet', but its columns are: "):
            as_training_set(source, **{key: "txet"})


def test_a_folder_of_folders_with_captions_beside(tmp_path):
    pictures = {f"{'ab'[i % 2]}/{i}.png": picture for i, picture in enumerate(PHOTOS)}
    folder = save_folder(tmp_path / "train", pictures | {".cache/hidden.png": PHOTOS[0]})
    for name, text in zip(pictures, TEXTS, strict=True):
        (folder / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    rows = as_training_set(folder)
    same(rows, [0, 2, 1, 3])
    assert [rows.name(i) for i in range(4)] == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]


def test_metadata_in_a_folder_below_and_a_file_that_is_missing(tmp_path):
    folder = folder_of(tmp_path / "train" / "below")
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "gone.png", "text": "gone"}) + "\n")
    rows = as_training_set(tmp_path / "train")
    assert [rows.caption(i) for i in range(5)] == [*TEXTS, "gone"]
    with pytest.raises(RowError, match="row 4 .*gone.png"):
        rows.image(4)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nowhere", "is no folder"),
        ("", "holds no image"),
        ("train", "dataset: .*metadata.jsonl, line 2: expected 'file_name'"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(where, said, tmp_path):
    if where == "train":
        text = '{"file_name": "0.png"}\n{"text": "no name"}\n'
        (folder_of(tmp_path / "train") / "metadata.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ProbeError, match=said):
        as_training_set(tmp_path / where)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "is empty"),
        (datasets.DatasetDict(train=pictures_and(), test=pictures_and()), "several splits, .*: 'train', 'test'"),
        (pictures_and().to_iterable_dataset(), "IterableDataset cannot be read by row number"),
        (pictures_and().remove_columns("image"), "no column of images; set image_column to one of: text"),
        (["a prompt", "another"], "rows of a list are each 'a prompt'"),
        ([1, 2], "rows of a list are each a int"),
        (({"image": p} for p in PHOTOS), "generator cannot be read by row number"),
        (3, "a int is no training set"),
        ([{"label": 1}], "no column of images; set image_column to one of: label"),
    ],
    ids=["empty", "splits", "stream", "no column", "prompts", "numbers", "generator", "number", "no image"],
)
def test_what_is_no_training_set(source, message):
    with pytest.raises(ProbeError, match=message):
        as_training_set(source)


class Fragile(Dataset):
    """Row 0 is broken; the others are pairs."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if i == 0:
            raise RuntimeError("disk on fire")
        return PAIRS[i]


def test_a_row_that_fails_is_named_and_the_rest_is_there():
    rows = as_training_set(Fragile())
    with pytest.raises(RowError, match="row 0: .*disk on fire"):
        rows.image(0)
    assert rows.file(0) is None
    assert [rows.caption(row) for row in range(2)] == ["", TEXTS[1]]
    with pytest.raises(RowError, match="row 0: .*a dict is no image"):
        as_training_set([({}, "a caption")]).image(0)


class Tossed(Dataset):
    """Rows that are turned over, or have no caption, by a coin."""

    def __init__(self, toss, what: str = "picture") -> None:
        self.toss, self.what = toss, what

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if self.toss() < 0.5:
            return PAIRS[i]
        return (ImageOps.mirror(PHOTOS[i]), TEXTS[i]) if self.what == "picture" else (PHOTOS[i], "")


@pytest.mark.parametrize(
    "toss",
    [random.random, np.random.rand, lambda: float(torch.rand(())), np.random.default_rng(0).random],
    ids=["python", "numpy", "torch", "a generator of its own"],
)
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: Subset(rows, [2, 1])], ids=["rows", "subset"])
@pytest.mark.parametrize("what", ["picture", "caption"])
def test_rows_that_are_transformed_at_random_are_refused(toss, wrap, what):
    message = "row 0 of a Tossed changes each time it is read, so it is transformed at random; pick from the rows "
    with pytest.raises(ProbeError, match=message + "before transforms"):
        as_training_set(wrap(Tossed(toss, what)))


def test_tensors_for_the_network_are_no_images():
    rows = [{"pixel_values": signed(p), "input_ids": [1, 2]} for p in PHOTOS]
    with pytest.raises(ProbeError, match="no column of images; set image_column to one of: pixel_values, input_ids"):
        as_training_set(rows)
    same(as_training_set(rows, image_column="pixel_values"), texts=[""] * 4)


def test_a_prompt_is_the_caption_of_rows_without_one(tmp_path):
    rows = as_training_set([(PHOTOS[0], ""), PAIRS[1]], prompt="a photo of sks dog")
    assert [rows.caption(i) for i in range(2)] == ["a photo of sks dog", TEXTS[1]]
    assert as_training_set(Subset(PHOTOS, [1]), prompt="sks").caption(0) == "sks"
    assert as_training_set(pictures_and(text=None), prompt="sks").caption(3) == "sks"
    assert as_training_set(rows) is rows
    folder = folder_of(tmp_path, captions=False)
    assert as_training_set(folder, prompt="sks").some([1]) == [{"image": folder / "1.png", "text": "sks"}]
