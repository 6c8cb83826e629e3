"""Data flows one way: model, calibration, strategy, solver, samples, evaluation, plots, command line.

Read from the source, imports inside functions and those for type checkers included.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import jacobiflow

ROOT = Path(jacobiflow.__file__).resolve().parent
FILES = sorted(ROOT.rglob("*.py"))

# What each part must not import.
FORBIDDEN: dict[str, set[str]] = {
    "flows": {
        "calibration", "cli", "denoising", "evaluation", "guidance", "plots", "sampling", "solvers", "strategy",
        "training",
    },
    "solvers": {"calibration", "cli", "evaluation", "guidance", "plots", "sampling", "strategy", "training"},
    "guidance": {"calibration", "cli", "evaluation", "plots", "sampling", "solvers", "strategy", "training"},
    "denoising": {"calibration", "cli", "evaluation", "plots", "sampling", "solvers", "strategy", "training"},
    "calibration": {"cli", "evaluation", "plots", "sampling", "strategy", "training"},
    "latents": {
        "calibration", "cli", "denoising", "evaluation", "flows", "guidance", "plots", "sampling", "solvers",
        "strategy", "training",
    },
    "strategy": {"cli", "evaluation", "plots", "sampling", "training"},
    "sampling": {
        "benchmarking", "cli", "evaluation", "full_passes", "generation", "growing_cache", "peers", "plots", "training",
    },
    "peers": {"benchmarking", "cli", "evaluation", "generation", "plots", "sampling", "training"},
    "generation": {"cli", "evaluation", "peers", "plots", "training"},
    "full_passes": {
        "benchmarking", "calibration", "cli", "denoising", "evaluation", "plots", "sampling", "solvers", "strategy",
        "training",
    },
    "growing_cache": {
        "benchmarking", "calibration", "cli", "denoising", "evaluation", "plots", "sampling", "solvers", "strategy",
        "training",
    },
    "benchmarking": {"calibration", "cli", "evaluation", "plots", "training"},
    "data": {"calibration", "cli", "evaluation", "flows", "plots", "sampling", "solvers", "strategy", "training"},
    "training": {"calibration", "cli", "evaluation", "plots", "sampling", "solvers", "strategy"},
    "evaluation": {"cli", "plots"},
    "plots": {"cli"},
}  # fmt: skip

PARTS = set(FORBIDDEN) | {"cli", "files", "models"}


def part_of(module: str) -> str:
    """`jacobiflow.solvers.solve` belongs to `solvers`; the package itself, and what it names, to `__init__`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """Parts that a file imports."""
    package = ["jacobiflow", *path.relative_to(ROOT).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "jacobiflow":  # from jacobiflow import plots, TarFlow
                found |= {f"{module}.{alias.name}" if alias.name in PARTS else module for alias in node.names}
            else:
                found.add(module)
    return {part_of(name) for name in found if name.split(".")[0] == "jacobiflow"}


def part_of_file(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_go_one_way(path: Path) -> None:
    part, used = part_of_file(path), imports(path)
    assert not used & FORBIDDEN.get(part, set())
    if part not in ("cli", "__main__"):
        assert "cli" not in used
    if part not in ("cli", "plots"):
        assert "plots" not in used
    if part not in ("cli", "__main__", "plots"):
        # `import jacobiflow` would bring in everything.
        assert "__init__" not in used


def test_the_rule_reads_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can fail."""
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
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    assert imports(path) == {"plots", "strategy", "cli", "sampling", "calibration", "solvers", "__init__"}


def test_the_parts_that_the_rule_names_are_there() -> None:
    """A part that is renamed must not slip out of the rule."""
    parts = {part_of_file(path) for path in FILES} - {"__init__", "__main__"}
    assert parts <= PARTS
    assert {"calibration", "flows", "solvers", "strategy", "sampling", "guidance", "denoising"} <= parts
