"""Images: cropped as training scripts crop, to latents and back."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from support.builders import picture

from memwatch import Probe, ProbeError
from memwatch.measure.images import decode_latents, encode_images, read_image, to_pixels


def pixels_of(seed: int, side: int = 16) -> np.ndarray:
    return np.asarray(picture(seed, side))


def test_an_image_of_the_right_size_is_read_as_it_is(tmp_path, caplog):
    picture(0).save(tmp_path / "cat.png")
    for image in (picture(0), tmp_path / "cat.png", str(tmp_path / "cat.png")):
        assert np.array_equal(read_image(Probe("a cat", image, name="cat"), 16), pixels_of(0))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("size", "resized", "box"), [((64, 32), (32, 16), (8, 0, 24, 16)), ((32, 64), (16, 32), (0, 8, 16, 24))]
)
def test_the_short_side_is_resized_and_the_middle_cropped(size, resized, box, caplog):
    values = np.random.default_rng(0).integers(64, 192, (*size[::-1], 3), dtype=np.uint8)  # so that nothing is clipped
    wide = Image.fromarray(values)
    with caplog.at_level(logging.WARNING, "memwatch"):
        found = read_image(Probe("a cat", wide, name="cat"), 16)
    expected = wide.resize(resized, Image.Resampling.LANCZOS).crop(box)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
    message = f"probe 'cat': image of {size[0]}x{size[1]} px is resized and cropped to 16 px"
    assert caplog.messages == [message]


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    picture(0).save(tmp_path / "cat.png", exif=exif)
    found = read_image(Probe("a cat", tmp_path / "cat.png", name="cat"), 16)
    assert np.array_equal(found, np.rot90(pixels_of(0), -1))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ProbeError, match=r"probe 'cat': cannot read image .*gone\.png"):
        read_image(Probe("a cat", tmp_path / "gone.png", name="cat"), 16)


def test_to_pixels():
    image = np.zeros((2, 3, 3), np.uint8)
    image[1, 2] = (0, 51, 255)
    found = to_pixels([image, image])
    assert found.shape == (2, 3, 2, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, :, 1, 2], torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_latents_are_the_scaled_mode_of_the_posterior(name, families):
    vae = families[name].vae
    images = [pixels_of(seed) for seed in range(3)]
    found = encode_images(images, vae)
    assert found.shape == (3, 4, 8, 8)
    with torch.no_grad():
        mode = vae.encode(to_pixels(images)).latent_dist.mode()
    shift, scale = {"sd1": (0.0, 0.18215), "sd3": (0.1, 0.5)}[name]
    torch.testing.assert_close(found, (mode - shift) * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_encoding_a_batch_equals_encoding_one_by_one(name, families):
    images = [pixels_of(seed) for seed in range(3)]
    found = encode_images(images, families[name].vae)
    for i, image in enumerate(images):
        torch.testing.assert_close(found[i], encode_images([image], families[name].vae)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_decoding_is_the_pipelines_own(name, families):
    pipe = families[name]
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    shift, scale = {"sd1": (0.0, 0.18215), "sd3": (0.1, 0.5)}[name]
    with torch.no_grad():
        decoded = pipe.vae.decode(latents[None] / scale + shift).sample
    (expected,) = pipe.image_processor.postprocess(decoded, output_type="pil")
    found = decode_latents(latents, pipe.vae)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_without_a_vae_latents_are_pixels():
    image = pixels_of(0)
    latents = encode_images([image], None)
    assert torch.equal(latents, to_pixels([image]))
    assert np.array_equal(decode_latents(latents[0], None), image)
    assert decode_latents(3 * torch.ones(3, 4, 4), None).min() == 255  # clipped, not wrapped round
