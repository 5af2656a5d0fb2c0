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
from memwatch.measure.prepare import named_as_controls, prepare


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


def test_controls_are_named_apart():
    given = [Probe("a photo of a cat", picture(0), name="cat"), Probe("a red poster", seed=3, name="poster")]
    found = named_as_controls(given)
    assert [p.name for p in found] == ["control/cat", "control/poster"]
    assert all(p.is_control for p in found)
    assert [(p.prompt, p.image, p.seed) for p in found] == [(p.prompt, p.image, p.seed) for p in given]
    assert not any(p.is_control for p in given)


def test_latents_that_are_not_finite_are_refused(pipeline):
    denoiser, parts = adapted(pipeline)
    parts.vae = copy.deepcopy(pipeline.vae)
    with torch.no_grad():
        parts.vae.quant_conv.weight.fill_(torch.nan)
    with pytest.raises(ProbeError, match=r"probe 'cat': the VAE gives latents that are not finite; pass it in float32"):
        prepare([Probe("a cat", picture(0), name="cat")], denoiser, parts, 16)


def test_a_prompt_without_room_is_said(pipeline, caplog):
    denoiser, parts = adapted(pipeline)
    with caplog.at_level(logging.WARNING, "memwatch"):
        prepare([Probe("a photo of a cat " * 20, name="long"), Probe("a cat", name="short")], denoiser, parts, 16)
    (message,) = caplog.messages
    assert "is longer than 32 tokens; cut: " in message
