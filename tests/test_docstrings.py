"""Every example in a docstring of the package runs and says what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import memwatch

PACKAGE = Path(memwatch.__file__).parent
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("name", [module_of(path) for path in WITH_EXAMPLES])
def test_examples_are_true(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] == "memwatch":
            raise
        pytest.skip(f"needs {missing.name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0, "its examples are in no docstring"
    assert result.failed == 0


def test_the_core_has_examples():
    names = {module_of(path) for path in WITH_EXAMPLES}
    core = {"measure.baselines", "measure.curvature", "measure.signals", "judge.calibration"}
    assert {f"memwatch.{name}" for name in core} <= names
