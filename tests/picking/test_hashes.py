"""Hashes: the perceptual hash against a second implementation, and a pass over all rows."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image, ImageOps
from support.picked import photo, save_folder

from memwatch.measure.images import decoded
from memwatch.picking import hashes as module
from memwatch.picking.hashes import CELLS, SIDE, hash_of, hash_rows, square
from memwatch.picking.rows import as_training_set


def by_hand(picture: Image.Image) -> np.ndarray:
    """The 64 bits: which of the 64 lowest frequencies of the 32 px grey picture lie above their median."""
    grey = np.asarray(square(picture, SIDE).convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    lowest = scipy.fft.dctn(grey, type=2)[:8, :8]
    return np.packbits((lowest > np.median(lowest)).ravel())


def test_the_hash_is_that_of_a_second_implementation():
    for seed in range(12):
        picture = photo(seed, side=96)
        whole, mirrored, _ = hash_of(picture)
        assert np.array_equal(whole, by_hand(picture))
        assert np.array_equal(mirrored, by_hand(ImageOps.mirror(picture)))


def test_the_thumbnail_is_the_middle_square():
    checks = np.kron(np.indices((CELLS, CELLS)).sum(0) % 2, np.ones((4, 4)))[..., None] * np.ones(3) * 200
    middle = Image.fromarray(checks.astype(np.uint8))
    wide = Image.new("RGB", (3 * SIDE, SIDE), (255, 0, 0))
    wide.paste(middle, (SIDE, 0))
    for picture in (middle, wide):
        assert np.array_equal(hash_of(picture)[2], checks[::4, ::4])


def test_a_jpeg_that_is_decoded_smaller_gives_the_same_hash(tmp_path):
    photo(3, side=1024).save(tmp_path / "a.jpg", quality=90)
    small = decoded(tmp_path / "a.jpg", 2 * SIDE)
    assert small.size == (256, 256)
    a, b = hash_of(small), hash_of(decoded(tmp_path / "a.jpg"))
    assert np.unpackbits(a[0] ^ b[0]).sum() <= 2
    assert np.abs(a[2].astype(int) - b[2]).mean() < 1


@pytest.mark.parametrize("batch", [2, 256])
def test_a_pass_over_all_rows_is_each_row_s_hash_and_failures_cost_only_themselves(tmp_path, batch, monkeypatch):
    monkeypatch.setattr(module, "BATCH", batch)
    folder = save_folder(tmp_path / "train", {f"{i}.png": photo(i) for i in range(2)})
    (folder / "broken.png").write_bytes(b"no picture")
    array = np.asarray(photo(3)).copy()
    images = [folder / "0.png", str(folder / "1.png"), photo(2), array, torch.from_numpy(array)]
    broken = {folder / "broken.png": "broken.png", "/nowhere/c.png": "/nowhere/c.png"}
    found = hash_rows(as_training_set([(image, "") for image in [*images, *broken, {}, np.full((4, 4, 3), np.nan)]]))
    assert found.readable.tolist() == list(range(5))
    for row, of_row in enumerate(zip(found.whole, found.mirrored, found.thumbnails, strict=True)):
        for value, expected in zip(of_row, hash_of(photo(min(row, 3))), strict=True):
            assert np.array_equal(value, expected if row < 5 else np.zeros_like(expected))
    expected = [*broken.values(), "a dict is no image", "not finite"]
    for (row, why), said in zip(found.unreadable.items(), expected, strict=True):
        assert why.startswith(f"row {row}")
        assert said in why
