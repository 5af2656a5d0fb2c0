"""``memwatch.pick``: a pure function of the rows and the seed, which reads raw rows and draws from no global stream."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from memwatch.picking.pictures import decoded
from PIL import Image
from support.picked import contents, photo, save_folder, with_logo
from torch.utils.data import Dataset, Subset

import memwatch
from memwatch import ConfigError, Picked, Probe, ProbeError
from memwatch.picking.mix import Why
from memwatch.picking.training_set import content_key

NUMBER = 60
PHOTOS = [photo(i, 32) for i in range(NUMBER)]
TEXTS = [f"a photo of number {i}" for i in range(NUMBER)]
ROWS = [{"image": p, "text": t, "row": i} for i, (p, t) in enumerate(zip(PHOTOS, TEXTS, strict=True))]
KINDS = ["list", "tuple", "folder", "subset", "torch", "hugging face"]


class Pairs(Dataset):
    """A data set as people write it."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self):
        return NUMBER

    def __getitem__(self, i):
        self.read += 1
        return PHOTOS[i], TEXTS[i]


def hugging_face(number: int = NUMBER):
    datasets = pytest.importorskip("datasets")  # the lowest versions are tested without it
    columns = {"image": PHOTOS[:number], "text": TEXTS[:number], "row": list(range(number))}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def source_of(kind: str, folder):
    if kind == "folder":
        pictures = {f"{i:02d}.png": p for i, p in enumerate(PHOTOS)}
        return save_folder(folder / "train", pictures, dict(zip(pictures, TEXTS, strict=True)))
    if kind == "hugging face":
        return hugging_face()
    if kind == "subset":
        return Subset([*ROWS, *ROWS], range(NUMBER))
    return {"list": list, "tuple": tuple}[kind](ROWS) if kind != "torch" else Pairs()


def numbers(picked: Picked):
    return [
        [(w.row, w.why, w.group) for w in picked.watched],
        *(picked.held_out, picked.peers, picked.rotation, picked.notes, picked.train_rows, picked.class_held_out),
    ]


def streams():
    return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state()


def shown(row) -> str:
    """What the picture hashes to that is, or is in, a row of any kind or a probe."""
    if isinstance(row, dict | tuple):
        row = row["image"] if isinstance(row, dict) else row[0]
    return content_key(decoded(row.image if isinstance(row, Probe) else row))


# --- a pure function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_and_seed_give_the_same_answer(kind, tmp_path, monkeypatch):
    source = source_of(kind, tmp_path)
    of_any_other_kind = numbers(memwatch.pick(list(zip(PHOTOS, TEXTS, strict=True)), probes=8))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in ("surveyed", "read from the cache"):
        assert numbers(memwatch.pick(source, probes=8)) == of_any_other_kind
    assert numbers(memwatch.pick(source, probes=8, seed=1)) != of_any_other_kind


@pytest.mark.parametrize("kind", KINDS)
def test_no_global_random_state_is_drawn_from(kind, tmp_path):
    source, before = source_of(kind, tmp_path), streams()
    picked = memwatch.pick(source, class_images=PHOTOS[:30])
    assert len(picked.train) + len(picked.held_out) == NUMBER
    assert picked.control_keys
    after = streams()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_no_transformed_row_is_read():
    calls = []
    source = hugging_face().with_transform(lambda rows: calls.append(rows) or {"pixel_values": [0] * len(rows["row"])})
    picked = memwatch.pick(source)
    assert [p.prompt for p in picked.probes()] == [TEXTS[w.row] for w in picked.watched]
    assert len(picked.controls()) == 12
    assert len(picked.train) == 48
    assert calls == []
    assert picked.train[0] == {"pixel_values": 0}  # the loop's own transform is still there
    assert len(calls) == 1


def test_rows_that_are_transformed_at_random_are_refused():
    class Flipped(Pairs):
        def __getitem__(self, i):
            picture, text = super().__getitem__(i)
            return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else picture, text

    before = streams()
    with pytest.raises(ProbeError, match="is another one each time it is read.*pick from the rows before transforms"):
        memwatch.pick(Flipped())
    assert before[:3] == streams()[:3]


# --- what is trained on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_train_is_everything_but_what_is_held_out_and_of_the_same_type(kind, tmp_path):
    source = source_of(kind, tmp_path)
    picked = memwatch.pick(source)
    train, held_out = picked.train, set(picked.held_out)
    assert len(held_out) == 12  # one in five
    assert picked.train is train
    assert picked.train_rows == [row for row in range(NUMBER) if row not in held_out]
    given = [shown(train[i]) for i in range(len(train))]
    assert given == [shown(PHOTOS[row]) for row in picked.train_rows]
    controls = [shown(probe) for probe in picked.controls()]
    assert controls == [shown(PHOTOS[row]) for row in picked.held_out]
    assert not set(controls) & set(given)
    types = {"folder": list, "torch": Subset}
    assert type(train) is types.get(kind, type(source))


def test_duplicates_are_watched_and_none_of_them_is_a_control(tmp_path):
    pictures = {f"{i:03d}.png": photo(i) for i in range(60)} | {f"copy{i}.png": photo(7) for i in range(5)}
    pictures |= {f"logo{i}.png": with_logo(photo(100 + i)) for i in range(6)}
    picked = memwatch.pick(save_folder(tmp_path / "train", pictures))
    (found,) = [p for p in picked.watched if p.why is Why.DUPLICATES]
    names = {picked.rows.name(row) for row in found.group.rows}
    assert names == {"007.png", *(f"copy{i}.png" for i in range(5))}
    held_out = {picked.rows.name(row) for row in picked.held_out}
    assert len(held_out) == 14
    assert not [name for name in held_out if name in names or name.startswith("logo")]
    for probe in picked.probes():
        assert probe.image == tmp_path / "train" / probe.name  # files stay files
        assert probe.image.is_file()


@pytest.mark.parametrize(("rows", "number"), [(54, 0), (55, 11)])
def test_eleven_controls_or_none(rows, number):
    """With ten, there was no audit, and the screen chose ten of ten controls."""
    picked = memwatch.pick(ROWS[:rows])
    assert len(picked.held_out) == len(picked.controls()) == number
    assert len(picked.train) == rows - number
    said = "nothing is held out, because a fifth of 54 readable rows is fewer than the 11 controls that judging takes"
    assert any(said in note for note in picked.notes) == (number == 0)


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_dreambooth_holds_out_one_sibling_and_class_images(kind, tmp_path):
    """A control is never trained on: neither the sibling nor one of the class images."""
    instance, classes = PHOTOS[:6], [photo(500 + i, 32) for i in range(50)]
    sources = instance, classes
    if kind == "folder":
        sources = tuple(
            save_folder(tmp_path / name, {f"{i:02d}.png": p for i, p in enumerate(pictures)})
            for name, pictures in (("instance", instance), ("class", classes))
        )
    prompts = {"prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    picked = memwatch.pick(sources[0], class_images=sources[1], **prompts)
    controls = picked.controls()
    assert (len(picked.held_out), len(picked.class_held_out), len(controls)) == (1, 19, 20)
    assert (len(picked.train), len(picked.class_train)) == (5, 31)
    assert [c.prompt for c in controls] == ["a photo of sks dog"] + ["a photo of a dog"] * 19
    assert {p.prompt for p in picked.probes()} == {"a photo of sks dog"}
    trained_on = {shown(row) for row in (*picked.train, *picked.class_train)}
    assert len(trained_on) == 5 + 31
    assert trained_on.isdisjoint(shown(control) for control in controls)
    assert numbers(picked) == numbers(memwatch.pick(sources[0], class_images=sources[1], **prompts))


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_unreadable_files_cost_only_themselves(tmp_path):
    folder = save_folder(tmp_path / "train", {f"{i:02d}.png": p for i, p in enumerate(PHOTOS)})
    (folder / "05.png").write_bytes(b"no picture")
    before = contents(folder)
    picked = memwatch.pick(folder)
    assert any("1 row unreadable, so not looked at: 05.png" in note for note in picked.notes)
    assert len(picked.held_out) == 11  # a fifth of 59
    assert 5 not in {*picked.held_out, *picked.peers, *picked.rotation, *(w.row for w in picked.watched)}
    assert {"image": folder / "05.png", "text": ""} in picked.train  # what becomes of it is the loop's business
    assert contents(folder) == before


def test_what_holds_no_image_is_one_clear_error(tmp_path):
    with pytest.raises(ProbeError, match="holds no image"):
        memwatch.pick(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ProbeError, match=r"none of the 1 images can be read"):
        memwatch.pick(tmp_path)
    with pytest.raises(ProbeError, match="several splits, give one of them: 'train'"):
        memwatch.pick(pytest.importorskip("datasets").DatasetDict(train=hugging_face(6)))
    with pytest.raises(ProbeError, match="IterableDataset cannot be read by row number"):
        memwatch.pick(hugging_face(6).to_iterable_dataset())
    with pytest.raises(ProbeError, match="image_column is 'picture', but its columns are: image, text, row"):
        memwatch.pick(ROWS, image_column="picture")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"probes": -1}, "'probes': got -1, allowed: 0 or greater"),
        ({"probes": 2.5}, "'probes': got 2.5, allowed: 0 or greater"),
        ({"probes": None}, "'probes': got None"),
        ({"controls": 10}, "'controls': got 10, allowed: 11 or greater, as judging takes, or 0 for none"),
        ({"controls": -1}, "'controls': got -1"),
        ({"controls": ["a.png"]}, r"'controls': got \['a.png'\]"),
        ({"seed": -1}, "'seed': got -1, allowed: 0 or greater"),
        ({"seed": "0"}, "'seed': got '0'"),
    ],
)
def test_a_wrong_number_is_named_with_what_is_allowed(wrong, said):
    with pytest.raises(ConfigError, match=said):
        memwatch.pick(ROWS, **wrong)


def test_none_may_be_asked_for():
    picked = memwatch.pick(ROWS, probes=0, controls=0)
    assert (picked.watched, picked.held_out, len(picked.train)) == ((), (), NUMBER)
    assert "no controls were asked for: alerts are uncalibrated" in " ".join(picked.notes)
