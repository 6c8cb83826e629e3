"""Puts figures of docs/results into docs/architecture.md: `python benchmarks/architecture_page.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filling import fill

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def mutants(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Shares of mutants that the tests killed, part by part."""
    lines = ["| part | before | now |", "| --- | ---: | ---: |"]
    for part in after["parts"]:
        cells = [f"{found['killed']} of {found['total']} ({found['share']:.1%})" for found in
                 (result["parts"][part] for result in (before, after))]  # fmt: skip
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def versions(result: dict[str, Any]) -> str:
    """Certified sampling by two checkouts."""
    machine = result["machine"]
    lines = [
        f"`{result['model']}`, certified to 1e-3, before and after the change, in turn: medians of {result['rounds']} "
        f"rounds on {machine['cores']} cores of {machine['processor']}, network calls in brackets.\n",
        "| strategy | batch | seconds before | seconds now | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        before, after = row["before"], row["after"]
        cells = [f"{side['seconds']:.3f} ({side['network_calls']:,.0f})" for side in (before, after)]
        ratio = before["seconds"] / after["seconds"]
        lines.append(f"| {row['strategy']} | {row['batch_size']} | {' | '.join(cells)} | {ratio:.2f}x |")
    return "\n".join(lines)


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def parts() -> dict[str, str]:
    """The page's parts, by their marks."""
    return {
        "mutants": mutants(_result("mutants-before"), _result("mutants")),
        "versions": versions(_result("versions")),
    }


if __name__ == "__main__":
    fill(ROOT / "docs" / "architecture.md", parts())
