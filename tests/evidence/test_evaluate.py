"""Overlap and detection against numbers computed by hand, and ``evaluate.py`` on folders as they come."""

import json

import numpy as np
import pytest
from evidence.evaluate import evaluate_sets, main, read_folders
from evidence.metrics import Overlap, best_of_thresholds, iou, normalized, overlap, tpr_at_fpr
from PIL import Image

LEFT = np.array([[1, 0], [1, 0]], dtype=bool)  # a template's mask
NOTHING = np.zeros((2, 2), dtype=bool)


def test_overlap_by_hand():
    top = np.array([[1, 1], [0, 0]], dtype=bool)
    assert overlap(np.stack([top, NOTHING]), np.stack([LEFT, NOTHING])) == Overlap(1 / 3, (1 / 3 + 1) / 2, 6 / 8)
    assert (iou(NOTHING, LEFT), iou(NOTHING, NOTHING)) == (0, 1)


def test_oracle_by_hand():
    # log1p gives 0, ln 2, ln 4, ln 8; over ln 8: 0, 1/3, 2/3, 1
    maps = np.array([[[7.0, 1.0], [3.0, 0.0]]])
    np.testing.assert_allclose(normalized(maps), [[[1, 1 / 3], [2 / 3, 0]]])
    assert best_of_thresholds(maps, LEFT[None]) == Overlap(1, 1, 1)
    wrong = np.array([[[1, 0], [0, 1]]], dtype=bool)  # one true pixel is the highest, the other the lowest
    # thresholds give {7}: IoU 1/2, accuracy 3/4; {7, 3}: 1/3, 1/2; {7, 3, 1}: 1/4, 1/4; all: 1/2, 1/2; none: 0, 1/2
    assert best_of_thresholds(maps, wrong) == Overlap(0.5, 0.5, 0.75)
    # each number at its own: a map of one bright true pixel beside 9 dim ones of which 3 are true, and a dim empty one
    maps, truth = np.stack([np.full((2, 5), 1.0), np.full((2, 5), 0.9)]), np.zeros((2, 2, 5), dtype=bool)
    maps[0, 0, 0], truth[0, 0, :4] = 3.0, True
    # {3}: pooled 1/4, mean (1/4 + 1) / 2, accuracy 17/20; map one: 4/10, (4/10 + 1) / 2; all: 4/20; none: 0, 1/2, 16/20
    assert best_of_thresholds(maps, truth) == Overlap(iou=0.4, miou=0.7, accuracy=0.85)


def test_min_max_is_over_the_whole_set():
    assert (normalized(np.array([[[1.0, 1.0]], [[3.0, 3.0]]])) == [[[0, 0]], [[1, 1]]]).all()
    assert (normalized(np.full((1, 2, 2), 5.0)) == 0).all()
    assert (normalized(np.array([[[-2.0, 0.0, 1.0]]])) == [[[0, 0, 1]]]).all()  # log1p of -2 would be NaN


def test_tpr_at_fpr_by_hand():
    negatives = np.arange(100)  # 1 % allows one false positive: any threshold above 98
    assert tpr_at_fpr([98, 98.5, 99, 200], negatives) == 0.75
    assert tpr_at_fpr([98, 98.5, 99, 200], negatives[:50]) == 1
    assert tpr_at_fpr([98, 99, 99.5, 200], negatives, 0.0) == 0.5
    assert tpr_at_fpr([5, 6], [5, 5]) == 0.5  # equal to a negative is not above it


@pytest.fixture
def folders(tmp_path):
    """A template, a verbatim copy at half the masks' size, and a prompt that stored nothing."""
    maps, masks = tmp_path / "maps", tmp_path / "masks"
    maps.mkdir(), masks.mkdir()
    template = np.zeros((8, 8))
    template[:, :4] = 1.0
    save_mask(masks / "template.png", template > 0)
    save_mask(masks / "copy.png", np.ones((8, 8)))
    np.save(maps / "template.npy", template)
    np.save(maps / "copy.npy", np.full((4, 4), 0.8, dtype=np.float32))
    np.save(maps / "nothing.npy", np.full((3, 5), 0.05, dtype=np.float16))
    return maps, masks


def save_mask(path, mask):
    Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * 255).save(path)


PERFECT = {"iou": 1.0, "miou": 1.0, "accuracy": 1.0}


@pytest.mark.parametrize(
    ("words", "threshold", "fixed"),
    [
        ([], None, PERFECT),  # 1.0 and 0.8 are above a third of themselves, 0.05 < log 1.1
        (["--threshold", "0.9"], 0.9, {"iou": 32 / 96, "miou": pytest.approx(2 / 3), "accuracy": 128 / 192}),
    ],
)
def test_eval_writes_the_numbers(folders, tmp_path, capsys, words, threshold, fixed):
    file = tmp_path / "deep" / "result.json"
    assert main([*map(str, folders), "--json", str(file), *words]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["threshold"], found["fixed"], found["oracle"]) == (threshold, fixed, PERFECT)
    assert found["auc"] == found["tpr_at_1_fpr"] == 1.0
    assert found["num_maps"] == {"template": 1, "verbatim": 1, "non_memorized": 1}
    assert found["template"]["fixed"] == found["template"]["oracle"] == PERFECT
    assert "templates, best of 101" in capsys.readouterr().out


def test_maps_are_brought_to_the_size_of_the_masks(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0.0, 1.0]]))  # four columns at 2x: 0, 0.25, 0.75, 1
    save_mask(tmp_path / "a.png", [[0, 0, 1, 1]])
    (sample,), problems = read_folders(tmp_path, tmp_path)
    assert problems == []
    found = evaluate_sets([sample], 0.3)
    assert (sample.values.tolist(), found["fixed"]["iou"]) == ([[0.0, 0.25, 0.75, 1.0]], 1)
    assert found["auc"] is None  # nothing non-memorized to compare with


def test_what_cannot_be_read_is_named_and_left_out(folders, tmp_path, capsys):
    maps, masks = folders
    np.save(maps / "nan.npy", np.full((2, 2), np.nan))
    np.save(maps / "cube.npy", np.zeros((2, 2, 2)))
    (maps / "cut.npy").write_bytes((maps / "copy.npy").read_bytes()[:20])
    np.save(maps / "unmasked.npy", np.ones((2, 2)))
    (masks / "unmasked.png").write_bytes(b"no picture")
    np.save(maps / "larger.npy", np.ones((2, 2)))
    save_mask(masks / "larger.png", np.ones((9, 8)))
    save_mask(masks / "lonely.png", np.ones((8, 8)))
    assert main([str(maps), str(masks), "--json", str(tmp_path / "r.json")]) == 1
    errors = capsys.readouterr().err
    assert "nan.npy: got float64 of shape (2, 2), allowed: finite numbers" in errors
    assert "cube.npy: got float64 of shape (2, 2, 2)" in errors
    assert "cut.npy: not a readable" in errors
    assert "unmasked.png: not a readable image" in errors
    assert "larger.png: got (h, w) (9, 8), the other masks have (8, 8)" in errors
    assert "lonely.png: there is no map lonely.npy" in errors
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert found["num_maps"] == {"template": 1, "verbatim": 1, "non_memorized": 1}  # the good ones are all still there
    assert found["oracle"]["iou"] == 1


def test_nothing_to_evaluate_is_one_line(folders, capsys):
    for maps, masks in ((folders[0] / "none", folders[1]), folders[::-1]):
        assert main([str(maps), str(masks)]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"no readable NAME.npy in {maps} has a NAME.png in {masks}")
        assert errors.count("\n") == 1
