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
from support.picked import photo, save_folder
from torch.utils.data import Dataset, Subset

from memwatch.measure.probes import ProbeError
from memwatch.picking.rows import as_training_set
from memwatch.picking.training_set import RowError, TrainingSet

datasets = pytest.importorskip("datasets")  # the lowest versions are tested without it

PHOTOS = [photo(i, 32) for i in range(4)]
TEXTS = [f"a photo of number {i}" for i in range(4)]


def same(rows: TrainingSet, photos=PHOTOS, texts=TEXTS, tolerance: int = 0) -> None:
    assert len(rows) == len(photos)
    for i, (picture, text) in enumerate(zip(photos, texts, strict=True)):
        difference = np.abs(np.asarray(rows.image(i), int) - np.asarray(picture, int))
        assert difference.max() <= tolerance
        assert rows.image(i).mode == "RGB"
        assert rows.caption(i) == text
    names = [rows.name(i) for i in range(len(rows))]
    assert len(set(names)) == len(names)


def folder_of(path: Path, captions: bool = True) -> Path:
    pictures = {f"{i}.png": picture for i, picture in enumerate(PHOTOS)}
    return save_folder(path, pictures, dict(zip(pictures, TEXTS, strict=True)) if captions else None)


def hugging_face(**columns):
    known = {"image": PHOTOS, "text": TEXTS} | columns
    return datasets.Dataset.from_dict({key: value for key, value in known.items() if value is not None}).cast_column(
        "image", datasets.Image()
    )


# --- datasets --------------------------------------------------------------------------------------------------------


def test_a_hugging_face_dataset_whatever_its_transform():
    plain = hugging_face()
    same(as_training_set(plain))
    preprocessed = plain.with_transform(lambda rows: {"pixel_values": [0 for _ in rows["image"]]})
    rows = as_training_set(preprocessed)
    same(rows)
    assert rows.source is preprocessed
    assert rows.name(3) == "row-00003"
    same(as_training_set(plain.with_format("torch")))
    assert set(preprocessed[0]) == {"pixel_values"}  # what the loop reads is as it was


def test_its_images_stay_encoded_until_they_are_looked_at(tmp_path):
    assert isinstance(as_training_set(hugging_face()).raw(0), bytes)
    folder = folder_of(tmp_path / "train")
    paths = [str(folder / f"{i}.png") for i in range(4)]
    rows = as_training_set(hugging_face(image=paths))
    assert rows.file(2) == folder / "2.png"
    same(rows)


def test_columns_by_name_and_lists_of_captions():
    several = hugging_face(text=[[text, "another one"] for text in TEXTS], other=["x"] * 4)
    same(as_training_set(several))
    assert as_training_set(several, caption_column="other").caption(0) == "x"
    assert as_training_set(hugging_face(text=None)).caption(0) == ""
    with pytest.raises(ProbeError, match="caption_column is 'txet', but its columns are: image, text"):
        as_training_set(hugging_face(), caption_column="txet")
    with pytest.raises(ProbeError, match="image_column is 'imgs', but its columns are: image, text"):
        as_training_set(hugging_face(), image_column="imgs")


def test_a_subset_has_rows_of_its_own():
    rows = as_training_set(Subset(hugging_face(), [3, 1]))
    same(rows, [PHOTOS[3], PHOTOS[1]], [TEXTS[3], TEXTS[1]])
    assert rows.name(0) == "row-00000"
    nested = as_training_set(Subset(Subset(hugging_face(), [3, 1, 0]), [2]))
    same(nested, PHOTOS[:1], TEXTS[:1])


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_metadata(tmp_path):
    rows = as_training_set(folder_of(tmp_path / "train"))
    same(rows)
    assert rows.folder == rows.source == tmp_path / "train"
    assert rows.name(1) == "1.png"
    assert rows.file(1) == tmp_path / "train" / "1.png"
    assert as_training_set(str(tmp_path / "train"), caption_column="file_name").caption(2) == "2.png"
    with pytest.raises(ProbeError, match="caption_column is 'label'"):
        as_training_set(tmp_path / "train", caption_column="label")


def test_a_folder_of_folders_with_captions_beside(tmp_path):
    pictures = {f"{'ab'[i % 2]}/{i}.png": picture for i, picture in enumerate(PHOTOS)}
    folder = save_folder(tmp_path / "train", pictures)
    for i in range(4):
        (folder / f"{'ab'[i % 2]}/{i}.txt").write_text(TEXTS[i] + "\n", encoding="utf-8")
    (folder / ".cache").mkdir()
    PHOTOS[0].save(folder / ".cache" / "hidden.png")
    rows = as_training_set(folder)
    same(rows, [PHOTOS[i] for i in (0, 2, 1, 3)], [TEXTS[i] for i in (0, 2, 1, 3)])
    assert [rows.name(i) for i in range(4)] == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]


def test_metadata_in_a_folder_below_and_a_file_that_is_missing(tmp_path):
    folder = folder_of(tmp_path / "train" / "below")
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "gone.png", "text": "gone"}) + "\n")
    rows = as_training_set(tmp_path / "train")
    assert [rows.caption(i) for i in range(5)] == [*TEXTS, "gone"]
    with pytest.raises(RowError, match="row 4 .*gone.png"):
        rows.image(4)


def test_broken_metadata_is_named(tmp_path):
    folder = folder_of(tmp_path / "train")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"text": "no name"}\n', encoding="utf-8")
    with pytest.raises(ProbeError, match=r"metadata.jsonl, line 2: expected an object with 'file_name'"):
        as_training_set(folder)


def test_no_folder_and_no_image(tmp_path):
    with pytest.raises(ProbeError, match="is no folder"):
        as_training_set(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing", encoding="utf-8")
    with pytest.raises(ProbeError, match="holds no image"):
        as_training_set(tmp_path)


# --- rows ------------------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def signed(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(
    "form", [lambda p: p, np.asarray, encoded, signed], ids=["picture", "array", "bytes", "tensor"]
)
def test_rows_of_dicts_and_pairs(form):
    same(as_training_set([{"image": form(p), "caption": t} for p, t in zip(PHOTOS, TEXTS, strict=True)]))
    same(as_training_set([(form(p), t) for p, t in zip(PHOTOS, TEXTS, strict=True)]))


def test_rows_that_name_files(tmp_path):
    folder = folder_of(tmp_path)
    rows = as_training_set([{"image": str(folder / f"{i}.png"), "prompt": TEXTS[i]} for i in range(4)])
    same(rows)
    assert rows.file(0) == folder / "0.png"
    opened = as_training_set([(Image.open(folder / f"{i}.png"), TEXTS[i]) for i in range(4)])
    same(opened)
    assert opened.file(1) == folder / "1.png"
    assert as_training_set(PHOTOS).caption(0) == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "is empty"),
        (
            datasets.DatasetDict(train=hugging_face(), test=hugging_face()),
            "several splits, give one of them: 'train', 'test'",
        ),
        (hugging_face().to_iterable_dataset(), "IterableDataset cannot be read by row number"),
        (hugging_face().remove_columns("image"), "no column of images; set image_column to one of: text"),
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
        return PHOTOS[i], TEXTS[i]


def test_a_row_that_fails_is_named_and_the_rest_is_there():
    rows = as_training_set(Fragile())
    with pytest.raises(RowError, match="row 0: .*disk on fire"):
        rows.image(0)
    assert rows.file(0) is None
    assert rows.caption(1) == TEXTS[1]
    with pytest.raises(RowError, match="row 0: .*a dict is no image"):
        as_training_set([({}, "a caption")]).image(0)
    with pytest.raises(IndexError):
        rows.image(4)


# --- transforms ------------------------------------------------------------------------------------------------------


class Flipped(Dataset):
    """Pairs that are turned over by a coin."""

    def __init__(self, toss) -> None:
        self.toss = toss

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return (ImageOps.mirror(PHOTOS[i]) if self.toss() < 0.5 else PHOTOS[i]), TEXTS[i]


@pytest.mark.parametrize(
    "toss",
    [
        random.random,
        np.random.rand,
        lambda: float(torch.rand(())),
        np.random.default_rng(0).random,
        random.Random(0).random,
    ],
    ids=["python", "numpy", "torch", "a generator of its own", "a random of its own"],
)
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: Subset(rows, [2, 1])], ids=["rows", "subset"])
def test_rows_that_are_transformed_at_random_are_refused(toss, wrap):
    message = "row 0 of a Flipped changes each time it is read, so it is transformed at random; pick from the rows "
    with pytest.raises(ProbeError, match=message + "before transforms"):
        as_training_set(wrap(Flipped(toss)))


def test_captions_that_are_dropped_at_random_are_refused():
    class Dropped(Flipped):
        def __getitem__(self, i):
            return {"image": PHOTOS[i], "text": TEXTS[i] if self.toss() < 0.5 else ""}

    with pytest.raises(ProbeError, match="row 0 of a Dropped changes each time"):
        as_training_set(Dropped(random.random))


def test_tensors_for_the_network_are_no_images():
    rows = [{"pixel_values": signed(p), "input_ids": [1, 2]} for p in PHOTOS]
    with pytest.raises(ProbeError, match="no column of images; set image_column to one of: pixel_values, input_ids"):
        as_training_set(rows)
    same(as_training_set(rows, image_column="pixel_values"), texts=[""] * 4)


# --- some of the rows ------------------------------------------------------------------------------------------------


def test_some_rows_of_a_dataset_are_a_selection():
    source = hugging_face().with_transform(lambda rows: {"pixel_values": [0 for _ in rows["image"]]})
    some = as_training_set(source).some([3, 1])
    assert type(some) is datasets.Dataset
    assert some[0] == {"pixel_values": 0}  # its transform stays
    same(as_training_set(some), [PHOTOS[3], PHOTOS[1]], [TEXTS[3], TEXTS[1]])


@pytest.mark.parametrize("kind", [list, tuple])
def test_some_rows_of_a_list_are_the_very_same_rows(kind):
    base = kind(zip(PHOTOS, TEXTS, strict=True))
    some = as_training_set(base).some([2, 0])
    assert type(some) is kind
    assert some[0] is base[2]
    assert len(some) == 2


def test_some_rows_of_a_folder_are_its_files_with_captions(tmp_path):
    folder = folder_of(tmp_path / "train")
    for source in (folder, str(folder)):
        some = as_training_set(source).some([2, 0])
        assert some == [{"image": folder / f"{i}.png", "text": TEXTS[i]} for i in (2, 0)]
    bare = folder_of(tmp_path / "bare", captions=False)
    assert as_training_set(bare, prompt="sks").some([1]) == [{"image": bare / "1.png", "text": "sks"}]


def test_some_rows_of_anything_else_are_a_subset_of_the_same_base():
    source = Fragile()
    for given, indices in ((source, [2, 0]), (Subset(source, [3, 1, 0]), [0, 3])):
        some = as_training_set(given).some([2, 0])
        assert type(some) is Subset
        assert (some.dataset, some.indices) == (source, indices)


def test_a_prompt_is_the_caption_of_rows_without_one():
    rows = as_training_set([(PHOTOS[0], ""), (PHOTOS[1], TEXTS[1])], prompt="a photo of sks dog")
    assert [rows.caption(i) for i in range(2)] == ["a photo of sks dog", TEXTS[1]]
    assert as_training_set(Subset(PHOTOS, [1]), prompt="sks").caption(0) == "sks"
    assert as_training_set(hugging_face(text=None), prompt="sks").caption(3) == "sks"
    assert as_training_set(rows) is rows
