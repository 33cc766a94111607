"""Imports between the folders of the package point down only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "selfsup_xbn"
COMMON = {"errors", "config", "utils"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "utils": {"errors"},
    "memory": COMMON,
    "losses": COMMON | {"memory"},
    "models": COMMON | {"memory"},
    "integrations": COMMON | {"memory", "losses"},
    "data": COMMON | {"models"},
    "methods": COMMON | {"memory", "losses", "models", "integrations"},
    "evaluation": COMMON | {"memory", "models", "data"},
    "runs": COMMON | {"models", "methods"},
    "training": COMMON | {"memory", "models", "methods", "data", "evaluation", "runs"},
    "report": COMMON | {"models", "data", "evaluation", "runs"},
    "commands": COMMON | {"memory", "models", "methods", "data", "evaluation", "runs", "training", "report"},
    "cli": COMMON | {"commands", "runs", "report", "__version__"},
    "__main__": {"cli"},
    "__init__": None,
}
"""For each folder the folders that it may import, itself aside; None: any."""


def imports(path):
    """The absolute names of all modules that a file imports, wherever in the file, TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [node.module] if node.module != "selfsup_xbn" else [f"selfsup_xbn.{a.name}" for a in node.names]
            yield from ((node.lineno, name) for name in names)


def folder_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def faults(paths):
    """``file:line: folder imports folder`` for each import that is not allowed."""
    for path in paths:
        allowed = ALLOWED[folder_of(path)]
        for line, name in imports(path):
            root, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if root == "experiments":
                yield f"{path}:{line}: the package imports {name}"
            elif root == "selfsup_xbn" and allowed is not None and other not in allowed | {folder_of(path)}:
                yield f"{path}:{line}: {folder_of(path)} imports {other}"


def test_imports_point_down_only():
    paths = sorted(PACKAGE.rglob("*.py"))
    assert {folder_of(path) for path in paths} == ALLOWED.keys()
    assert list(faults(paths)) == []


def test_the_rooms_have_no_cycle():
    floors, left = [], {folder: set(below or ()) for folder, below in ALLOWED.items()}
    while left:
        floor = {folder for folder, below in left.items() if not below & left.keys()}
        assert floor, f"a cycle among {sorted(left)}"
        floors.append(floor)
        left = {folder: below for folder, below in left.items() if folder not in floor}
    assert len(floors) > 5


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("memory", "from selfsup_xbn.losses import info_nce"),
        ("config", "import selfsup_xbn.memory.adaptation"),
        ("models", "def f():\n    from selfsup_xbn.runs.folder import read_config"),
        ("losses", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from selfsup_xbn import data"),
        ("report", "from selfsup_xbn.training.trainer import Run"),
        ("commands", "from experiments.runs import read"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "module.py").write_text(text)
    assert len(list(faults([tmp_path / folder / "module.py"]))) == 1
