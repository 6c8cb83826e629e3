"""Small faults in Python sources, by the operators of cosmic-ray, in places that can change a result."""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names


class Mutant(NamedTuple):
    """A fault at one place of a file: the occurrence of those that an operator of cosmic-ray can change."""

    file: str
    line: int
    column: int
    operator: str
    occurrence: int

    def apply(self, source: str) -> str:
        changed = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        assert changed is not None, self
        return changed


def without_effect(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans, from (line, column) to (line, column), in which a change cannot alter a result: types and messages."""
    lines = source.splitlines()

    def position(line: int, offset: int) -> tuple[int, int]:
        return line, len(lines[line - 1].encode()[:offset].decode())

    def nodes() -> Iterator[Any]:
        tree = ast.parse(source)
        for statement in tree.body:  # aliases of types
            if isinstance(statement, ast.Assign):
                yield from (node for node in ast.walk(statement) if isinstance(getattr(node, "op", None), ast.BitOr))
        for node in ast.walk(tree):
            match node:
                case ast.arg(annotation=ast.expr() as kind) | ast.AnnAssign(annotation=kind):
                    yield kind
                case ast.FunctionDef(returns=ast.expr() as kind):
                    yield kind
                case ast.Raise(exc=ast.Call(args=texts)):
                    yield from texts
                case ast.Call(func=ast.Attribute(attr="warn"), args=[text, *_]):
                    yield text
                case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                    yield kinds
                case ast.Call(func=ast.Name(id="cast"), args=[kind, _]):
                    yield kind
                case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    yield node

    return [
        (position(node.lineno, node.col_offset), position(node.end_lineno, node.end_col_offset)) for node in nodes()
    ]


def places(source: str, file: str) -> list[list[Mutant]]:
    """The mutants of a source, those of one place and kind of operator together, in order of place."""
    by_place: dict[tuple[tuple[int, int], str], list[Mutant]] = defaultdict(list)
    nodes, spans = list(ast_nodes(get_ast(source))), without_effect(source)
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments():  # those that replace variables by name
            continue
        starts = [start for node in nodes for start, _ in operator().mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            if not any(first <= start < last for first, last in spans):
                by_place[start, name.partition("_")[0]].append(Mutant(file, start[0], start[1], name, occurrence))
    return [by_place[place] for place in sorted(by_place)]


def is_python(source: str) -> bool:
    """True if it compiles: an operator may read the star of a signature as a product."""
    with suppress(SyntaxError):
        return bool(compile(source, "mutant", "exec", dont_inherit=True))
    return False


def draw(root: Path, folder: str, count: int, rng: random.Random) -> tuple[int, list[Mutant]]:
    """Returns the number of places in the sources of `folder`, and `count` mutants at different places."""
    sources = {str(path.relative_to(root)): path.read_text() for path in sorted((root / folder).rglob("*.py"))}
    all_places = [place for file, source in sources.items() for place in places(source, file)]
    mutants: list[Mutant] = []
    for place in rng.sample(all_places, len(all_places)):
        mutant = rng.choice(place)
        if len(mutants) < count and is_python(mutant.apply(sources[mutant.file])):
            mutants.append(mutant)
    return len(all_places), sorted(mutants)
