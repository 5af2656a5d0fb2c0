"""The page about the settings, and the files beside it."""

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from memwatch import config_table
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
SECTIONS = [item.default_factory for item in fields(MemWatchConfig) if is_dataclass(item.default_factory)]


def test_the_page_in_the_repository_is_what_is_generated():
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert page == config_table.page(), "run: python -m memwatch.config_table > configs/README.md"


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_field_has_an_entry(cls):
    assert list(config_table.entries(cls)) == [item.name for item in fields(cls)]
    assert all(config_table.entries(cls).values())


def test_every_key_is_on_the_page():
    page = config_table.page()
    for key, value in MemWatchConfig().to_dict().items():
        names = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
        assert all(page.count(f"\n| `{name}` |") == 1 for name in names), names


def test_an_entry_of_several_lines_is_joined():
    assert config_table.entries(Documented) == {"one": "first line, second line: third line.", "two": "short."}


@pytest.mark.parametrize("name", ["Missing", "Extra"])
def test_a_docstring_that_does_not_fit_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name}: documented are .*; its keys are "):
        config_table.rows(globals()[name], "")


def test_values_are_shown_as_yaml():
    assert config_table.rows(Documented, "some.") == {
        "some.one": "| `some.one` | `[1, 2]` | first line, second line: third line. |",
        "some.two": "| `some.two` | `null` | short. |",
    }


def test_the_default_file_spells_out_every_default():
    written = yaml.safe_load((CONFIGS / "default.yaml").read_text(encoding="utf-8"))
    defaults = MemWatchConfig().to_dict()
    defaults["levels"]["timesteps"] = list(defaults["levels"]["timesteps"])
    assert written == defaults
    assert load_config(CONFIGS / "default.yaml") == MemWatchConfig()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_loads_and_is_on_the_page(path):
    assert isinstance(load_config(path), MemWatchConfig)
    assert f"| [{path.name}]({path.name}) |" in config_table.INTRO


def test_the_paper_preset_compares_as_the_paper_does():
    signals = load_config(CONFIGS / "paper.yaml").signals
    assert (signals.terms, signals.against, signals.smooth) == ("variance", "snapshot", 1)


@dataclass
class Documented:
    """One sentence.

    Attributes:
        one: first line,
            second line: third
            line.
        two: short.

    Raises:
        ValueError: never.
    """

    one: tuple[int, ...] = (1, 2)
    two: str | None = None


@dataclass
class Missing:
    """One sentence.

    Attributes:
        one: documented.
    """

    one: int = 1
    two: int = 2


@dataclass
class Extra:
    """One sentence.

    Attributes:
        one: documented.
        two: not a key.
    """

    one: int = 1
