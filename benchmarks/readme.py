"""Puts the figures of docs/results into README.md, between its marks: `python benchmarks/readme.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluation_page import rows_of
from filling import fill

from jacobiflow.experiments.quality import finalists

_MANY = 64  # features from which few rows gain much too
_FEW, _FEW_ROWS = 5, 100  # features and rows up to which nothing is gained
ROOT = Path(__file__).resolve().parent.parent
EAGER = "sequential, in PyTorch"
BARE, CERTIFIED = "auto, without all three", "auto, certified"
SAMPLERS = ("GS-Jacobi", "Selective Jacobi Decoding", "STARFlow")


def three(result: dict[str, Any], drop_in: dict[str, Any], sizes: dict[str, Any]) -> str:
    """A flow of a library, a TarFlow, and where nothing is gained."""
    wide = max(drop_in["rows"], key=lambda row: (row["features"], row["batch"], -row["ratio"]["identical bits"]))
    small = [row["ratio"] for row in sizes["rows"] if row["features"] <= _FEW and row["rows"] <= _FEW_ROWS]
    none = sorted(ratio for row in small for ratio in row.values())
    tarflow = [
        row["speed_up"]["growing cache"]
        for found in result["final"].values()
        for row in found["rows"]
        if row["strategy"] == "auto, certified"
    ]
    batches = list(result["final"])
    return "\n".join(
        [
            "| on two CPU cores; no GPU was measured | times as fast |",
            "| --- | ---: |",
            f"| A {wide['flow']} of {wide['features']} features, {wide['batch']} samples, over the library's own "
            f"inverse: identical bits, or to {drop_in['tolerance']:g} | {wide['ratio']['identical bits']:.0f}x, "
            f"{wide['ratio']['tolerance']:.0f}x |",
            f"| A TarFlow (`fashion-p2`), batches of {batches[0]} to {batches[-1]}, over the loop of the original code "
            f"| {min(tarflow):.1f}x to {max(tarflow):.1f}x |",
            f"| Where it does not pay: zuko's flows of at most {_FEW} features, at most {_FEW_ROWS} samples | "
            f"{none[0]:.1f}x to {none[-1]:.1f}x |",
        ]
    )


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


def drop_in(result: dict[str, Any]) -> str:
    """The libraries' inverses of 64 samples, and how many times as fast they are accelerated."""
    machine = result["machine"]
    lines = [
        f"Seconds to invert 64 samples, on {machine['cores']} cores of {machine['processor']}; flows trained on the "
        "pixels of Fashion-MNIST (784 features) and of digits (64).\n",
        f"| flow | features | the library | identical bits | to {result['tolerance']:g} |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        if row["batch"] == 64 and row["features"] >= _MANY:
            seconds = {name: timing["median"] for name, timing in row["seconds"].items()}
            cells = [f"{seconds[name]:.3g} ({row['ratio'][name]:.1f}x)" for name in ("identical bits", "tolerance")]
            lines.append(f"| {row['flow']} | {row['features']} | {seconds['library']:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes(result: dict[str, Any]) -> str:
    """How many times as fast zuko's inverses of many rows are accelerated, over features."""
    machine, rows = result["machine"], max(row["rows"] for row in result["rows"])
    many = [row for row in result["rows"] if row["rows"] == rows]
    features = sorted({row["features"] for row in many})
    lines = [
        f"{rows:,} samples of zuko's flows by the number of features, times as fast as the library, on "
        f"{machine['cores']} cores of {machine['processor']}:\n",
        f"| flow | | {' | '.join(map(str, features))} |",
        f"| --- | --- |{' ---: |' * len(features)}",
    ]
    for flow in dict.fromkeys(row["flow"] for row in many):
        own = {row["features"]: row for row in many if row["flow"] == flow}
        for name, text in (("identical bits", "identical bits"), ("tolerance", f"to {result['tolerance']:g}")):
            cells = " | ".join(f"{own[count]['ratio'][name]:.1f}x" for count in features)
            lines.append(f"| {flow} | {text} | {cells} |")
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
        "three": three(_result("performance"), _result("drop-in"), _result("drop-in-sizes")),
        "commands": commands(_result("fresh-clone")),
        "drop-in": drop_in(_result("drop-in")), "drop-in-sizes": sizes(_result("drop-in-sizes")),
        "speed": speed(_result("performance")),
        "quality": quality(_result("comparison")),
    }  # fmt: skip


def _result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


if __name__ == "__main__":
    fill(ROOT / "README.md", parts())
