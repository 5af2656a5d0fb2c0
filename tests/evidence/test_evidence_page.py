"""The page: every table is there, README says what the tables say, and nothing else is believed."""

import json
from pathlib import Path

import pytest
from evidence.old.bars import EVERY_WORLD, answer, at_least, bar_table
from evidence.old.summary import BEGIN, END, bars_of, both, brief, rewrite, summary_of
from evidence.rivals.contest import localization_table
from evidence.verdicts.intervals import Estimate
from evidence.verdicts.tables import recall

from memwatch.cli import main


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    """What ``memwatch bench --report`` writes of two made-up runs."""
    results = tmp_path_factory.mktemp("results")
    assert main(["bench", "--output", str(runs), "--report", str(results)]) == 0
    return results


def test_the_page_has_every_table_and_says_how_it_was_made(folder, products):
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "Written by `memwatch bench --output" in page
    assert "{" not in page
    assert "| not measured |" in page  # no run with nothing planted
    tables = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    found = recall(products)
    assert tables["worlds"][-1]["recall"] == {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "count": found.count,
    }
    assert str(found) in page
    assert {"localization", "detection", "prompts", "stops", "agreement", "effort", "chosen"} <= tables.keys()
    assert (folder / "items.md").is_file()
    assert list(folder.glob("items-*.png"))


def test_bars_are_met_or_missed_by_what_was_measured(products):
    rows = {row["number"]: row for row in bar_table(products, localization_table(products))}
    assert rows["precision"]["met"] == "yes"
    assert rows["recall"]["met"] == answer(recall(products).value >= EVERY_WORLD)
    assert rows["runs with nothing planted that call"]["met"] == "not measured"
    assert "captions" in rows["IoU against every rival's oracle"]["measured"]
    assert at_least("x", 0.9, Estimate(0.89, 0.8, 0.95, 10))["met"] == "**no**"
    assert at_least("x", 0.9, Estimate(0.90, 0.8, 0.95, 10))["met"] == "yes"
    assert at_least("x", 0.9, Estimate(None))["met"] == "not measured"
    assert at_least("x", None, Estimate(0.1))["met"] == "reported"


def test_readme_gets_every_number_and_keeps_the_rest(folder, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    bars = bars_of(folder)
    assert rewrite(readme, bars)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n* **")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    said = " ".join(text.split())
    judged = [row for row in bars if row["met"] in ("yes", "**no**")]
    assert all(f"{row['number']} {brief(row['measured'])}" in said for row in judged)
    assert judged[0]["by patches"] == judged[0]["measured"]  # these runs copy by both rules
    assert both({"measured": "0.511 [0.4, 0.6]", "by patches": "0.824 [0.7, 0.9]; lowest 0 (a)"}) == "0.511 / 0.824"
    assert max(map(len, text.splitlines())) <= 120
    again = text
    assert rewrite(readme, bars)
    assert readme.read_text(encoding="utf-8") == again
    plain = tmp_path / "plain.md"
    plain.write_text("nothing to rewrite", encoding="utf-8")
    assert not rewrite(plain, bars)
    assert not rewrite(tmp_path / "missing.md", bars)


def test_readme_of_this_project_says_what_its_results_say():
    """Nobody typed these numbers: the block is what the command makes of the published tables."""
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text(encoding="utf-8")
    block = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert block == summary_of(bars_of(root / "train_examples" / "results"))
