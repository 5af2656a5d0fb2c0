"""Preparing: every prompt and image is encoded once, and what cannot be used is refused by name."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from support.builders import assert_same, picture
from support.families import adapted

from memwatch import Probe, ProbeError
from memwatch.measure.images import encode_images
from memwatch.measure.prepare import prepare


def test_probes_of_both_kinds(pipeline):
    denoiser, parts = adapted(pipeline)
    probes = [Probe("a photo of a cat", picture(0), name="cat"), Probe("a red poster", name="poster")]
    cat, poster = prepare(probes, denoiser, parts, 16)
    assert (cat.name, cat.probe, poster.name, poster.probe) == ("cat", probes[0], "poster", probes[1])
    assert np.array_equal(cat.image, np.asarray(picture(0)))
    assert_same(cat.latents, encode_images([cat.image], pipeline.vae)[0])
    assert (poster.image, poster.latents) == (None, None)
    for prepared in (cat, poster):
        assert_same(dict(prepared.conditioning), dict(denoiser.encode(prepared.probe.prompt, parts, 16)))


def test_latents_that_are_not_finite_are_refused(pipeline):
    denoiser, parts = adapted(pipeline)
    parts.vae = copy.deepcopy(pipeline.vae)
    with torch.no_grad():
        parts.vae.quant_conv.weight.fill_(torch.nan)
    with pytest.raises(ProbeError, match=r"probe 'cat': the VAE gives latents that are not finite; pass it in float32"):
        prepare([Probe("a cat", picture(0), name="cat")], denoiser, parts, 16)


def test_what_is_resized_is_said_in_one_line_by_one_process(families, caplog):
    denoiser, parts = adapted(families["sd1"])
    sizes = {"cat": (32, 16), "dog": (16, 16), "cow": (40, 40)}
    probes = [Probe("a photo", picture(0).resize(size), name=name) for name, size in sizes.items()]
    probes += [Probe("a prompt", name="poster"), Probe("a photo of a cat " * 20, picture(0), name="long")]
    with caplog.at_level(logging.WARNING, "memwatch"):
        prepare(probes, denoiser, parts, 16, says=False)
        assert caplog.messages == []
        prepare(probes, denoiser, parts, 16)
    cut, resized = caplog.messages
    assert "is longer than" in cut
    assert resized == "2 of 4 images are resized and cropped to 16 px, first that of 'cat', 32x16 px"
