"""The settings as a page, of the dataclasses and docstrings of ``memwatch.config``; its own introduction says how."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import yaml

from memwatch.config import MemWatchConfig

INTRO = """\
# Settings

This page is generated: `python tests/support/config_table.py > configs/README.md`. It shows the docstrings of
[memwatch/config.py](../memwatch/config.py); change them there.

Settings come from a YAML file (`MemWatch(..., config="my.yaml")`), a nested dict, or a `MemWatchConfig`. Top-level keys
can also be arguments: `MemWatch(..., every_steps=250, stop={"enabled": False})`. A file needs only the keys that differ
from the defaults. An unknown key, a wrong type and a value that is not allowed are errors at construction; the message
names the key, the value and what is allowed.

| file | for |
|---|---|
| [default.yaml](default.yaml) | the defaults, every key spelled out |
| [lora.yaml](lora.yaml) | LoRA: the base model (adapters off) is the snapshot |
| [paper.yaml](paper.yaml) | prompt probes as Kim & Lee look at them; also `memwatch scan --preset paper` |
| [quickstart.yaml](quickstart.yaml) | what `train_examples/quickstart.py` uses |
"""


TURNED = (  # the settings that most people change, first on the page
    *("every_steps", "overhead", "max_train_steps", "output_dir", "probes", "controls", "resolution", "weights"),
    *("rollback", "strict", "levels.timesteps", "curvature.batch_size", "signals.baseline"),
    *("alerts.false_alarms_per_run", "alerts.webhook"),
    *("proof.enabled", "stop.enabled", "stop.num_probes", "stop.require_copy"),
)
HEAD = "| key | default | meaning |\n|---|---|---|"


def page() -> str:
    sections = {"": MemWatchConfig, **{f.name: f.default_factory for f in fields(MemWatchConfig) if _is_section(f)}}
    found = {name: rows(cls, f"{name}." if name else "") for name, cls in sections.items()}
    every = {key: row for of_section in found.values() for key, row in of_section.items()}
    parts = [INTRO, "## The settings that most people change", "", HEAD, *(every[key] for key in TURNED), ""]
    for name, cls in sections.items():
        if others := [row for key, row in found[name].items() if key not in TURNED]:
            title = f"## More: `{name}`" if name else "## More: top level"
            parts += [title, "", _markdown(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]), ""]
            parts += [HEAD, *others, ""]
    return "\n".join(parts)


def meanings_of(cls: type) -> dict[str, str]:
    """The ``Attributes:`` of a docstring, by name, their lines joined."""
    _, _, block = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    unindented = textwrap.dedent(block.partition("\n\n")[0])  # now only the first line of an entry starts at the left
    named = (entry.partition(": ") for entry in re.split(r"\n(?=\S)", unindented))
    return {name: " ".join(text.split()) for name, _, text in named}


def _is_section(item: Field[Any]) -> bool:
    return is_dataclass(item.default_factory)


def rows(cls: Any, prefix: str) -> dict[str, str]:
    """By key, a section's lines of the table. Every key has an entry in its docstring, and no other has."""
    own, meanings = [item for item in fields(cls) if not _is_section(item)], meanings_of(cls)
    assert list(meanings) == [item.name for item in own], cls.__name__
    shown = {f"{prefix}{item.name}": f"| `{_as_yaml(item)}` | {_markdown(meanings[item.name])} |" for item in own}
    return {key: f"| `{key}` {row}" for key, row in shown.items()}


def _as_yaml(item: Field[Any]) -> str:
    """The default as YAML holds it."""
    assert item.default is not MISSING
    value = list(item.default) if isinstance(item.default, tuple) else item.default
    return yaml.safe_dump([value], default_flow_style=True).strip()[1:-1]


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
