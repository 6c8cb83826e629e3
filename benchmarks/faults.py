"""Small faults in Python sources, by the operators of cosmic-ray, in places that can change a result."""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names


@dataclass(frozen=True)
class Mutant:
    """Occurrence `occurrence` of a place in `file` that an operator of cosmic-ray can change."""

    file: str
    line: int
    column: int
    operator: str
    occurrence: int

    def apply(self, source: str) -> str:
        """The source with the fault."""
        changed = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        assert changed is not None, self
        return changed


def without_effect(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans, from (line, column) to (line, column), where a change cannot alter what the code computes."""
    lines = source.splitlines()

    def position(line: int, offset: int) -> tuple[int, int]:
        return line, len(lines[line - 1].encode()[:offset].decode())

    def nodes() -> Iterator[ast.AST | None]:
        tree = ast.parse(source)
        for statement in tree.body:  # aliases of types
            if isinstance(statement, ast.Assign):
                yield from (node for node in ast.walk(statement) if isinstance(getattr(node, "op", None), ast.BitOr))
        for node in ast.walk(tree):
            match node:
                case ast.arg() | ast.AnnAssign():
                    yield node.annotation
                case ast.FunctionDef():
                    yield node.returns
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
        (position(node.lineno, node.col_offset), position(node.end_lineno, node.end_col_offset))
        for node in nodes()
        if isinstance(node, ast.expr | ast.stmt) and node.end_lineno is not None and node.end_col_offset is not None
    ]


def places(source: str, file: str) -> list[list[Mutant]]:
    """The mutants of a source, those of one place and kind of operator together, in order of place."""
    by_place: dict[tuple[tuple[int, int], str], list[Mutant]] = defaultdict(list)
    nodes, spans = list(ast_nodes(get_ast(source))), without_effect(source)
    for name in operator_names():
        if get_operator(name).arguments():  # those that replace variables by name
            continue
        operator, kind = get_operator(name)(), name.partition("_")[0]
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            if not any(first <= start < last for first, last in spans):
                by_place[start, kind].append(Mutant(file, start[0], start[1], name, occurrence))
    return [by_place[place] for place in sorted(by_place)]


def is_python(source: str) -> bool:
    """True if it compiles: an operator may take the star of a signature for a product."""
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def draw(root: Path, folder: str, count: int, rng: random.Random) -> tuple[int, list[Mutant]]:
    """Returns the number of places in the sources of `folder`, and `count` mutants at different places."""
    sources = {str(path.relative_to(root)): path.read_text() for path in sorted((root / folder).rglob("*.py"))}
    all_places = [place for file, source in sources.items() for place in places(source, file)]
    mutants: list[Mutant] = []
    for place in rng.sample(all_places, len(all_places)):
        mutant = rng.choice(place)
        if len(mutants) < count and is_python(mutant.apply(sources[mutant.file])):
            mutants.append(mutant)
    return len(all_places), sorted(mutants, key=lambda mutant: (mutant.file, mutant.line, mutant.column))
