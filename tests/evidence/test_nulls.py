"""Runs with nothing planted: what is called is compared with a twin, and the page counts runs."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import quickstart
import torch
from diffusers import UNet2DConditionModel
from evidence import nulls


@pytest.fixture(scope="module")
def unets() -> list[torch.nn.Module]:
    """The pretrained one, and one that knows less."""
    one, worse = (UNet2DConditionModel.from_pretrained(quickstart.TINY_SD, subfolder="unet") for _ in range(2))
    with torch.no_grad():
        for weight in worse.conv_out.parameters():
            weight.mul_(0.7)
    return [one, worse]


@pytest.mark.parametrize("other", [0, 1])
def test_the_twin_is_another_run_and_both_see_the_same_noise(other, unets, tmp_path, monkeypatch):
    items, validation = quickstart.photo_set(0, num_photos=3)
    trained = []

    def train(options: argparse.Namespace, items: list, validation: list, **watching: object) -> SimpleNamespace:
        trained.append((options.every_steps, items))
        return SimpleNamespace(unet=unets[other])

    monkeypatch.setattr(quickstart, "train", train)
    options = argparse.Namespace(every_steps=10, output_dir=tmp_path)
    found = nulls.confirmed(SimpleNamespace(unet=unets[0]), options, items, validation, {"row-1": 1})
    ((every_steps, (first, second, *_)),) = trained
    assert every_steps > nulls.STEPS  # the twin is not watched
    assert (first, second.caption, second in validation) == (items[0], items[1].caption, True)
    gap, chance, stored = found["row-1"].values()
    assert (gap > 0.1, chance > 0.1) == (other == 1, other == 1)  # it knows less of everything
    if other == 0:
        assert (gap, chance, stored) == (0, 0, False)


@pytest.mark.parametrize(("worse", "stored"), [(0, True), (1, False)])
def test_a_call_is_confirmed_where_the_twin_knows_less_of_it_than_of_what_neither_has_seen(
    worse, stored, tmp_path, monkeypatch
):
    """Of the photo that was called, or of one that neither has seen."""
    items, validation = quickstart.photo_set(0, num_photos=3)
    seen, twin = (SimpleNamespace() for _ in range(2))

    def losses(run: SimpleNamespace, pictures: list) -> np.ndarray:
        found = np.random.default_rng(0).uniform(0.9, 1.1, (len(pictures), 5, 4))
        found[worse] *= 1.5 if run is twin else 1.0
        return found

    monkeypatch.setattr(quickstart, "train", lambda *args, **watching: twin)
    monkeypatch.setattr(nulls, "losses", losses)
    options = argparse.Namespace(every_steps=10, output_dir=tmp_path)
    found = nulls.confirmed(seen, options, items, validation, {"row-1": 1})
    assert found["row-1"]["stored"] is stored


def test_the_page_counts_runs_and_names_what_was_called(tmp_path, capsys):
    said = {"commit": "abc", "events": 20, "probes": 18, "suspicious": ["row-1"], "largest T": 7.5}
    wrong, right = ({"row-1": {"gap": 0.1, "chance": 0.2, "stored": stored}} for stored in (False, True))
    for seed, called in enumerate(({}, wrong, right, {})):
        (tmp_path / f"null-{seed}.json").write_text(json.dumps(said | {"seed": seed, "called": called}))
    page = tmp_path / "results" / "nulls.md"
    assert nulls.main(["--runs", "4", "--seed", "0", "--output", str(tmp_path), "--results", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text + "\n"
    assert "| 4 | 20 | 18 | 2 | 0.500 [" in text
    assert "] | 1 | 0.250 [" in text
    assert "| 1 | row-1 | 0.100 | 0.200 | False |" in text
    assert nulls.main(["--runs", "1", "--seed", "0", "--output", str(tmp_path), "--results", str(page)]) == 0
    assert "Nothing was called." in page.read_text(encoding="utf-8")
