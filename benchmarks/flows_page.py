"""Puts the figures of docs/results into docs/flows.md, between its marks: `python benchmarks/flows_page.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calibration_page import crm, igm
from filling import fill

import jacobiflow as jf

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
REPORT = ROOT / "src" / "jacobiflow" / "models" / "digits-maf" / "report.json"
PAPER = (  # method, seconds, ratio, MAE
    ("For loop", 4903, 1.0, "0.000"),
    ("10 sweeps", 563, 8.73, "0.043"),
    ("20 sweeps", 772, 6.35, "0.019"),
    ("30 sweeps", 1114, 4.40, "0.007"),
)


def drop_in(result: dict[str, Any]) -> str:
    """The page's table."""
    machine = result["machine"]
    lines = [
        f"Seconds of an inverse of all transforms, {machine['cores']} cores of {machine['processor']}, PyTorch "
        f"{machine['torch']}; versions: {', '.join(f'{k} {v}' for k, v in result['versions'].items())}.\n",
        "| flow | features | batch | library (s) | passes | identical bits (s) | passes | times as fast | bits | "
        f"to {result['tolerance']:g} (s) | passes | times as fast | largest error |",
        f"| --- |{' ---: |' * 12}",
    ]
    for row in result["rows"]:
        seconds = {name: f"{timing['median']:.3g}" for name, timing in row["seconds"].items()}
        where = f"{row['flow']} | {row['features']} | {row['batch']}"
        passes = {name: sum(found) for name, found in row["passes"].items()}
        lines.append(
            f"| {where} | {seconds['library']} | {row['library_passes']:,} | "
            f"{seconds['identical bits']} | {passes['identical bits']} | {row['ratio']['identical bits']:.1f}x | "
            f"{'identical' if row['identical'] else 'DIFFER'} | {seconds['tolerance']} | {passes['tolerance']} | "
            f"{row['ratio']['tolerance']:.1f}x | {row['max_error']:.1e} |"
        )
    lines.append("")
    for features in dict.fromkeys(row["features"] for row in result["rows"]):
        for kind in ("MAF", "NSF"):
            rows = [row for row in result["rows"] if row["features"] == features and kind in row["flow"]]
            if rows:
                lines.append(
                    f"- {kind}, {features} features: {_range(rows, 'identical bits')} with identical bits, "
                    f"{_range(rows, 'tolerance')} to {result['tolerance']:g}, where the largest error is "
                    f"{max(row['max_error'] for row in rows):.1e}."
                )
    return "\n".join(lines)


def _range(rows: list[dict[str, Any]], name: str) -> str:
    ratios = [row["ratio"][name] for row in rows]
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x"


def sizes(result: dict[str, Any]) -> str:
    """Ratios to zuko's own inverse over features and rows."""
    lines = [
        f"How many times as fast as zuko's own inverse the accelerated one is, of networks that are not trained, "
        f"{_machine(result)}.\n",
        "| flow | features | rows | library (s) | identical bits, times as fast | way | bits | "
        f"to {result['tolerance']:g}, times as fast | way | largest error |",
        f"| --- |{' ---: |' * 9}",
    ]
    lines += [f"| {row['flow']} | {row['features']} | {row['rows']:,} | {_ratios(row)}" for row in result["rows"]]
    return "\n".join(lines)


def sbi(result: dict[str, Any]) -> str:
    """Ratios to sbi's posteriors as they are."""
    lines = [
        f"`posterior.sample(({result['samples']:,},))`, as it is and accelerated, {_machine(result)}.\n",
        "| density estimator | parameters | library (s) | identical bits, times as fast | way | bits | "
        f"to {result['tolerance']:g}, times as fast | way | largest error |",
        f"| --- |{' ---: |' * 8}",
    ]
    lines += [f"| {row['estimator']} | {row['features']} | {_ratios(row)}" for row in result["rows"]]
    return "\n".join(lines)


def _machine(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return f"on {machine['cores']} cores of {machine['processor']}, PyTorch {machine['torch']}, {versions}"


def _ratios(row: dict[str, Any]) -> str:
    ways, seconds = {name: ", ".join(found) for name, found in row["ways"].items()}, row["seconds"]["library"]["median"]
    return (
        f"{seconds:.3g} | {row['ratio']['identical bits']:.2f}x | {ways['identical bits']} | "
        f"{'identical' if row['identical'] else 'DIFFER'} | {row['ratio']['tolerance']:.2f}x | {ways['tolerance']} | "
        f"{row['max_error']:.1e} |"
    )


def maf(result: dict[str, Any]) -> str:
    """Table 5 of the paper, and the same for the other libraries, a table for each machine."""
    count, batch = result["images"], result["batch_size"]
    tables = []
    for number, part in enumerate(result["parts"].values()):
        first, machine = part["rows"][0], part["machine"]
        lines = [
            f"On {machine['cores']} cores of {machine['processor']}; the time in italics is extrapolated from "
            f"{first['batches']} batches, which took times within {first['spread'] - 1:.0%} of each other:\n",
            "| method | seconds | times as fast | MAE | largest error |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        if number == 0:
            lines += [f"| paper: {name} | {taken:,} | {ratio:.2f}x | {mae} | |" for name, taken, ratio, mae in PAPER]
        for row in part["rows"]:
            seconds = row["seconds_of_all"]
            text = f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}"
            shown = text if row["batches"] * batch == count else f"*{text}*"
            ratio = first["seconds_of_all"] / seconds
            lines.append(f"| {row['method']} | {shown} | {ratio:.1f}x | {row['mae']:.1e} | {row['max_error']:.1e} |")
        tables.append("\n".join(lines))
    return (
        f"Table 5 of the paper, on {count:,} images of Fashion-MNIST in batches of {batch}: seconds to invert their "
        "latents, and the mean absolute error of a pixel in [0, 1].\n\n" + "\n\n".join(tables)
    )


def parts() -> dict[str, str]:
    """What the page shows of the result files, by its marks."""
    report = {"digits-maf": jf.Report.load(REPORT)}
    tables = {"drop-in": drop_in, "drop-in-sizes": sizes, "sbi": sbi, "maf": maf}
    results = {part: json.loads((RESULTS / f"{part}.json").read_text()) for part in tables}
    return {part: table(results[part]) for part, table in tables.items()} | {"igm": igm(report), "crm": crm(report)}


if __name__ == "__main__":
    fill(ROOT / "docs" / "flows.md", parts())
