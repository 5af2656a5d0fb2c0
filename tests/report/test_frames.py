"""Frames: a map is its own few pixels in colours that mean the same; each picture is there once; news goes first."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image
from support.runs import memorized, save_image, save_map, write_run

from memwatch.report.drawing import MAX_FACTOR, colours
from memwatch.report.frames import IMAGE_SIDE, LEVELS, NOTHING, by_priority, frames_of, map_uri, opened, picture_uri
from memwatch.report.history import Run


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_a_map_is_kept_pixel_by_pixel():
    values = np.log(np.linspace(0.5, 8, 64)).reshape(8, 8)
    picture = decoded(map_uri(values))
    share = np.clip(values / math.log(MAX_FACTOR), 0, 1)
    assert picture.mode == "P"
    assert np.array_equal(np.asarray(picture), (share * (LEVELS - 1)).round())
    shown = np.asarray(picture.convert("RGBA"))
    scale = np.linspace(0, 1, LEVELS)
    assert shown[0, 0, 3] == 0  # 1x and less is transparent
    assert shown[-1, -1].tolist() == [*colours(scale[None])[0, -1].tolist(), round(0.85 * 255)]


def test_a_map_that_shows_nothing_is_no_picture():
    for value in (-1.0, math.nan, 0.02):  # 1.02x: less than the first colour
        assert map_uri(np.full((8, 8), value)) is None


def test_a_large_map_is_the_mean_of_its_blocks():
    values = np.zeros((128, 128))
    values[:2, :2] = math.log(MAX_FACTOR)
    values[0, 2], values[0, 3] = 2 * math.log(MAX_FACTOR), 0.0
    index = np.asarray(decoded(map_uri(values)))
    assert index.shape == (64, 64)
    assert index[0, :3].tolist() == [LEVELS - 1, round((LEVELS - 1) / 2), 0]


def test_pictures_are_made_small_and_small_ones_stay_as_they_are(tmp_path):
    large, small = (save_image(tmp_path, f"{side}.png", side=side) for side in (512, 64))
    assert decoded(picture_uri(large, IMAGE_SIDE)).size == (IMAGE_SIDE, IMAGE_SIDE)
    assert np.array_equal(decoded(picture_uri(small, IMAGE_SIDE)), small)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert picture_uri(opened(tmp_path / "broken.png"), IMAGE_SIDE) is None


def test_the_last_the_first_and_those_with_news_go_first(tmp_path):
    rows = {"cat": memorized(alert=True)}
    events = [{"step": s, "rows": rows if s == 3 else {}, "stop_reason": "x" if s >= 6 else None} for s in range(9)]
    run = Run.read(write_run(tmp_path, [{"name": "cat"}], events))
    order = [event.step for event in by_priority(run.events)]
    assert order[:4] == [8, 0, 6, 3]  # the stop was decided at 6
    assert sorted(order) == list(range(9))


def test_gaps_are_gaps(tmp_path):
    """A file that is gone costs its own picture; a lost event is no stop of the slider."""
    events = [{"step": 0}, {"step": 1, "failure": "out of memory"}, {"step": 2}]
    run = Run.read(write_run(tmp_path, [{"name": "cat"}, {"name": "dog"}], events))
    save_image(tmp_path, "images", "cat.png", side=32)
    save_map(tmp_path, 2, {"cat": np.ones((4, 4))})
    frames = frames_of(run)
    assert (frames.steps, frames.side) == ([0, 2], 32)
    assert frames.images == {"cat": [0, 0], "dog": [NOTHING, NOTHING]}
    assert frames.maps == {"cat": [NOTHING, 1], "dog": [NOTHING, NOTHING]}
    assert len(frames.pool) == 2


def test_the_newest_proof_of_a_probe_is_shown(tmp_path):
    proof = {"generations": 3, "copies": 1, "ratios": [0.1] * 3, "is_copy": [True] * 3, "of_others": {}}
    events = [{"step": step, "rows": {"cat": memorized(copied=proof)} if step < 3 else {}} for step in (1, 2, 3)]
    run = Run.read(write_run(tmp_path, [{"name": "cat"}], events))
    for step in (1, 2):
        save_image(tmp_path, "generations", "cat", f"step_{step:07d}.jpg", side=32, count=3, seed=step)
    newer = Image.open(tmp_path / "generations" / "cat" / "step_0000002.jpg")
    frames = frames_of(run)
    step, indices = frames.generations["cat"]
    assert step == 2
    assert np.array_equal(np.concatenate([decoded(list(frames.pool)[i]) for i in indices], 1), newer)
