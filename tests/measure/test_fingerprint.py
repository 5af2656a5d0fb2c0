"""Fingerprints: what changes a measurement changes them, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memwatch import Probe
from memwatch.config_file import load_config
from memwatch.measure.measurement import SCREEN, UNCONDITIONAL, fingerprint, fingerprints
from memwatch.measure.prepare import PreparedProbe

IMAGE = np.zeros((16, 16, 3), np.uint8)
SHOWN = PreparedProbe(Probe("a cat", "cat.png", name="shown"), {}, IMAGE, None)
DRAWN = PreparedProbe(Probe("a cat", name="drawn"), {}, None, None)


@pytest.mark.parametrize(
    ("overrides", "shown", "drawn"),
    [
        ({"seed": 1}, True, False),
        ({"levels": {"timesteps": [61, 141]}}, True, False),
        ({"levels": {"draws": 8}}, True, False),
        ({"curvature": {"vectors": 8}}, True, False),
        ({"curvature": {"tile": 1}}, True, False),
        ({"weights": "ema"}, True, True),
        ({"precision": "loop"}, True, False),
        ({"curvature": {"batch_size": 2}}, False, False),
        ({"sampling": {"num_inference_steps": 25}}, False, False),
        ({"signals": {"smooth": 5, "unconditional": False}}, False, False),
        ({"alerts": {"max_p": 0.01}, "output_dir": "elsewhere", "every_steps": 7}, False, False),
    ],
)
def test_settings(overrides, shown, drawn):
    """Prompt probes are measured anew under earlier weights, so that only whose weights those are counts for them."""
    before, after = load_config(None), load_config(None, **overrides)
    assert (fingerprint(before, SHOWN) != fingerprint(after, SHOWN)) is shown
    assert (fingerprint(before, DRAWN) != fingerprint(after, DRAWN)) is drawn


def test_probes():
    config = load_config(None)
    pixel = IMAGE.copy()
    pixel[0, 0, 0] = 1
    others = [
        replace(SHOWN, probe=replace(SHOWN.probe, prompt="a dog")),
        replace(SHOWN, probe=replace(SHOWN.probe, seed=1)),
        replace(SHOWN, image=pixel),
        replace(SHOWN, image=IMAGE.reshape(8, 32, 3)),
        replace(DRAWN, probe=replace(DRAWN.probe, prompt="a dog")),
        DRAWN,
    ]
    assert len({fingerprint(config, p) for p in (SHOWN, *others)}) == 7
    assert fingerprint(config, replace(SHOWN, image=IMAGE.copy())) == fingerprint(config, SHOWN)


def test_what_is_measured_without_its_prompt_has_a_fingerprint_of_its_own():
    found = fingerprints(load_config(None), [SHOWN, DRAWN])
    ends = ("", UNCONDITIONAL, SCREEN, UNCONDITIONAL + SCREEN)
    assert set(found) == {name + end for name in ("shown", "drawn") for end in ends}
    assert len(set(found.values())) == 8


def test_the_screen_s_draws_belong_to_what_the_screen_measures_alone():
    one, two = (fingerprints(load_config({"levels": {"screen_draws": n}}), [SHOWN]) for n in (1, 2))
    assert [one[f"shown{end}"] == two[f"shown{end}"] for end in ("", UNCONDITIONAL, SCREEN)] == [True, True, False]
