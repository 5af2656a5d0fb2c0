"""The page about the settings, and the files beside it."""

from pathlib import Path

import yaml
from support import config_table

from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config

CONFIGS = Path(__file__).parents[1] / "configs"


def test_the_page_in_the_repository_is_what_is_generated():
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert page == config_table.page(), "run: python tests/support/config_table.py > configs/README.md"
    for key, value in MemWatchConfig().to_dict().items():
        names = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
        assert all(page.count(f"\n| `{name}` |") == 1 for name in names), names


def test_the_default_file_spells_out_every_default():
    written = yaml.safe_load((CONFIGS / "default.yaml").read_text(encoding="utf-8"))
    defaults = MemWatchConfig().to_dict()
    defaults["levels"]["timesteps"] = list(defaults["levels"]["timesteps"])
    assert written == defaults


def test_every_file_is_on_the_page_and_the_paper_s_compares_as_the_paper_does():
    assert all(f"| [{path.name}]({path.name}) |" in config_table.INTRO for path in CONFIGS.glob("*.yaml"))
    signals = load_config(CONFIGS / "paper.yaml").signals
    assert (signals.terms, signals.against, signals.smooth) == ("variance", "snapshot", 1)
