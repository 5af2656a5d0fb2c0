"""The package as a whole: imports point one way, heavy packages wait, docstrings are true, and what is public."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import memwatch

PACKAGE = Path(memwatch.__file__).parent
LAYERS = [  # each may import itself and those before it
    {"config", "config_file", "faults", "guard", "messages", "run_folder"},
    {"denoiser"},
    {"ranks"},
    {"measure"},
    {"picking"},
    {"judge"},
    {"proof"},
    {"pace"},
    {"report"},
    {"act"},
    {"resume"},
    {"event"},
    {"callback"},
    {"scan", "integrations"},
    {"cli"},
    {"__init__", "__main__"},
]
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
HEAVY = {"wandb", "tensorboard", "tensorboardX", "diffusers", "transformers", "lightning"}


def named(node: ast.AST) -> list[str]:
    """Dotted names of what an import statement imports; the package imports nothing relatively."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, ast.unparse(node)
    return [f"memwatch.{alias.name}" for alias in node.names] if node.module == "memwatch" else [node.module or ""]


def at_module_level(tree: ast.Module) -> list[str]:
    """What is imported when the module is: functions are not looked into, classes, ``if`` and ``try`` are."""
    found, waiting = [], list(tree.body)
    while waiting:
        node = waiting.pop()
        found += named(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def wrong(part: str, code: str, own: str = "") -> set[str]:
    """What a file of this part of the package may not import; it is the adapter of its ``own`` heavy package."""
    tree = ast.parse(code)
    every = [name.split(".") for node in ast.walk(tree) for name in named(node)]
    later = {n[1] for n in every if n[0] == "memwatch" and n[1:] and LAYER.get(n[1], 99) > LAYER[part]}
    whole = {"memwatch" for n in every if n == ["memwatch"] and part != "__init__"}
    return later | whole | ({name.split(".")[0] for name in at_module_level(tree)} & (HEAVY - {own}))


def test_imports_point_one_way_and_heavy_ones_wait():
    for file, code in FILES.items():
        folder, _, name = file.removesuffix(".py").rpartition("/")
        own = name if folder == "integrations" else ""  # its class derives from the other side's
        assert wrong((folder or name).split("/")[0], code, own) == set(), file


def test_the_walk_sees_a_wrong_import():
    inside = "def f():\n    from memwatch.judge.verdict import Verdict\n    import diffusers\n    import memwatch\n"
    outside = "if True:\n    from memwatch import callback, config\n    import wandb.sdk\n"
    assert wrong("measure", f"import torch\nfrom memwatch import MemWatch\n{inside}{outside}") == {
        *("judge", "memwatch", "callback", "MemWatch", "wandb")
    }


def test_public_names():
    names = "ConfigError Finding MemWatch MemWatchConfig Picked Probe ProbeError Region Report load_config pick"
    assert memwatch.__all__ == names.split()
    for name in memwatch.__all__:
        assert getattr(memwatch, name).__doc__, name
        assert getattr(memwatch, name).__name__ == name


@pytest.mark.parametrize("file", [file for file, code in FILES.items() if ">>> " in code])
def test_examples_in_docstrings_are_true(file):
    module = importlib.import_module(f"memwatch.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"))
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0, "its examples are in no docstring"
    assert result.failed == 0
