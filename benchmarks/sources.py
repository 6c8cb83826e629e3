"""The code that a benchmark measures, as a digest: it changes with the statements, not with comments and docstrings."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"jacobiflow": ROOT / "src/jacobiflow", "benchmarks": ROOT / "benchmarks", "examples": ROOT / "examples"}
# No timing and no error depends on these.
IGNORED = ("jacobiflow.api", "jacobiflow.cli", "jacobiflow.plots", "benchmarks.sources")


def find_commit() -> str:
    """The git commit, with "-dirty" if code that a benchmark may measure has changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", *map(str, FOLDERS.values()))
    return git("rev-parse", "HEAD") + "-dirty" * bool(changed)


@cache
def code_digest(module: str) -> str:
    """Digest of a benchmark and of all that it imports from the package, the native sources included.

    Args:
        module: Such as "benchmarks.masked_flows".
    """
    hashed = hashlib.sha256()
    for name in sorted(_closure(module)):
        hashed.update(ast.dump(_without_docstrings(_file(name))).encode())
    if any(name.startswith("jacobiflow.native") for name in _closure(module)):
        for path in sorted((FOLDERS["jacobiflow"] / "native/src").iterdir()):
            hashed.update(path.read_bytes())
    return hashed.hexdigest()[:12]


def _closure(module: str) -> set[str]:
    """Modules that a module imports, those of their imports, and so on."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name not in found and not name.startswith(IGNORED):
            found.add(name)
            waiting += _imports(name)
    return found


@cache
def _imports(module: str) -> list[str]:
    """Our modules that a module imports, in functions too. A public name `jf.NAME` is an import of its module."""
    tree = ast.parse(_file(module).read_text())
    names = [name for node in ast.walk(tree) for name in _imported(node)]
    public = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_package(node.value)}
    return [*filter(_is_module, names), *(_public_names()[name] for name in public & _public_names().keys())]


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_package(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("jf", "jacobiflow")


@cache
def _public_names() -> dict[str, str]:
    """The module of each public name."""
    tree = ast.parse(_file("jacobiflow.api").read_text())
    statements = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in statements for alias in node.names}


def _is_module(name: str) -> bool:
    return name.partition(".")[0] in FOLDERS and _file(name).is_file()


def _file(module: str) -> Path:
    package, *parts = module.split(".")
    path = FOLDERS[package].joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree
