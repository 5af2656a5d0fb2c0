"""Imports point one way: numbers <- domain <- report <- trackers <- callback and everything above."""

import ast
from pathlib import Path

import pytest

import memwatch

PACKAGE = Path(memwatch.__file__).parent
NUMBERS = {"config", "noise", "curvature", "regions", "heatmap", "evaluation"}
DOMAIN = {
    "denoiser",
    "probes",
    "snapshots",
    "checkpoints",
    "signals",
    "measure",
    "calibration",
    "alerts",
    "judging",
    "ranks",
}
RANK = {**dict.fromkeys(NUMBERS, 0), **dict.fromkeys(DOMAIN, 1), "report": 2, "trackers": 3}  # all others are above
ABOVE = 4
EXCEPTIONS = {("judging", "report")}
FOREIGN = {"wandb", "tensorboard", "tensorboardX", "diffusers", "transformers", "lightning"}
ADAPTERS = {
    "integrations/transformers.py": {"transformers"},
    "integrations/lightning.py": {"lightning"},
}  # classes derive from theirs
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path):
    """The top-level module a file belongs to: ``trackers`` for ``trackers/files.py``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def named(node, path):
    """Dotted names of what an import statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = ["memwatch", *path.relative_to(PACKAGE).parts[:-1]]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names] if base == "memwatch" else [base]


def imports(path):
    """Every import of a file, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in named(node, path)
    ]


def module_level_imports(path):
    """Those that run when the module is imported: functions are not looked into, classes, ``if`` and ``try`` are."""
    found, waiting = [], list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += named(node, path)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def violations(path):
    me = part(path)
    targets = {name.split(".")[1] for name in imports(path) if name.startswith("memwatch.")}
    return {
        other for other in targets if RANK.get(other, ABOVE) > RANK.get(me, ABOVE) and (me, other) not in EXCEPTIONS
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    assert violations(path) == set()
    if part(path) != "__init__":
        assert "memwatch" not in imports(path)  # the package's front door opens outwards only


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_never_imported_at_module_level(path):
    allowed = ADAPTERS.get(path.relative_to(PACKAGE).as_posix(), set())
    assert {name.split(".")[0] for name in module_level_imports(path)} & FOREIGN == allowed


def test_numbers_only_know_each_other():
    for name in NUMBERS:
        targets = {target.split(".")[1] for target in imports(PACKAGE / f"{name}.py") if target.startswith("memwatch.")}
        assert targets <= NUMBERS, name


def test_every_layered_module_exists():
    assert {part(path) for path in FILES} >= set(RANK)


def test_the_walk_sees_a_wrong_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    wrong = tmp_path / "curvature.py"
    inside = "def f():\n    from .probes import Probe\n    import diffusers\n"
    outside = "if True:\n    from memwatch import callback\n    import wandb.sdk\n"
    wrong.write_text(f"import torch\n{inside}{outside}")
    assert violations(wrong) == {"probes", "callback"}
    assert {name.split(".")[0] for name in module_level_imports(wrong)} & FOREIGN == {"wandb"}


def test_public_names():
    assert memwatch.__all__ == sorted(memwatch.__all__)
    assert set(memwatch.__all__) == {
        "ConfigError",
        "Finding",
        "MemWatch",
        "MemWatchConfig",
        "Probe",
        "ProbeError",
        "Region",
        "Report",
        "load_config",
    }
    for name in memwatch.__all__:
        assert getattr(memwatch, name).__doc__, name
        assert getattr(memwatch, name).__name__ == name
