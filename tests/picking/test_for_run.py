"""What a run looks at; no control is among the rows that are trained on, and what cannot be seen is said."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from PIL import Image, ImageOps
from support.picked import chosen, hugging_face, photo, plain_rows, save_folder, shade, surveyed
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

import memwatch
from memwatch import ConfigError, Picked, Probe, ProbeError
from memwatch.act.actions import Actions
from memwatch.config import MemWatchConfig
from memwatch.faults import Faults
from memwatch.picking import for_run as module
from memwatch.picking.for_run import for_run, held_out_rows_in, row_shown
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import survey

NUMBER = 60
ROWS = [{"image": shade(i), "text": f"a photo of number {i}"} for i in range(NUMBER)]
PHOTOS = [photo(i, 32) for i in range(NUMBER)]


def picked_from(source) -> Picked:
    """12 of 60 rows are held out."""
    return chosen(surveyed(NUMBER), as_training_set(source))


def guard(dataset, picked: Picked) -> None:
    """What ``MemWatch.guard`` makes of a data set."""
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
    observer = SimpleNamespace(ranks=SimpleNamespace(accelerator=accelerator))
    actions = Actions(MemWatchConfig(rollback=False), observer, Faults(), picked, {}, None)
    actions.guard(SimpleNamespace(dataset=dataset, batch_size=2))


def names(picked: Picked, rows=None) -> list[str]:
    return [picked.rows.name(row) for row in (picked.held_out if rows is None else rows)]


class Holder(Dataset):
    """A data set as people write them: it holds rows, and makes tensors of them."""

    def __init__(self, rows, only=lambda row: True, attribute: str = "rows") -> None:
        setattr(self, attribute, rows)
        self._shown = [i for i in range(len(rows)) if only(i)]

    def __len__(self):
        return len(self._shown)

    def __getitem__(self, i):
        raise AssertionError("a row costs time and random numbers; it is the loop's to read")


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("a stream is the loop's to read")


@pytest.fixture
def columns():
    return hugging_face(image=[row["image"] for row in ROWS], text=[row["text"] for row in ROWS])


@pytest.fixture
def said(caplog):
    """What is logged by memwatch."""
    caplog.set_level(logging.WARNING, "memwatch")
    return caplog


@pytest.mark.parametrize("source", [list, tuple, lambda rows: Subset(rows, range(NUMBER)), Holder])
def test_picked_train_and_what_is_made_of_it_is_fine(source, said):
    rows = source(ROWS)
    picked = chosen(surveyed(NUMBER), plain_rows(NUMBER) if isinstance(rows, Holder) else as_training_set(rows))
    guard(picked.train, picked)
    guard(Subset(Subset(picked.train, [3, 1, 2]), [0]), picked)
    guard(Holder(picked.train, attribute="hf_dataset"), picked)
    guard(Subset(picked.rows.source, picked.train_rows), picked)
    assert said.messages == []


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_every_view_of_the_same_columns_is_known_without_a_picture_read(on_disk, columns, tmp_path, monkeypatch, said):
    monkeypatch.setattr(module, "as_training_set", None)  # whoever calls it fails
    if on_disk:
        columns.save_to_disk(tmp_path / "saved", num_shards=3)
        columns = pytest.importorskip("datasets").load_from_disk(tmp_path / "saved")
    picked = picked_from(columns)
    train = picked.train
    for dataset in (
        train.with_format("torch"),
        train.shuffle(seed=3).select(range(4)).with_transform(lambda rows: 1 / 0),
        train.remove_columns("text"),
        Subset(train.with_transform(lambda rows: 1 / 0), [0, 1]),
        columns.select(range(picked.held_out[0] + 1, picked.held_out[1])),
        columns.with_transform(lambda rows: 1 / 0).select(picked.train_rows),
    ):
        guard(dataset, picked)
    assert said.messages == []


def test_a_folder_is_trained_on_as_a_list(tmp_path, said):
    folder = save_folder(tmp_path / "train", {f"{i:02d}.png": shade(i) for i in range(NUMBER)})
    picked = picked_from(folder)
    for dataset in (picked.train, [dict(row) for row in picked.train], picked_from(folder).train):
        guard(dataset, picked)
    assert said.messages == []
    with pytest.raises(ConfigError, match="it gives 12 rows that are held out"):
        guard(as_training_set(folder).some(range(NUMBER)), picked)


@pytest.mark.parametrize("source", [list, tuple, lambda rows: Subset(rows, range(NUMBER))])
def test_held_out_rows_are_refused_and_named(source):
    rows = source(ROWS)
    picked = picked_from(rows)
    said = rf"^dataloader: it gives 12 rows .* \({names(picked)[0]}.*; make it from pick"
    with pytest.raises(ConfigError, match=said):
        guard(rows, picked)
    first, second = picked.held_out[:2]
    for dataset in (
        Subset(rows, [second, *picked.train_rows[:5], first]),
        Subset(Subset(rows, [first, second]), [1, 0]),
    ):
        assert held_out_rows_in(dataset, picked) == (names(picked, [first, second]), True)


def test_columns_that_were_not_filtered_are_refused(columns, monkeypatch):
    monkeypatch.setattr(module, "as_training_set", None)
    backwards = columns.select(range(NUMBER - 1, -1, -1))  # counts in its own numbers
    for source in (columns, backwards):
        picked = picked_from(source)
        for dataset in (columns.with_transform(lambda rows: 1 / 0), columns.shuffle(seed=0)):
            assert held_out_rows_in(dataset, picked) == (names(picked), True)
        first = picked.held_out[0]
        some = source.select([first, *picked.train_rows[:3]])
        assert held_out_rows_in(some, picked) == (names(picked, [first]), True)
    assert held_out_rows_in(columns.select([NUMBER - 1 - row for row in picked.train_rows]), picked) == ([], True)


def test_rows_of_the_same_content_are_found_by_hash(columns):
    again = [{"image": row["image"].copy(), "text": "another caption"} for row in ROWS]
    picked = picked_from(ROWS)
    assert held_out_rows_in(again, picked) == (names(picked), True)
    assert held_out_rows_in([again[row] for row in picked.train_rows], picked) == ([], True)
    again = type(columns).from_dict(columns.to_dict()).cast_column("image", columns.features["image"])
    picked = picked_from(columns)
    assert held_out_rows_in(again, picked) == (names(picked), True)
    assert held_out_rows_in(again.select(picked.train_rows), picked) == ([], True)


def test_class_images_that_are_held_out_are_found():
    images = [shade(100 + i) for i in range(50)]
    picked = chosen(surveyed(6), plain_rows(6), class_images=as_training_set(images))
    with pytest.raises(ConfigError, match="it gives 19 rows that are held out as controls .*class-row-"):
        guard(images, picked)
    guard(picked.class_train, picked)


@pytest.mark.parametrize(
    "dataset",
    [
        Holder(ROWS),
        Holder(ROWS, only=lambda row: row % 2 == 0),  # a filter over all rows is no view of them
        Stream(),
        None,
        [{"pixel_values": 1}],
        ["a prompt"],
    ],
    ids=["rows", "filtered", "stream", "none", "tensors", "prompts"],
)
def test_what_cannot_be_seen_is_said_once(dataset, said):
    guard(dataset, chosen(surveyed(NUMBER), plain_rows(NUMBER), controls=0))  # nothing is held out
    assert said.messages == []
    guard(dataset, picked_from(ROWS))
    kind = type(dataset).__name__
    assert said.messages == [
        f"memwatch cannot see which rows a {kind} gives; make sure that it was made from picked.train, so that none of "
        "the 12 controls is trained on"
    ]


def test_no_more_than_so_many_rows_are_hashed_and_the_rest_is_said(monkeypatch, said):
    monkeypatch.setattr(module, "COMPARED", 10)
    picked = picked_from(ROWS)
    guard([dict(ROWS[row]) for row in picked.train_rows], picked)
    assert "cannot see which rows a list gives" in said.text


@pytest.fixture(scope="module")
def real() -> Picked:
    return memwatch.pick([(p, f"number {i}") for i, p in enumerate(PHOTOS)], probes=4)


def test_given_controls_that_show_training_rows_are_refused_and_both_are_named(real):
    row = real.train_rows[4]
    shown = PHOTOS[row].resize((80, 80), Image.Resampling.LANCZOS)
    given = [Probe("new", photo(1000), name="new"), Probe("shown", shown, name="shown"), Probe("a prompt", name="text")]
    said = rf"^controls: 1 of 3 controls given show rows that are trained on: shown \(row-{row:05d}\); give pictures "
    with pytest.raises(ProbeError, match=said + "that are held out from training$"):
        for_run(real, MemWatchConfig(), None, given, has_rotation=False)


def test_pictures_are_known_again_in_any_size_and_mirrored(monkeypatch):
    rows = as_training_set([*(photo(i) for i in range(8)), photo(3), {}])
    picked = Picked(rows, survey(rows))
    given = [photo(20), photo(3).resize((50, 50)), ImageOps.mirror(photo(5)), Image.new("RGB", (64, 64)), photo(0)]
    assert [row_shown(picture, picked) for picture in given] == [None, 3, 5, None, 0]
    monkeypatch.setattr(module, "CANDIDATES", 0)  # no more rows are read
    assert row_shown(photo(0), picked) is None


def test_given_controls_that_are_held_out_or_new_are_fine(real, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")  # whoever encodes it says so
    held_out = PHOTOS[real.held_out[0]]
    given = [Probe("", held_out, name="held"), Probe("", photo(1000, 32), name="new"), Probe("", broken, name="broken")]
    run = for_run(real, MemWatchConfig(), None, given, has_rotation=False)
    assert [c.name for c in run.controls[-3:]] == ["held", "new", "broken"]
    assert len(run.control_keys) == len(run.controls) == 15
    assert len(run.probes) == 4


def test_a_run_looks_at_what_was_picked_and_what_is_given_besides(real):
    config = memwatch.load_config({"probes": ["a prompt"], "rotation": {"rows": 5}})
    run = for_run(real, config, None, None, has_rotation=True)
    assert [p.name for p in run.probes[:4]] == [p.name for p in real.probes()]
    assert [p.prompt for p in run.probes[4:5]] == ["a prompt"]
    assert [p.row for p in run.probes[5:]] == list(real.rotation[:5])
    assert len(run.controls) == 12
    assert run.control_keys == real.control_keys


@pytest.mark.parametrize("wrong", [ROWS, 16, DataLoader(ROWS)], ids=["rows", "number", "dataloader"])
def test_anything_else_is_refused_with_what_is_allowed(wrong):
    """A whole data set is not written out."""
    said = r"'picked': got <class '.{,50}'>, allowed: what memwatch.pick\(dataset\) returns, or a folder"
    with pytest.raises(ConfigError, match=said):
        for_run(wrong, MemWatchConfig(), None, None, has_rotation=False)
