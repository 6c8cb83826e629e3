"""Puts the figures of docs/results into README.md, between its marks: `python benchmarks/readme.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jacobiflow.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {
    "growing cache (original)": "growing cache",
    "sequential": "sequential",
    "GS-Jacobi, best of 24": "GS-Jacobi",
    "jacobi": "jacobi",
    "window 24 + whole": "window 24",
    "auto": "auto",
    "encoding pass": "encoding pass",
}


def demo(name: str) -> str:
    """The table and the line that `jacobiflow sample --compare --json` gave."""
    figures = json.loads((ROOT / "docs" / "results" / name).read_text())
    num, runs = figures["num"], figures["runs"]
    lines = [
        f"{num} image{'s' * (num > 1)} at batch {figures['batch_size']}:\n",
        "| strategy | seconds | images/s | network calls | token evaluations | certificate | re-solved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for strategy, run in runs.items():
        lines.append(
            f"| {strategy} | {run['seconds']:.3f} | {run['images_per_second']:.1f} | {run['network_calls']:,} | "
            f"{run['token_evaluations']:,} | {run['certificate']:.1e} | {run['resolved_sequentially']} |"
        )
    ratio, error = runs["sequential"]["seconds"] / runs[figures["strategy"]]["seconds"], figures["error"]
    lines.append(
        f"\nSpeed-up {ratio:.2f}x over the sequential loop; error max {error['max']:.1e}, mean {error['mean']:.1e}."
    )
    return "\n".join(lines)


def speed(result: dict[str, Any]) -> str:
    """Seconds and speed-ups by batch."""
    rows, machine = result["rows"], result["machine"]

    def worst(*methods: str) -> float:
        return max(row["max_error"] for row in rows if row["method"].startswith(methods) and "max_error" in row)

    lines = [
        "Seconds for a batch of `fashion-p2`, and the speed-up over the original's growing-cache loop, in one",
        f"interleaved run on {machine['processor']}, {machine['threads']} threads. The solvers with a tolerance (1e-3)",
        f"were at most {worst('jacobi', 'auto', 'window'):.1e} from the sequential answer, the paper's fixed schedules",
        f"(chosen at batch 4) {worst('GS-Jacobi'):.1e}.\n",
        f"| batch | {' | '.join(COLUMNS)} |",
        f"| ---: |{' ---: |' * len(COLUMNS)}",
    ]
    for guided in (False, True):
        for batch in sorted({row["batch"] for row in rows}):
            cells = []
            for method in COLUMNS.values():
                row = next(
                    row for row in rows
                    if (row["batch"], row["guidance"]) == (batch, guided) and row["method"].startswith(method)
                )  # fmt: skip
                ratio = "" if method in ("growing cache", "encoding pass") else f", {row['speed_up']:.1f}x"
                cells.append(f"{row['seconds']:.2f} s{ratio}")
            lines.append(f"| {batch}{' guided' if guided else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """`page` with the text between its marks replaced by what the result files say."""
    result = json.loads((ROOT / "docs" / "results" / "sampling.json").read_text())
    parts = {"demo": demo("demo.json") + "\n\n" + demo("demo-one.json"), "speed": speed(result)}
    for name, text in parts.items():
        before, _, rest = page.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- end of {name} -->")
        page = f"{before}<!-- {name} -->\n\n{text}\n\n<!-- end of {name} -->{after}"
    return page


if __name__ == "__main__":
    readme = ROOT / "README.md"
    write_atomically(readme, filled(readme.read_text()).encode())
