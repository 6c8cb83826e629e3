"""Puts the figures of docs/results into README.md, between its marks: `python benchmarks/readme.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluation_page import rows_of
from filling import fill
from flows_page import speed_up, zuko

from jacobiflow.experiments.quality import finalists

ROOT = Path(__file__).resolve().parent.parent
EAGER = "sequential, in PyTorch"
BARE, CERTIFIED = "auto, without all three", "auto, certified"
SAMPLERS = ("GS-Jacobi", "Selective Jacobi Decoding", "STARFlow")


def three(result: dict[str, Any], masked: dict[str, Any]) -> str:
    """A flow of a library, a TarFlow, and the least gain of a library's flow."""
    slow = [row for row in masked["runs"] if row["direction"] == "slow"]
    wide = max(slow, key=lambda row: (row["features"], row["rows"], row["library"]))
    least = min(slow, key=lambda row: row["speed_up"])
    tarflow = [
        row["speed_up"]["growing cache"]
        for found in result["final"].values()
        for row in found["rows"]
        if row["strategy"] == "auto, certified"
    ]
    batches = list(result["final"])
    return "\n".join(
        [
            "| on two CPU cores; no GPU was measured | speed-up |",
            "| --- | ---: |",
            f"| A {_name(wide)}, over the library's own inverse | {speed_up(wide['speed_up'])} |",
            f"| A TarFlow (`fashion-p2`), batches of {batches[0]} to {batches[-1]}, over the loop of the original code "
            f"| {min(tarflow):.1f}x to {max(tarflow):.1f}x |",
            f"| The least of all flows that were measured: {_name(least)} | {speed_up(least['speed_up'])} |",
        ]
    )


def _name(run: dict[str, Any]) -> str:
    rows = f"{run['rows']:,} sample{'s' * (run['rows'] > 1)}"
    return f"{run['library']} {run['flow']} of {run['features']} features, {rows}"


def commands(result: dict[str, Any]) -> str:
    """The two commands of a clone, and how long they take with an empty cache."""
    does = {"make demo": "samples from bundled weights, beside the original code's loop", "make test": "runs the tests"}
    lines = [f"{name}    # {does[name]}: {_lasts(seconds)}" for name, seconds in result["seconds"].items()]
    return "\n".join(["```", *lines, "```"])


def _lasts(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"


def speed(result: dict[str, Any]) -> str:
    """Seconds by batch, and how many times faster than the original's loop."""
    machine, within = result["machine"], 1e-3
    worst = max(
        row["error"]["max"]
        for found in result["final"].values()
        for row in found["rows"]
        if row["strategy"] == CERTIFIED
    )
    lines = [
        "Seconds for a batch of `fashion-p2`, in brackets how many times as fast as the original's growing-cache loop,",
        f"on {machine['cores']} cores of {machine['processor']}. The peers are re-implemented, none",
        "is certified, and each has the fastest of its settings whose largest error is at most 1e-3; a dash where",
        "none that was tried comes that near (from batch 16 on, those that did well at the batch size before). They",
        "have no native code, no bfloat16 and nothing fitted to the model but GS-Jacobi's guess; the last column but",
        "one is `auto` without these, and not certified either. The largest error of `auto`, certified, is "
        f"{worst:.1e}.\n",
        f"| batch | growing cache (original) | {EAGER} | {' | '.join((*SAMPLERS, 'auto without these', CERTIFIED))} |",
        f"| ---: |{' ---: |' * (len(SAMPLERS) + 4)}",
    ]
    for batch, found in result["final"].items():
        cells = []
        for name in ("growing cache", EAGER, *SAMPLERS, BARE, CERTIFIED):
            rows = [row for row in found["rows"] if row["strategy"].split(" | ")[0] == name]
            near = [row for row in rows if row["error"]["max"] <= within or name not in SAMPLERS]
            row = min(near, key=lambda row: row["seconds"]["median"], default=None)
            if row is None:
                cells.append("-")
                continue
            ratio = "" if name == "growing cache" else f" ({row['speed_up']['growing cache']:.1f}x)"
            cells.append(f"{row['seconds']['median']:.3g}{ratio}")
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quality(result: dict[str, Any]) -> str:
    """The rows of most samples: distance, error, time."""
    chosen, timings = finalists(rows_of(result)), result["timings"]
    rows = result["final"] or [row for row in result["rows"] if row["name"] in chosen]
    machine = timings["machine"]
    lines = [
        f"{rows[0]['num']:,} guided samples of `{result['model']}` a row, batches of {timings['batch_size']} on "
        f"{machine['cores']} cores of {machine['processor']}: the original's loop, the fastest peer or strategy of the "
        "paper whose fashion-FID is at most 1% above it, and the fastest `auto`. Only `auto` certifies, and only it "
        "may use native code, bfloat16 and what was fitted to the model. "
        "Fashion-FID is the Fréchet distance to the training images between 64 features of a small classifier that "
        "comes with the package: lower is better, and it does not compare with FID. Times count denoising, "
        f"{timings['denoise_seconds']:.2f} s a batch in every row.\n",
        "| | fashion-FID | above Original | largest error | times as fast as Original |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['distance']:.4f} | {row['relative']:+.2%} | {row['max']:.1e} | {row['rate']:.2f} |"
        )
    return "\n".join(lines)


def parts() -> dict[str, str]:
    """What the page shows of the result files, by its marks."""
    return {
        "three": three(_result("performance"), _result("masked-flows")),
        "commands": commands(_result("fresh-clone")),
        "zuko": zuko(_result("masked-flows")),
        "speed": speed(_result("performance")),
        "quality": quality(_result("comparison")),
    }  # fmt: skip


def _result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


if __name__ == "__main__":
    fill(ROOT / "README.md", parts())
