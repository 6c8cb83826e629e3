"""The modules of this repository that a benchmark runs, by the import statements of their sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_FOLDERS = {"jacobiflow": "src", "benchmarks": ".", "examples": "."}
_PACKAGE, _PUBLIC = "jacobiflow", "jacobiflow.api"


def imported_files(module: str, root: Path) -> set[Path]:
    """Returns the file of a module, those of the modules that it imports, those that these import, and so on.

    Imports inside functions count, and those for type checkers do not. A public name, such as `jf.sample`, stands for
    the module from which `jacobiflow.api` imports it.
    """
    found, waiting = dict[str, Path](), [module]
    while waiting:
        name = waiting.pop()
        path = _find(name, root)
        if path is None or name in found:
            continue
        found[name] = path
        waiting += [name.rpartition(".")[0], *(() if name == _PACKAGE else _imports(path, root))]
    return set(found.values())


def _find(module: str, root: Path) -> Path | None:
    """Returns the file of a module, or `None` if it is of another package, or no module."""
    package = module.split(".")[0]
    if package not in _FOLDERS:
        return None
    path = root / _FOLDERS[package] / module.replace(".", "/")
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()), None)


def _imports(path: Path, root: Path) -> Iterator[str]:
    """Yields the names of imported modules, and some that are no modules."""
    tree = _without_type_checking(path)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            aliases |= {alias.asname or alias.name for alias in node.names if alias.name == _PACKAGE}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield from _imported_from(str(node.module), alias.name, root)
    for each in names:
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id in aliases:
            yield from _imported_from(_PACKAGE, each.attr, root)
    bare = {id(each.value) for each in names if isinstance(each, ast.Attribute)}
    if any(isinstance(each, ast.Name) and each.id in aliases and id(each) not in bare for each in names):
        yield _PUBLIC  # The package as a value, such as in getattr(jf, name).


def _imported_from(module: str, name: str, root: Path) -> Iterator[str]:
    """Yields the modules of `from module import name`."""
    yield module
    yield f"{module}.{name}"
    public = _find(_PUBLIC, root) if module == _PACKAGE else None
    for node in ast.parse(public.read_bytes()).body if public is not None else ():
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            yield from _imported_from(str(node.module), name, root)


def _without_type_checking(path: Path) -> ast.Module:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    return tree
