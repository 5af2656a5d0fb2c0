"""Images: cropped as training scripts crop, to latents and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.builders import picture

from memwatch import Probe, ProbeError
from memwatch.measure.images import cropped, decode_latents, decoded, encode_images, read_image, to_pixels


def pixels_of(seed: int, side: int = 16) -> np.ndarray:
    return np.asarray(picture(seed, side))


@pytest.mark.parametrize(
    ("size", "resized", "box"), [((64, 32), (32, 16), (8, 0, 24, 16)), ((32, 64), (16, 32), (0, 8, 16, 24))]
)
def test_the_short_side_is_resized_and_the_middle_cropped(size, resized, box):
    values = np.random.default_rng(0).integers(64, 192, (*size[::-1], 3), dtype=np.uint8)  # so that nothing is clipped
    wide = Image.fromarray(values)
    found = cropped(read_image(Probe("a cat", wide, name="cat")), 16)
    expected = wide.resize(resized, Image.Resampling.LANCZOS).crop(box)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    picture(0).save(tmp_path / "cat.png", exif=exif)
    found = cropped(read_image(Probe("a cat", tmp_path / "cat.png", name="cat")), 16)
    assert np.array_equal(found, np.rot90(pixels_of(0), -1))


def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ProbeError, match=r"big\.png': .*exceeds limit of 100 pixels"):
        read_image(Probe("a cat", tmp_path / "big.png", name="cat"))
    with pytest.raises(ProbeError, match=r"probe 'cat': cannot read image .*gone\.png"):
        read_image(Probe("a cat", tmp_path / "gone.png", name="cat"))
    for nonsense, what in ((5, "a int is no image"), (np.zeros((4, 4, 2)), r"numbers of shape \(4, 4, 2\)")):
        with pytest.raises(ProbeError, match=f"probe 'cat': cannot read image 'a (int|ndarray)': {what}"):
            read_image(Probe("a cat", nonsense, name="cat"))


LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([LEVELS, LEVELS[::-1], LEVELS.T], axis=-1)
UNIT = COLOURS / 255.0
SAME = {
    "uint8": COLOURS,
    "channels first": COLOURS.transpose(2, 0, 1),
    "uint16": COLOURS.astype(np.uint16) * 257,
    "big endian": (COLOURS.astype(np.uint16) * 257).astype(">u2"),
    "whole levels": COLOURS.astype(np.int64),
    "a list of floats": UNIT.tolist(),
    "unit floats": UNIT.astype(np.float32),
    "normalised": UNIT * 2 - 1,
    "levels as floats": COLOURS.astype(np.float32),
    "a tensor of levels": torch.from_numpy(COLOURS).float().permute(2, 0, 1),
    "a little over the end": np.where(UNIT == 1, 1.02, UNIT),
}


@pytest.mark.parametrize("kind", SAME)
def test_numbers_are_read_by_their_type_and_range(kind):
    assert np.array_equal(np.asarray(decoded(SAME[kind])), COLOURS)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F", "F unit", "1", "L", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode(mode, tmp_path):
    grey = np.stack([LEVELS] * 3, axis=-1)
    picture, expected, end = {
        "I;16": (Image.fromarray(LEVELS.astype(np.uint16) * 257), grey, "png"),
        "I;16B": (Image.fromarray((LEVELS.astype(np.uint16) * 257).astype(">u2")), grey, "tif"),
        "I": (Image.fromarray(LEVELS.astype(np.int32) * 257), grey, "tif"),
        "F": (Image.fromarray(LEVELS.astype(np.float32)), grey, "tif"),
        "F unit": (Image.fromarray(LEVELS.astype(np.float32) / 255), grey, "tif"),
        "1": (Image.fromarray(LEVELS > 127), np.where(grey > 127, 255, 0), "png"),
        "L": (Image.fromarray(LEVELS), grey, "png"),
        "P": (Image.fromarray(LEVELS).convert("P"), grey, "png"),
        "RGBA": (Image.fromarray(COLOURS).convert("RGBA"), COLOURS, "png"),
        "CMYK": (Image.fromarray(COLOURS).convert("CMYK"), COLOURS, "tif"),
    }[mode]
    assert picture.mode == mode.split()[0]
    file = tmp_path / f"picture.{end}"
    picture.save(file)
    for given in (str(file), file.read_bytes(), picture):
        assert np.array_equal(np.asarray(decoded(given)), expected)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (UNIT * 300, r"of type float64 from 0 to 300 are no image; allowed: .*floats in \[0, 1\]"),
        (UNIT * 8 - 4, "from -4 to 4"),
        (COLOURS.astype(np.int64) * 1000, "from 0 to 255000"),
        (UNIT * np.nan, "not finite"),
    ],
)
def test_numbers_that_no_rule_reads_are_an_error(values, says):
    with pytest.raises(ValueError, match=says):
        decoded(values)


@pytest.mark.parametrize(("name", "shift", "scale"), [("sd1", 0.0, 0.18215), ("sd3", 0.1, 0.5)])
def test_latents_are_the_scaled_mode_of_the_posterior_and_decoded_by_the_pipeline(name, shift, scale, families):
    pipe, images = families[name], [pixels_of(seed) for seed in range(3)]
    latents = encode_images(images, pipe.vae)
    with torch.no_grad():
        mode = pipe.vae.encode(to_pixels(images)).latent_dist.mode()
        pixels = pipe.vae.decode(latents[:1] / scale + shift).sample
    torch.testing.assert_close(latents, (mode - shift) * scale, rtol=1e-4, atol=1e-5)
    (expected,) = pipe.image_processor.postprocess(pixels, output_type="pil")
    found = decode_latents(latents[0], pipe.vae)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
