"""What `calibrate` may leave untried: `python benchmarks/tuning_grid.py [MODEL ...]`, half an hour on two idle cores.

Tunes each bundled model with more samples, windows and numbers of sweeps than `calibrate` does by default, and plans by
all of them, and by those of the defaults alone: at several batch sizes and tolerances, by costs that are measured with
and without the exact loop in native code. What is compared is the time that the sweeps of all samples predict. What is
fitted to fewer samples is tried on others.

Writes docs/results/tuning-grid.json; full tunings are kept in out/tuning-grid.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.calibration import TuneSettings, Tuning, find_report
from jacobiflow.calibration.tune import SAMPLES
from jacobiflow.calibration.tuning import BlockTuning
from jacobiflow.files import write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import guided
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.measuring import machine
from jacobiflow.strategy.costs import Costs, exact_costs, measure
from jacobiflow.strategy.options import Option, PlanSettings, block_options, cheapest

ROOT = Path(__file__).resolve().parent.parent
RESULT, KEPT = ROOT / "docs" / "results" / "tuning-grid.json", ROOT / "out" / "tuning-grid"
MODELS = ("fashion-p2", "emoji-p2", "digits-p1", "digits-maf")
TUNED_WITH, GUIDED_WITH = 32, 4  # samples
SMALLER = (8, 16, 32, 64, 128)
FULL = TuneSettings(
    coarse=(2, 3, 4, 5, 6),
    fine_after_coarse=(1, 2, 3, 4),
    coarse_to_tolerance=(2, 3, 4),
    coarse_share=0.0,
)
DEFAULT = TuneSettings()
BATCHES = (1, 4, 16)
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)


def tuned(name: str, samples: int, guidance: jf.Guidance | None) -> Tuning:
    """The model tuned with all settings; read where it has been before."""
    flow = jf.load(name)
    path = KEPT / f"{name}{'' if guidance is None else '-guided'}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sizes = [size for size in SMALLER if size < flow.config.num_tokens]
        settings = replace(FULL, partitions=(*map(jf.Window, sizes), jf.Window(flow.config.num_tokens)))
        jf.tune(flow, guidance=guidance, samples=samples, settings=settings).save(path)
    return Tuning.load(path)


def thinned(tuning: Tuning) -> Tuning:
    """Without what the default settings do not try."""
    length = tuning.num_tokens
    partitions = jf.Window.candidates(length)

    def block(full: BlockTuning) -> BlockTuning:
        share = {run.partition: run.partition.stop(0, length) / length for run in full.runs}
        passes = {
            (run.partition, run.tolerance): share[run.partition] * statistics.mean(run.sweeps)
            for run in full.runs if not run.coarse
        }  # fmt: skip
        runs = [
            run for run in full.runs
            if run.partition in partitions and (not run.coarse or (
                run.coarse in DEFAULT.coarse_to_tolerance and share[run.partition] >= DEFAULT.coarse_from
                and run.coarse >= DEFAULT.coarse_share * passes[run.partition, run.tolerance]
            ))
        ]  # fmt: skip
        counted = [
            run for run in full.counted
            if not run.coarse or (run.coarse in DEFAULT.coarse and run.fine in DEFAULT.fine_after_coarse)
        ]  # fmt: skip
        return replace(full, runs=tuple(runs), counted=tuple(counted))

    return replace(tuning, blocks=tuple(map(block, tuning.blocks)))


def with_fewer_samples(tuning: Tuning) -> Tuning:
    """Of as many samples as `calibrate` takes. Errors stay those of all."""
    every = -(-tuning.samples // SAMPLES)

    def block(full: BlockTuning) -> BlockTuning:
        return replace(full, runs=tuple(replace(run, sweeps=run.sweeps[::every]) for run in full.runs))

    return replace(tuning, samples=-(-tuning.samples // every), blocks=tuple(map(block, tuning.blocks)))


def passes(tuning: Tuning) -> float:
    """Passes over a block that its runs take a sample, of all blocks; a sweep of n tokens is n/T of one.

    Runs of so many sweeps go on from those of fewer.
    """
    total, length = 0.0, tuning.num_tokens
    for block in tuning.blocks:
        for run in block.runs:
            share = run.partition.stop(0, length) / length
            total += share * sum(run.sweeps) / len(run.sweeps) + run.coarse + 1
        most = Counter[int]()
        for count in block.counted:
            most[count.coarse] = max(most[count.coarse], count.fine)
        total += sum(coarse + fine for coarse, fine in most.items()) + len(block.counted)
    return total


def options(tuning: Tuning, costs: Costs, batch: int, tolerance: float) -> list[list[Option]]:
    """The ways to solve each block."""
    alone, settings = Option(jf.Solver(jf.Sequential()), costs.sequential, 0.0), PlanSettings()
    return [[alone, *block_options(block, costs, batch, tolerance, settings)] for block in tuning.blocks]


def way(solver: jf.Solver, length: int) -> str:
    """A solver in words."""
    size = solver.partition.stop(0, length)
    if size == 1:
        return "token by token"
    counted = solver.stopping.atol is None
    return f"{'all' if size == length else size}, {'counted' if counted else 'to a tolerance'}" + (
        f", after {solver.coarse} in bfloat16" if solver.coarse else ""
    )


def compared(flow: ImageFlow, full: Tuning) -> Iterator[dict[str, Any]]:
    """Plans by the full tuning, and by the thinned one of fewer samples."""
    few, block = thinned(full), guided(flow.blocks[0], full.guidance)
    fewer = with_fewer_samples(few)
    for loop in ("1", "0"):
        os.environ[native.SWITCH] = loop
        for batch in BATCHES:
            costs = measure(block, full, batch, flow, exact_costs(block, batch, flow))
            for tolerance in TOLERANCES:
                best = cheapest(options(full, costs, batch, tolerance), tolerance)
                seen, judged = (options(each, costs, batch, tolerance) for each in (fewer, few))
                found = [
                    next(truly for option, truly in zip(row, rows, strict=True) if option is choice)
                    for choice, row, rows in zip(cheapest(seen, tolerance), seen, judged, strict=True)
                ]
                seconds = sum(option.seconds for option in best)
                yield {
                    "native": loop == "1", "batch": batch, "tolerance": tolerance,
                    "ratio": sum(option.seconds for option in found) / seconds, "seconds": seconds,
                    "ways": dict(Counter(way(option.solver, full.num_tokens) for option in best)),
                }  # fmt: skip
    del os.environ[native.SWITCH]


def unseen(flow: ImageFlow, tunings: Sequence[Tuning]) -> list[float]:
    """Mean sweeps of fresh latents with what each tuning fitted: of all tokens, to 1e-3, the sum over blocks."""
    config, sweeps = flow.config, [0.0] * len(tunings)
    latents = draw_latents(TUNED_WITH, config.num_tokens, config.token_channels, 1, FIRST_CALIBRATION_LATENT)
    labels = torch.arange(TUNED_WITH) % config.num_classes if config.num_classes else None

    def solve_block(i: int, z: torch.Tensor) -> torch.Tensor:
        for k, tuning in enumerate(tunings):
            fitted = tuning.blocks[i]
            solver = jf.Solver(jf.Whole(), fitted.guess, jf.Tolerance(1e-3), fitted.correction)
            sweeps[k] += float(jf.solve(flow.blocks[i], z, solver, labels).sample_sweeps.float().mean())
        return jf.solve(flow.blocks[i], z, jf.Solver(jf.Sequential()), labels).x

    invert(flow, prior_tokens(flow, latents), solve_block)
    return sweeps


def main() -> None:
    """Tune, plan, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="bundled models (all)")
    found: dict[str, Any] = {"machine": machine(), "models": {}}
    for name in parser.parse_args().models:
        flow = jf.load(name)
        recommended = flow.recommended.guidance
        for guidance in (None, recommended) if recommended and find_report(flow, recommended) else (None,):
            full = tuned(name, TUNED_WITH if guidance is None else GUIDED_WITH, guidance)
            rows = list(compared(flow, full))
            title = name if guidance is None else f"{name}, guided"
            found["models"][title] = {
                "samples": [full.samples, with_fewer_samples(full).samples], "passes": passes(full),
                "default": passes(thinned(full)), "plans": rows,
            }  # fmt: skip
            if guidance is None:
                (file,) = (file for file in flow.report_files if file.name == "report.json")
                bundled = jf.Report.load(file).tuning
                assert bundled is not None
                found["models"][title]["unseen"] = unseen(flow, (full, bundled))
            worst = max(row["ratio"] for row in rows)
            print(f"{title}: {passes(thinned(full)):.0f} of {passes(full):.0f} passes, {worst:.3f}", flush=True)
            write_json(RESULT, found)


if __name__ == "__main__":
    main()
