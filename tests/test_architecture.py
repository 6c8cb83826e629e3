"""Each part of the package imports only the parts that it may, and no module imports itself by way of others."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import jacobiflow

ROOT = Path(jacobiflow.__file__).resolve().parent
FILES = sorted(ROOT.rglob("*.py"))

# Part, a top-level file or folder, to the parts that it may import.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "utils": set(),
    "native": set(),
    "jobs": set(),
    "blocks": set(),
    "models": {"blocks", "native"},
    "fixed_point": {"blocks"},
    "calibration": {"blocks", "fixed_point", "models", "jobs"},
    "planner": {"blocks", "calibration", "fixed_point", "models", "native"},
    "sampling": {"blocks", "data", "fixed_point", "models", "planner", "jobs"},
    "adapters": {"fixed_point", "native"},
    "comparison": {"blocks", "evaluation", "models", "sampling"},
    "data": set(),
    "evaluation": {"blocks", "data", "jobs", "models", "sampling"},
    "training": {"blocks", "data", "jobs", "models"},
    "plots": {"comparison", "data"},
}
EVERYWHERE = {"errors", "utils"}  # any part may import these
LEAVES = {"api", "cli", "plots"}  # only the command line imports these; it imports any part


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(name: str, text: str) -> set[str]:
    """Modules of the package that the source of a module imports, in functions too; "" is the package itself."""
    package = ["jacobiflow", *MODULES[name].relative_to(ROOT).parent.parts]
    modules: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            inner = {f"{module}.{alias.name}" for alias in node.names}
            modules |= {each for each in inner if each.removeprefix("jacobiflow.") in MODULES} or {module}
    own = {each for each in modules if each.split(".")[0] == "jacobiflow"}
    return {each.removeprefix("jacobiflow").removeprefix(".") for each in own} - {name}


GRAPH = {name: imports(name, path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def part_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_what_it_may(part: str) -> None:
    allowed = ALLOWED[part] | EVERYWHERE | {part}
    others = {name for module in MODULES if part_of(module) == part for name in GRAPH[module]}
    assert {name for name in others if part_of(name) not in allowed} == set()
    assert not LEAVES & ALLOWED[part]


def test_imports_are_statements() -> None:
    """So that the graph has all of them."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    assert not [name for name, text in texts.items() if "import_module" in text or "__import__" in text]


def test_every_part_has_its_rule() -> None:
    parts = {part_of(name) for name in MODULES} - {"", "__main__", "api"}
    assert parts == ALLOWED.keys() | {"cli"}


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert {"sampling.denoise", "models.flow"} <= GRAPH["sampling.request"], "imports are read"
    TopologicalSorter({name: imported - {""} for name, imported in GRAPH.items() if name}).prepare()


def test_every_new_tensor_names_its_device() -> None:
    """So that PyTorch's default device does not matter. Initial weights, whose device it is, name `None`."""
    constructors = {f"torch.{function.__name__}" for function in _device_constructors()}
    assert {"torch.empty", "torch.eye", "torch.as_tensor"} <= constructors
    for name, path in MODULES.items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        named = {call.func for call in calls if "device" in {keyword.arg for keyword in call.keywords}}
        uses = {node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) in constructors}
        assert [f"{name}:{use.lineno}" for use in uses - named] == []


@pytest.mark.slow
def test_no_module_needs_what_windows_lacks_when_it_is_imported() -> None:
    """Other packages are imported first: they ask for the platform."""
    program = f"""
import importlib, os, signal, sys
names = {["jacobiflow" + f".{name}" * bool(name) for name in MODULES if name != "__main__"]}
for name in names: importlib.import_module(name)
for name in names: del sys.modules[name]
sys.modules["fcntl"] = None
del signal.SIGUSR1, signal.SIGKILL, os.fork, os.getuid, os.sched_getaffinity, os.uname
for name in names: importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
