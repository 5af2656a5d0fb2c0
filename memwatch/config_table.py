"""The settings as a page for people: ``python -m memwatch.config_table > configs/README.md``.

The page is made of the dataclasses and docstrings of ``memwatch.config``, so it cannot say anything else than they do.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import yaml

from memwatch.config import MemWatchConfig

INTRO = """\
# Settings

This page is generated: `python -m memwatch.config_table > configs/README.md`. It shows the docstrings of
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


def page() -> str:
    """The whole page as markdown: the introduction, the top-level keys, and one table per section.

    Raises:
        ValueError: a key has no entry in the ``Attributes:`` of its docstring, or an entry has no key.
    """
    sections = {item.name: item.default_factory for item in fields(MemWatchConfig) if _is_section(item)}
    parts = [INTRO, *_section("Top level", MemWatchConfig, "")]
    for name, cls in sections.items():
        parts += _section(f"`{name}`", cls, f"{name}.")
    return "\n".join(parts)


def entries(cls: type) -> dict[str, str]:
    """The ``Attributes:`` of a docstring: the meaning by name, its lines joined."""
    _, _, block = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    unindented = textwrap.dedent(block.partition("\n\n")[0])  # now only the first line of an entry starts at the left
    named = (entry.partition(": ") for entry in re.split(r"\n(?=\S)", unindented))
    return {name: " ".join(text.split()) for name, _, text in named}


def _is_section(item: Field[Any]) -> bool:
    return is_dataclass(item.default_factory)


def _section(title: str, cls: Any, prefix: str) -> Iterator[str]:
    own = [item for item in fields(cls) if not _is_section(item)]
    meanings, names = entries(cls), [item.name for item in own]
    if list(meanings) != names:
        raise ValueError(f"{cls.__name__}: documented are {', '.join(meanings)}; its keys are {', '.join(names)}")
    summary, _, _ = inspect.cleandoc(cls.__doc__).partition("\n\n")
    yield f"## {title}\n\n{_markdown(summary)}\n\n| key | default | meaning |\n|---|---|---|"
    for item in own:
        yield f"| `{prefix}{item.name}` | `{_as_yaml(item)}` | {_markdown(meanings[item.name])} |"
    yield ""


def _as_yaml(item: Field[Any]) -> str:
    """The default as YAML holds it."""
    assert item.default is not MISSING
    value = list(item.default) if isinstance(item.default, tuple) else item.default
    return yaml.safe_dump([value], default_flow_style=True).strip()[1:-1]


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
