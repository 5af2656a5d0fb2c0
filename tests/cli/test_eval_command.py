"""Overlap and detection against numbers computed by hand, and ``memwatch eval`` on folders as they come."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from memwatch.cli import COMMANDS, main
from memwatch.cli.metrics import (
    THRESHOLDS,
    Overlap,
    at_threshold,
    auc,
    best_of_thresholds,
    iou,
    normalized,
    overlap,
    tpr_at_fpr,
)

LEFT = np.array([[1, 0], [1, 0]], dtype=bool)  # a template's mask
NOTHING = np.zeros((2, 2), dtype=bool)


def test_iou_by_hand():
    predicted = np.array([[1, 1], [0, 0]], dtype=bool)
    assert iou(predicted, LEFT) == 1 / 3
    assert iou(LEFT, LEFT) == 1
    assert iou(NOTHING, LEFT) == 0
    assert iou(NOTHING, NOTHING) == 1


def test_pooled_and_mean_iou_differ():
    predicted = np.stack([np.array([[1, 1], [0, 0]], dtype=bool), NOTHING])
    truth = np.stack([LEFT, NOTHING])
    assert overlap(predicted, truth) == Overlap(iou=1 / 3, miou=(1 / 3 + 1) / 2, accuracy=6 / 8)


def test_fixed_threshold_is_in_the_maps_own_unit():
    maps = np.array([[[0.7, 0.69], [2.0, -3.0]]])
    assert at_threshold(maps, LEFT[None], math.log(2)) == Overlap(1, 1, 1)  # log 2 = 0.693
    twice, masks = np.stack([maps[0], maps[0]]), np.stack([LEFT, NOTHING])
    assert at_threshold(twice, masks, np.array([0.7, 3.0])) == Overlap(1, 1, 1)


def test_oracle_by_hand():
    # log1p gives 0, ln 2, ln 4, ln 8; over ln 8: 0, 1/3, 2/3, 1
    maps = np.array([[[7.0, 1.0], [3.0, 0.0]]])
    np.testing.assert_allclose(normalized(maps), [[[1, 1 / 3], [2 / 3, 0]]])
    assert best_of_thresholds(maps, LEFT[None]) == Overlap(1, 1, 1)
    wrong = np.array([[1, 0], [0, 1]], dtype=bool)  # one true pixel is the highest, the other the lowest
    # thresholds give {7}: IoU 1/2, accuracy 3/4; {7, 3}: 1/3, 1/2; {7, 3, 1}: 1/4, 1/4; all: 1/2, 1/2; none: 0, 1/2
    assert best_of_thresholds(maps, wrong[None]) == Overlap(0.5, 0.5, 0.75)


def test_each_number_has_its_own_best_threshold():
    # one map of one bright true pixel beside 9 dim ones of which 3 are true, one empty map that is dim all over
    maps = np.stack([np.full((2, 5), 1.0), np.full((2, 5), 0.9)])
    maps[0, 0, 0] = 3.0
    truth = np.zeros((2, 2, 5), dtype=bool)
    truth[0, 0, :4] = True
    # {3}: pooled 1/4, mean (1/4 + 1) / 2, accuracy 17/20; map one: pooled 4/10, mean (4/10 + 1) / 2; all: 4/20;
    # none: 0, mean 1/2, 16/20
    assert best_of_thresholds(maps, truth) == Overlap(iou=0.4, miou=0.7, accuracy=0.85)


def test_min_max_is_over_the_whole_set():
    values = normalized(np.stack([np.full((2, 2), 1.0), np.full((2, 2), 3.0)]))
    assert (values[0] == 0).all()
    assert (values[1] == 1).all()
    assert (normalized(np.full((1, 2, 2), 5.0)) == 0).all()
    assert (normalized(np.array([[[-2.0, 0.0, 1.0]]])) == [[[0, 0, 1]]]).all()  # log1p of -2 would be NaN


def test_thresholds_reach_from_all_to_nothing():
    assert len(THRESHOLDS) == 101
    assert THRESHOLDS[0] < 0
    assert THRESHOLDS[-1] > 1


def test_auc_by_hand():
    assert auc([3, 4], [1, 2]) == 1
    assert auc([1, 2], [3, 4]) == 0
    assert auc([1, 3], [2, 2]) == 0.5
    assert auc([2], [2, 1]) == 0.75  # a tie counts half
    with pytest.raises(ValueError, match="got 0 and 1"):
        auc([], [1])


def test_tpr_at_fpr_by_hand():
    negatives = np.arange(100)  # 1 % allows one false positive: any threshold above 98
    assert tpr_at_fpr([98, 98.5, 99, 200], negatives) == 0.75
    assert tpr_at_fpr([98, 98.5, 99, 200], negatives[:50]) == 1
    assert tpr_at_fpr([98, 99, 99.5, 200], negatives, 0.0) == 0.5
    assert tpr_at_fpr([5, 6], [5, 5]) == 0.5  # equal to a negative is not above it
    with pytest.raises(ValueError, match="in \\[0, 1\\)"):
        tpr_at_fpr([1], [0], 1.0)


# --- memwatch eval ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """A template at twice the map's size, a verbatim copy, and a prompt that stored nothing.

    All maps are constant where a mask is.
    """
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


def test_eval_writes_the_numbers(folders, tmp_path, capsys):
    file = tmp_path / "deep" / "result.json"
    assert main(["eval", str(folders[0]), str(folders[1]), "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    perfect = {"iou": 1.0, "miou": 1.0, "accuracy": 1.0}
    assert found["fixed"] == found["oracle"] == perfect  # 1.0 and 0.8 are above a third of themselves, 0.05 < log 1.1
    assert found["threshold"] is None
    assert found["auc"] == found["tpr_at_1_fpr"] == 1.0
    assert found["num_maps"] == {"template": 1, "verbatim": 1, "non_memorized": 1}
    assert found["template"]["oracle"] == perfect
    assert "templates, best of 101" in capsys.readouterr().out


def test_eval_at_a_given_threshold(folders, tmp_path):
    file = tmp_path / "result.json"
    assert main(["eval", str(folders[0]), str(folders[1]), "--json", str(file), "--threshold", "0.9"]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    missed_copy = {"iou": 32 / 96, "miou": pytest.approx(2 / 3), "accuracy": 128 / 192}
    assert found["fixed"] == missed_copy
    assert found["template"]["fixed"]["iou"] == 1


def test_eval_bilinear_to_the_masks_size(tmp_path):
    maps, masks = tmp_path / "maps", tmp_path / "masks"
    maps.mkdir(), masks.mkdir()
    np.save(maps / "a.npy", np.array([[0.0, 1.0]]))  # four columns at 2x: 0, 0.25, 0.75, 1
    save_mask(masks / "a.png", [[0, 0, 1, 1]])
    assert main(["eval", str(maps), str(masks), "--json", str(tmp_path / "r.json"), "--threshold", "0.3"]) == 0
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert found["fixed"]["iou"] == 1
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
    assert main(["eval", str(maps), str(masks), "--json", str(tmp_path / "r.json")]) == 1
    errors = capsys.readouterr().err
    for text in (
        "nan.npy: holds NaN or infinity",
        "cube.npy: expected floats of shape (h, w), got float64 of shape (2, 2, 2)",
        "cut.npy: not a readable",
        "unmasked.png: not a readable image",
        "larger.png: 8x9 px, the other masks have 8x8 px",
        "lonely.png: there is no map lonely.npy",
    ):
        assert text in errors, text
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert found["num_maps"] == {"template": 1, "verbatim": 1, "non_memorized": 1}  # the good ones are all still there
    assert found["oracle"]["iou"] == 1


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda maps, masks: ["eval", str(maps / "none"), str(masks)], "maps: .*none is no folder"),
        (lambda maps, masks: ["eval", str(maps), str(masks / "none")], "masks: .*none is no folder"),
        (lambda maps, masks: ["eval", str(masks), str(masks)], "no readable NAME.npy"),
        (lambda maps, masks: ["eval", str(maps), str(maps)], "no readable NAME.png"),
        (lambda maps, masks: ["eval", str(maps), str(masks), "--threshold", "nan"], "--threshold: got nan"),
    ],
)
def test_nothing_to_evaluate_is_one_line(folders, break_it, message, capsys):
    assert main(break_it(*folders)) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("memwatch eval: ")
    assert re.search(message, errors)


def test_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["scam"])
    assert stopped.value.code == 2
    assert "scan" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert (command or list(COMMANDS))[-1] in capsys.readouterr().out
