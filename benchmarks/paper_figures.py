"""Draws the paper's Figures 2, 3, 4, 5 and 7 for a model: `python -m benchmarks.paper_figures MODEL`.

Reads the model's report, as `jacobiflow calibrate` writes it. Samples have no guidance and no certificates. Writes
MODEL-convergence.png (Figure 2), -sampling.png (3), -guesses.png (4), -segments.png (5) and -comparison.png (7).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import FIGURES, parser
from jacobiflow.calibration import gs_jacobi_notation
from jacobiflow.flows.flow import Flow
from jacobiflow.plots import comparison_sheet, convergence_figure, rows_sheet, save_png, segments_figure, trace_sheet
from jacobiflow.solvers import Latent, MaxSweeps, Solver, Whole, Zeros

IMAGES, TRACED = 10, 4
TOLERANCE = 1e-2


def draw_figures(flow: Flow, report: jf.Report, out: Path, name: str, strategy: str | None = None) -> None:
    """Writes all figures; `strategy` is compared with the sequential loop, by default the report's own proposal."""
    out.mkdir(parents=True, exist_ok=True)
    save_png(convergence_figure(report), out / f"{name}-convergence.png")
    if report.segment_traces:
        save_png(segments_figure(report), out / f"{name}-segments.png")
    notation = strategy or gs_jacobi_notation(report, TOLERANCE)
    labels = torch.arange(IMAGES) % flow.config.num_classes if flow.config.num_classes else None
    sample = partial(jf.sample, flow.guided(report.settings.guidance), IMAGES, labels, certify=False)
    denoise = float(flow.config.noise_std > 0)
    sequential = sample(strategy="sequential", settings=jf.SamplingSettings(denoise=denoise), return_trace=True)
    steps = sequential.trace or ()
    save_png(trace_sheet([images[:TRACED] for images in steps], denoise > 0), out / f"{name}-sampling.png")
    exact = steps[-2] if denoise else sequential.images
    columns = [] if labels is None else [f"class {label}" for label in labels.tolist()]
    rows = [
        captioned(case, sample(strategy=plan, settings=None).images, exact)
        for case, plan in strategies_of(report, notation).items()
    ]
    save_png(rows_sheet([*rows, ("sequential", exact)], columns=columns), out / f"{name}-guesses.png")
    other = sample(strategy=jf.Strategy.parse(notation, report), settings=jf.SamplingSettings(denoise=denoise))
    sheet = comparison_sheet(sequential.images, other.images, ("sequential", notation), columns=columns)
    save_png(sheet, out / f"{name}-comparison.png")


def strategies_of(report: jf.Report, notation: str) -> dict[str, jf.Strategy]:
    """Guesses and sweeps: every guess at a third of the sweeps that the slowest block takes, then more."""
    most = max(1, *report.slowest_sweeps("noise", TOLERANCE))
    few, more = max(1, most // 3), max(1, 2 * most // 3)
    by_igm = {f"guess by IGM, Jacobi-{j}": jf.Strategy.parse(f"Jacobi-{j}", report) for j in (few, more, most)}
    return {
        f"guess 0, Jacobi-{few}": jf.Strategy.uniform(Solver(Whole(), Zeros(), MaxSweeps(few)), report.num_blocks),
        f"guess z, Jacobi-{few}": jf.Strategy.uniform(Solver(Whole(), Latent(), MaxSweeps(few)), report.num_blocks),
        **by_igm,
        f"guess by IGM, {notation}": jf.Strategy.parse(notation, report),
    }


def captioned(name: str, images: Tensor, exact: Tensor) -> tuple[str, Tensor]:
    error = (images - exact).abs()
    return f"{name}: error max {error.max():.1e}, mean {error.mean():.1e}", images


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", help="a bundled name, or a model folder with a report.json")
    arguments.add_argument("--strategy", help="compared with the sequential loop; default: the report's own proposal")
    arguments.add_argument("--out", type=Path, default=FIGURES)
    options = arguments.parse_args()
    flow = jf.load(options.model)
    path = jf.find_report(flow)
    if path is None:
        raise SystemExit(f"{options.model}: has no report.json; make one with jacobiflow calibrate")
    draw_figures(flow, jf.Report.load(path), options.out, Path(options.model).name, options.strategy)


if __name__ == "__main__":
    main()
