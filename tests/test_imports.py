"""Imports point one way, folder by folder; heavy packages wait until they are needed; the public names are these."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import memwatch

PACKAGE = Path(memwatch.__file__).parent
LAYERS = [  # each knows itself and those before it
    {"config", "config_file", "config_table", "faults", "guard", "run_folder"},
    {"denoiser"},
    {"ranks"},
    {"measure"},
    {"picking"},
    {"judge"},
    {"pace"},
    {"report"},
    {"act"},
    {"resume"},
    {"callback"},
    {"scan", "integrations"},
    {"cli"},
    {"__init__", "__main__"},
]
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
HEAVY = {"wandb", "tensorboard", "tensorboardX", "diffusers", "transformers", "lightning"}
ADAPTERS = {  # their classes derive from the other side's
    "integrations/transformers.py": {"transformers"},
    "integrations/lightning.py": {"lightning"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The folder or module of the package that a file belongs to: ``report`` for ``report/files.py``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def named(node: ast.AST, path: Path) -> list[str]:
    """Dotted names of what an import statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = ["memwatch", *path.relative_to(PACKAGE).parts[:-1]]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names] if base == "memwatch" else [base]


def imports(path: Path) -> list[str]:
    """Every import of a file, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [name for node in ast.walk(tree) for name in named(node, path)]


def module_level_imports(path: Path) -> list[str]:
    """Those that run when the module is imported: functions are not looked into, classes, ``if`` and ``try`` are."""
    found, waiting = [], list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        found += named(node, path)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def wrong(path: Path) -> set[str]:
    """Parts of the package that a file imports although they come after its own, and the package itself."""
    ours = [name for name in imports(path) if name.split(".")[0] == "memwatch"]
    outwards = {name for name in ours if name == "memwatch" and part(path) != "__init__"}
    targets = {name.split(".")[1] for name in ours if name != "memwatch"}
    return outwards | {target for target in targets if LAYER.get(target, 99) > LAYER[part(path)]}


def test_every_part_has_a_layer():
    assert {part(path) for path in FILES} == set(LAYER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    assert wrong(path) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_heavy_packages_are_never_imported_at_module_level(path):
    allowed = ADAPTERS.get(path.relative_to(PACKAGE).as_posix(), set())
    assert {name.split(".")[0] for name in module_level_imports(path)} & HEAVY == allowed


def test_the_walk_sees_a_wrong_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    bad = tmp_path / "measure" / "curvature.py"
    bad.parent.mkdir()
    inside = "def f():\n    from ..judge.regions import Region\n    import diffusers\n    import memwatch\n"
    outside = "if True:\n    from memwatch import callback, config\n    from . import views\n    import wandb.sdk\n"
    bad.write_text(f"import torch\nfrom memwatch import MemWatch\n{inside}{outside}", encoding="utf-8")
    assert wrong(bad) == {"judge", "memwatch", "callback", "MemWatch"}
    assert {name.split(".")[0] for name in module_level_imports(bad)} & HEAVY == {"wandb"}


def test_public_names():
    assert memwatch.__all__ == sorted(memwatch.__all__)
    assert set(memwatch.__all__) == {
        "ConfigError",
        "Finding",
        "MemWatch",
        "MemWatchConfig",
        "Picked",
        "Probe",
        "ProbeError",
        "Region",
        "Report",
        "load_config",
        "pick",
    }
    for name in memwatch.__all__:
        assert getattr(memwatch, name).__doc__, name
        assert getattr(memwatch, name).__name__ == name
