"""The proof by generation in a scan: as in training, from the checkpoint that is looked at."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.builders import CONFIG, history, without_time

from memwatch.measure.observer import Observer

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def generated(monkeypatch) -> list[np.ndarray]:
    """What is generated, call by call."""
    made, real = [], Observer.generate

    def keeping(self, caption, count):
        made.append(real(self, caption, count))
        return made[-1]

    monkeypatch.setattr(Observer, "generate", keeping)
    return made


@pytest.fixture
def settings(tmp_path):
    """A file of ``CONFIG`` with these changes."""

    def write(**changes) -> str:
        file = tmp_path / "eager.json"
        file.write_text(json.dumps(CONFIG | changes), encoding="utf-8")
        return str(file)

    return write


def test_an_alert_is_generated_once_in_a_history(scan, settings, generated, trained, pretrained, images, tmp_path):
    arguments = (trained, "--images", images, "--pretrained", pretrained)
    assert scan(*arguments, settings=settings())[0] == 0
    first, second, third = history(tmp_path)
    assert all(f["copied"] is None for row in (first, third) for f in row["findings"])
    assert len(generated) == 3  # as many captions
    assert [f["copied"]["generations"] for f in second["findings"]] == [len(made) for made in generated]
    again = list(generated)
    generated.clear()
    found = without_time(history(tmp_path))
    code, measured = scan(*arguments, settings=settings())
    assert (code, measured) == (0, [])  # nothing is measured, but the checkpoint is loaded to generate from
    assert without_time(history(tmp_path)) == found
    assert all(np.array_equal(a, b) for a, b in zip(again, generated, strict=True))


def test_generations_of_prompts_are_their_own_proof(scan, settings, generated, trained, pretrained, prompts, tmp_path):
    arguments = (trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    for _ in range(2):  # the second time they come from the disk
        assert scan(*arguments, settings=settings())[0] == 0
        (row,) = history(tmp_path)
        assert [f["copied"]["generations"] for f in row["findings"]] == [2, 2]
    assert generated == []
