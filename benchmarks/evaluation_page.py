"""Puts figures of docs/results into docs/evaluation.md, between its marks: `python benchmarks/evaluation_page.py`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from filling import fill

from jacobiflow.evaluation import PixelDifference
from jacobiflow.experiments.quality import WITHIN, Row
from jacobiflow.measuring import Timing
from jacobiflow.plots import certificate_figure, comparison_figure, save_png

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "docs" / "results", ROOT / "docs" / "figures"
COMPARISONS = {  # how a mark names them, and their figures
    "comparison": ("", "quality"),
    "emoji-p2-comparison": (" in colour", "quality-in-colour"),
    "comparison-in-pytorch": (" in PyTorch", "quality-in-pytorch"),
}
SEARCHES = tuple(f"{model}-search" for model in ("fashion-p2", "emoji-p2", "digits-p1", "digits-maf"))
TOLERANCE = 0.1  # of the samples of evaluation.json, auto:1e-1


def setting(result: dict[str, Any]) -> str:
    """What all rows of a comparison have in common, and what they were measured on."""
    timings, guidance = result["timings"], result["guidance"]
    machine = timings["machine"]
    guided = "no guidance"
    if guidance is not None:
        kind = "annealed" if guidance["annealed"] else "constant"
        guided = f"{kind} guidance of weight {guidance['weight']:g}"
        if guidance["attn_temperature"] != 1:
            guided += f" at attention temperature {guidance['attn_temperature']:g}"
    count = timings["repeats"]
    rounds = "of one round over all rows" if count == 1 else f"medians of {count} rounds in turn"
    return (
        f"`{result['model']}`, {guided}, denoising rate {result['denoise']:g}, batches of {timings['batch_size']}; "
        f"{result['distance']} against {result['against']}. Seconds are {rounds}, of a batch and its "
        f"denoising, which is {timings['denoise_seconds']:.2f} s in every row. "
        f"{machine['cores']} cores of {machine['processor']}, {machine['threads']} threads, PyTorch "
        f"{machine['torch']}."
    )


def tables(result: dict[str, Any]) -> str:
    """The rows of a comparison, and those of more samples."""
    return "\n\n".join(strategies(result[name], result["distance"]) for name in ("rows", "final") if result[name])


def strategies(rows: list[dict[str, Any]], distance: str) -> str:
    """A table of rows with their `distance`; bold is within 1%."""
    lines = [
        f"{rows[0]['num']:,} samples a row; bold: at most {WITHIN:.0%} above Original.\n",
        f"| strategy | {distance} | above Original | largest error | RMS error | 8-bit pixels that differ | "
        "re-solved | seconds a batch | times as fast as Original |",
        f"| --- |{' ---: |' * 8}",
    ]
    for row in rows:
        rate = f"{row['rate']:.2f}x"
        lines.append(
            f"| {row['name']} | {row['distance']:.4f} | {row['relative']:+.2%} | {row['max']:.1e} | {row['rms']:.1e} | "
            f"{row['pixels']['share']:.2%}, by {row['pixels']['levels']} at most | {row['resolved']:.2%} | "
            f"{row['seconds']['median']:.3g} | {f'**{rate}**' if row['relative'] <= WITHIN else rate} |"
        )
    return "\n".join(lines)


def calibrating(report: dict[str, Any], result: dict[str, Any]) -> str:
    """What the report of `auto` costs, and when it has paid for itself: without native code, and with it."""
    machine, size = report["machine"], result["timings"]["batch_size"]
    rows = {row["name"]: row["seconds"]["median"] for row in result["rows"]}
    elsewhere = ", on another machine" * (machine["processor"] != result["timings"]["machine"]["processor"])
    lines = [
        f"The bundled report of this guidance took {report['seconds']:.0f} s to make (`--num 256 --traced 8`), on "
        f"{machine['cores']} cores of {machine['processor']}. No "
        f"time above includes that. By the seconds of the table above{elsewhere}, it has paid for itself after so many "
        "images:\n",
        "| strategy | compared with Original | compared with sequential, in PyTorch |",
        "| --- | ---: | ---: |",
    ]
    for name in (name for name in rows if name.startswith("auto")):
        cells = []
        for other in ("Original", "sequential"):
            saved = rows[other] - rows[name]
            batches = math.ceil(report["seconds"] / saved) if saved > 0 else 0
            cells.append(f"{batches * size:,} ({batches:,} batches)" if batches else "never")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows of a comparison."""
    return [
        Row(**(row | {"pixels": PixelDifference(**row["pixels"]), "seconds": Timing(**row["seconds"])}))
        for row in result["rows"]
    ]


MEASURES = {"fashion_fid": "fashion-FID", "emoji_fid": "emoji-FID", "pixel_distance": "Fréchet distance of the pixels"}


def search(result: dict[str, Any]) -> str:
    """A line per guidance, a column per denoising rate."""
    rows, best = result["rows"], result["best"]
    (measure,) = MEASURES.keys() & best.keys()
    rates = sorted({row["denoise"] for row in rows})
    lines = [
        f"{MEASURES[measure]} of {result['num']:,} samples of `{result['model']}`, by guidance and denoising rate.\n",
        f"| guidance weight | attention temperature |{''.join(f' rate {rate:g} |' for rate in rates)}",
        f"| ---: | ---: |{' ---: |' * len(rates)}",
    ]
    for weight, temperature in sorted({(row["weight"], row["attn_temperature"]) for row in rows}):
        found = {r["denoise"]: r for r in rows if (r["weight"], r["attn_temperature"]) == (weight, temperature)}
        cells = (f"**{v}**" if found[rate] == best else v for rate in rates for v in [f"{found[rate][measure]:.3f}"])
        lines.append(f"| {weight:g} | {temperature:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def batches(result: dict[str, Any]) -> str:
    """How far images drawn by another number at a time are."""
    few, many = result["batch_sizes"]
    lines = [
        f"{result['num']} images of `{result['model']}` drawn {few} at a time against the same drawn {many} at a time, "
        "at the strategies' default tolerance.\n",
        "| strategy | 8-bit pixels that differ | by, at most |",
        "| --- | ---: | ---: |",
    ]
    for row in result["rows"]:
        lines.append(f"| {row['strategy']} | {row['share']:.4%} | {row['levels']} |")
    return "\n".join(lines)


def scores(result: dict[str, Any]) -> str:
    """What `jacobiflow evaluate` says of the samples of auto."""
    histogram, paired, stored = result["certificates"], result["paired"], result["stored"]
    return "\n".join(
        (
            "| measure | value |",
            "| --- | ---: |",
            f"| fashion-FID, {result['num']:,} samples | {result['frechet_distance']:.4f} |",
            f"| fashion-KID | {result['kernel_distance']:.5f} +- {result['kernel_distance_std']:.5f} |",
            f"| precision, recall | {result['precision']:.3f}, {result['recall']:.3f} |",
            f"| certificate, largest (median) | {histogram['max']:.1e} ({histogram['median']:.1e}) |",
            f"| re-solved sequentially; lost | {result['resolved_sequentially']}; {result['lost']} |",
            f"| error against the sequential loop, {paired['num']} samples: largest, RMS | {paired['max']:.1e}, "
            f"{paired['rms']:.1e} |",
            f"| PSNR | {paired['psnr']:.1f} dB |",
            f"| stored 8-bit pixels that differ | {stored['share']:.3%}, by {stored['levels']} at most |",
            f"| bits per dimension, {result['test_images']:,} noisy test images | {result['bits_per_dim_noisy']:.3f} |",
            f"| class accuracy by Bayes' rule, the same images | {result['bayes_accuracy']:.1%} |",
        )
    )


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def parts() -> dict[str, str]:
    """The page's parts, by their marks."""
    found = {mark: _result(name) for name, (mark, _) in COMPARISONS.items()}
    return {
        **{f"setting{mark}": setting(result) for mark, result in found.items()},
        **{f"strategies{mark}": tables(result) for mark, result in found.items()},
        "calibrating": calibrating(_result("fashion-p2-calibration-recommended"), found[" in PyTorch"]),
        **{name: search(_result(name)) for name in SEARCHES},
        "scores": scores(_result("evaluation")),
        "batches": batches(_result("batch-sizes")),
    }


if __name__ == "__main__":
    fill(ROOT / "docs" / "evaluation.md", parts())
    for name, (_, picture) in COMPARISONS.items():
        drawn = comparison_figure(rows_of(_result(name)), _result(name)["distance"])
        save_png(drawn, FIGURES / f"{picture}.png")
    save_png(certificate_figure(_result("evaluation")["certificates"], TOLERANCE), FIGURES / "certificates.png")
