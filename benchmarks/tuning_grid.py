"""What `calibrate` may leave untried: `python benchmarks/tuning_grid.py [MODEL ...]`, half an hour on two idle cores.

Tunes each bundled model with more windows, tolerances and numbers of sweeps than the defaults of `TuneSettings`, and
plans by all of them, and by those of the defaults alone: at several batch sizes and tolerances, by costs that are
measured with and without the exact loop in native code. What is compared is the predicted time.

Writes docs/results/tuning-grid.json; full tunings are kept in out/tuning-grid.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.calibration import TuneSettings, Tuning, find_report
from jacobiflow.calibration.tuning import BlockTuning
from jacobiflow.files import write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import guided
from jacobiflow.measuring import machine
from jacobiflow.strategy.costs import Costs, exact_costs, measure
from jacobiflow.strategy.options import Option, PlanSettings, block_options, cheapest

ROOT = Path(__file__).resolve().parent.parent
RESULT, KEPT = ROOT / "docs" / "results" / "tuning-grid.json", ROOT / "out" / "tuning-grid"
MODELS = {"fashion-p2": 16, "emoji-p2": 8, "digits-p1": 32, "digits-maf": 32}  # and how many samples each is tuned with
SMALLER = (8, 16, 32, 64, 128)
FULL = TuneSettings(
    coarse=(2, 3, 4, 5, 6),
    fine_after_coarse=(1, 2, 3, 4),
    coarse_to_tolerance=(2, 3, 4),
    coarse_tolerances=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
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
                run.coarse in DEFAULT.coarse_to_tolerance and run.tolerance in DEFAULT.coarse_tolerances
                and share[run.partition] >= DEFAULT.coarse_from
                and run.coarse >= DEFAULT.coarse_share * passes[run.partition, run.tolerance]
            ))
        ]  # fmt: skip
        counted = [
            run for run in full.counted
            if not run.coarse or (run.coarse in DEFAULT.coarse and run.fine in DEFAULT.fine_after_coarse)
        ]  # fmt: skip
        return replace(full, runs=tuple(runs), counted=tuple(counted))

    return replace(tuning, blocks=tuple(map(block, tuning.blocks)))


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


def seconds(tuning: Tuning, costs: Costs, batch: int, tolerance: float) -> tuple[float, Counter[str]]:
    """The predicted seconds of the cheapest plan, and the ways in it."""
    alone = Option(jf.Solver(jf.Sequential()), costs.sequential, 0.0)
    settings = PlanSettings()
    options = [[alone, *block_options(block, costs, batch, tolerance, settings)] for block in tuning.blocks]
    chosen = cheapest(options, tolerance)
    return sum(option.seconds for option in chosen), Counter(way(option.solver, tuning.num_tokens) for option in chosen)


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
    """Plans by the full tuning and by the thinned one."""
    few, block = thinned(full), guided(flow.blocks[0], full.guidance)
    for loop in ("1", "0"):
        os.environ[native.SWITCH] = loop
        for batch in BATCHES:
            costs = measure(block, full, batch, flow, exact_costs(block, batch, flow))
            for tolerance in TOLERANCES:
                (best, ways), (found, _) = (seconds(each, costs, batch, tolerance) for each in (full, few))
                yield {
                    "native": loop == "1", "batch": batch, "tolerance": tolerance, "ratio": found / best,
                    "seconds": best, "ways": dict(ways),
                }  # fmt: skip
    del os.environ[native.SWITCH]


def main() -> None:
    """Tune, plan, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=tuple(MODELS), help="bundled models (all)")
    found: dict[str, Any] = {"machine": machine(), "models": {}}
    for name in parser.parse_args().models:
        flow = jf.load(name)
        recommended = flow.recommended.guidance
        for guidance in (None, recommended) if recommended and find_report(flow, recommended) else (None,):
            full = tuned(name, MODELS[name] if guidance is None else 4, guidance)
            rows = list(compared(flow, full))
            title = name if guidance is None else f"{name}, guided"
            found["models"][title] = {"passes": passes(full), "default": passes(thinned(full)), "plans": rows}
            worst = max(row["ratio"] for row in rows)
            print(f"{title}: {passes(thinned(full)):.0f} of {passes(full):.0f} passes, {worst:.3f}", flush=True)
            write_json(RESULT, found)


if __name__ == "__main__":
    main()
