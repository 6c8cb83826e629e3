"""Fills the tables of docs/reliability.md from the result files: `python benchmarks/reliability_page.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filling import fill, measured_on, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def crash(result: dict[str, Any]) -> str:
    """What the crash test did and found."""
    rows = []
    for name, job in result["jobs"].items():
        killed = [entry for entry in job["log"] if entry["killed"] is not None]
        after = sorted(entry["seconds"] for entry in killed)
        rows.append((
            name, f"{job['undisturbed_seconds']:.0f}", str(len(killed)), f"{after[0]:.0f} to {after[-1]:.0f}",
            "no" if job["nothing_lost"] else "YES", "yes" if job["identical_bytes"] else "NO",
        ))  # fmt: skip
    columns = ("command", "undisturbed, s", "kills", "after, s", "finished work lost", "identical bytes at the end")
    commands = "\n".join(
        f"{job['command']} --out out/{name}{'/report.json' if name == 'calibrate' else ''}"
        for name, job in result["jobs"].items()
    )
    return f"{table(columns, rows)}\n\n```\n{commands}\n```\n\n{measured_on(result['machine'])}"


def costs(result: dict[str, Any]) -> str:
    """Shares of sampling runs."""
    rows = [
        (f"`{name}`", f"{run['seconds']:.2f}", f"{1000 * run['checks']:.2f}", f"{run['share']:.2%}")
        for name, run in result["runs"].items()
    ]
    columns = (f"{result['num']} images of {result['model']}", "seconds", "checks, ms", "share")
    return f"{table(columns, rows)}\n\n{measured_on(result['machine'])}"


def parts() -> dict[str, str]:
    """The page's parts, by their marks."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("crash-test", "check-costs")}
    return {"crash": crash(results["crash-test"]), "costs": costs(results["check-costs"])}


if __name__ == "__main__":
    fill(ROOT / "docs" / "reliability.md", parts())
