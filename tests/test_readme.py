"""The README is short, its commands and snippets are right, and what it names exists."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from memwatch import MemWatch, MemWatchConfig, load_config
from memwatch.cli import COMMANDS
from memwatch.report import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", ".github/CONTRIBUTING.md", "configs/README.md"]
PAGES += [
    "train_examples/README.md",
    "train_examples/contrib/README.md",
    "train_examples/dashboards.md",
    "train_examples/inputs.md",
]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
DASHBOARDS = (ROOT / "train_examples" / "dashboards.md").read_text(encoding="utf-8")
THEIRS = {"metadata.jsonl", "flagged.jsonl", "train_network.py", "accelerator.load_state", "accelerator.prepare"}
OURS = {f"{k}.{n}" for k, section in MemWatchConfig().to_dict().items() if isinstance(section, dict) for n in section}


def spans_of(text):
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)))


SPANS = spans_of(README)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120
    for command in ('[examples]" && python train_examples/quickstart.py', '[test]" && python -m pytest'):
        # continuous integration greps for the first line with this extra, and runs it
        first = next(line for line in lines if command.partition(" && ")[0] in line)
        assert [line for line in lines if line.endswith(command)] == [first] == [f'pip install -e ".{command}']


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    relative = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in relative if not ((ROOT / page).parent / link).exists()] == []


def test_contributing_names_what_exists():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"`((?:memwatch|tests|configs)/[\w/]+\.\w+)`", text) if "NAME" not in path}
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []
    named = re.findall(r"`(?:\w+\.)?(\w+)`(?:, and the functions before it,)? (?:in|of) `([\w/]+\.py)`", text)
    assert len(named) >= 8
    for name, path in named:
        assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b", (ROOT / path).read_text("utf-8"), re.MULTILINE), name


def test_the_session_has_five_marked_lines_that_name_what_exists():
    (session,) = blocks("python")
    ast.parse(session)
    marked = [line for line in session.splitlines() if re.search(r"# [1-5]", line)]
    assert [re.search(r"# (\d)", line)[1] for line in marked] == list("12345")
    assert all(hasattr(MemWatch, name) for name in re.findall(r"\bwatch\.(\w+)", README))


def test_yaml_snippets_load():
    settings = [text for text in (*blocks("yaml"), *SPANS) if re.match(r"[a-z_]+: +\S", text)]
    assert set(settings) >= {"stop: {num_probes: 3}", "stop: {enabled: false}"}
    for text in settings:
        load_config(yaml.safe_load(text))


def test_named_keys_exist():
    dotted = {span for span in SPANS if re.fullmatch(r"[a-z_]+\.[a-z_]+", span)} - THEIRS
    dotted = {span for span in dotted if not span.startswith(("watch.", "memwatch."))}
    assert dotted >= {"alerts.false_alarms_per_run", "alerts.max_p"}
    assert dotted - OURS == set()
    logged = {n for n in SPANS | spans_of(DASHBOARDS) if n.startswith("memwatch/") and not n.endswith(".py")}
    assert "memwatch/heatmap/PROBE" in logged
    assert [key for key in logged if f"``{key.replace('.*', 'PROBE')}``" not in report.__doc__] == []


def test_numbers_beside_keys_are_the_defaults():
    """As in "`alerts.max_p` (0.01)"."""
    defaults = MemWatchConfig().to_dict()
    found = re.findall(r"`(\w+)\.(\w+)` \(([\d.]+)x?\)", README)
    assert found
    assert {key: float(value) for _, key, value in found} == {key: defaults[section][key] for section, key, _ in found}


def test_numbers_of_the_table_stand_on_their_pages():
    pages = dict(re.findall(r"^\[([\w ]+)\]: (\S+)$", README, re.MULTILINE))
    rows = re.findall(r"^\| .* \| (.*) \| \[([\w ]+)\] \|$", README, re.MULTILINE)
    assert len(rows) >= 8
    for said, page in rows:
        text = " ".join((ROOT / pages[page]).read_text(encoding="utf-8").split())
        missing = [number for number in re.findall(r"\d+ of \d+|\d+/\d+|\d+\.\d+", said) if number not in text]
        assert not missing, (said, page)


def test_commands_parse():
    lines = [line for text in blocks("bash") for line in text.splitlines() if line.startswith("memwatch ")]
    assert lines
    for line in lines:
        _, name, *arguments = shlex.split(line, comments=True)
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(COMMANDS[name][0]).arguments(parser)
        parser.parse_args(arguments)
