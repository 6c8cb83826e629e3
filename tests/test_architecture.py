"""What each part of the package may import, and that no two modules import each other.

Read from the source, imports inside functions and those for type checkers included.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import jacobiflow

ROOT = Path(jacobiflow.__file__).resolve().parent
FILES = sorted(ROOT.rglob("*.py"))

# Part, a top-level file or folder, to the parts that it may import; "flows.base" is that module alone.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "checks": set(),
    "files": set(),
    "locking": {"files"},
    "codec": {"files"},
    "latents": set(),
    "measuring": {"progress"},
    "memory": {"flows"},
    "progress": set(),
    "adapters": {"native"},
    "native": {"files"},
    "data": {"files"},
    "flows": {"codec", "files", "native"},
    "solvers": {"codec", "flows.base"},
    "denoising": {"flows"},
    "inversion": {"flows"},
    "calibration": {"codec", "files", "flows", "inversion", "latents", "locking", "progress", "solvers"},
    "strategy": {
        "calibration", "codec", "files", "flows", "inversion", "latents", "measuring", "memory", "native",
        "progress", "solvers",
    },
    "sampling": {
        "denoising", "flows", "inversion", "latents", "progress", "solvers", "strategy",
    },
    "storage": {
        "calibration", "codec", "data", "denoising", "files", "flows", "latents", "locking", "measuring",
        "progress", "sampling", "solvers", "strategy",
    },
    "baselines": {"flows", "inversion", "sampling"},
    "comparison": {"baselines", "flows", "measuring", "progress", "sampling"},
    "evaluation": {"data", "files", "flows", "measuring"},
    "training": {"data", "files", "flows", "locking", "progress"},
    "plots": {"calibration", "comparison", "data", "files"},
}  # fmt: skip
EVERYWHERE = {"checks", "errors", "progress"}  # what any part may import
LEAVES = {"api", "cli", "plots"}  # which only the command line imports; it imports what it likes


def module_of(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """Modules of the package that a file imports, without the package's own name; "" is the package itself."""
    package = ["jacobiflow", *path.relative_to(root).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            inner = {f"{module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name.removeprefix("jacobiflow.") in MODULES}
            found |= modules or {module}
    names = {name.removeprefix("jacobiflow").removeprefix(".") for name in found if name.split(".")[0] == "jacobiflow"}
    return names - {module_of(path, root)}


def part_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_part_imports_what_it_may(path: Path) -> None:
    part = part_of(module_of(path))
    if part in ("", "__main__", "api", "cli", "models"):
        return
    allowed = ALLOWED[part] | EVERYWHERE
    others = {name for name in imports(path) if part_of(name) != part}
    assert {name for name in others if name not in allowed and part_of(name) not in allowed} == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imports(path) & MODULES.keys() for name, path in MODULES.items() if name}
    while True:  # take away what imports nothing that is left, and what nothing left imports
        used = {name for imported in graph.values() for name in imported}
        ends = {name for name, imported in graph.items() if name not in used or not imported & graph.keys()}
        if not ends:
            break
        graph = {name: imported for name, imported in graph.items() if name not in ends}
    assert sorted(graph) == []


def test_the_rules_are_of_the_parts_that_there_are() -> None:
    parts = {part_of(name) for name in MODULES} - {"", "__main__", "api", "models"}
    assert parts == ALLOWED.keys() | {"cli"}
    assert not any(LEAVES & allowed for allowed in ALLOWED.values())


def test_imports_of_every_form_are_read(tmp_path: Path) -> None:
    """The rules can fail."""
    (tmp_path / "solvers").mkdir()
    path = tmp_path / "solvers" / "solve.py"
    path.write_text(
        "import jacobiflow.plots\n"
        "from jacobiflow import strategy, TarFlow\n"
        "from jacobiflow.cli.app import main\n"
        "from .. import sampling\n"
        "from ..calibration.report import Report\n"
        "from . import guess\n"
        "def f():\n    import torch\n"
    )
    expected = {"plots", "strategy", "cli.app", "sampling", "calibration.report", "solvers.guess"}
    assert imports(path, tmp_path) == expected
