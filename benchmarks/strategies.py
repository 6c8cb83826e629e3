"""The paper's strategies for `fashion-p2`, as its Tables 3 and 4: `python benchmarks/strategies.py`.

Writes docs/results/strategies.json, from one interleaved run per batch size. Guesses are by IGM, from the report that
`make calibration` writes. Needs an otherwise idle machine and about 6 minutes on two cores.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from performance import EAGER, IN_PYTORCH, draw, latents

import jacobiflow as jf
from jacobiflow.baselines import GROWING_CACHE
from jacobiflow.experiments.quality import ORIGINAL
from jacobiflow.experiments.speed import compare
from jacobiflow.files import write_json
from jacobiflow.measuring import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS, REPORT = ROOT / "docs" / "results", ROOT / "src" / "jacobiflow" / "models" / "fashion-p2" / "report.json"
BATCHES = (1, 4, 16)
REPEATS = {1: 7, 4: 5, 16: 3}
NAMES = {GROWING_CACHE: ORIGINAL}


def settings(report: jf.Report) -> dict[str, jf.Strategy]:
    """The paper's grid in the proportions of its tables, T = 1024 there and 196 here, and what the report proposes."""
    tough, length = report.tough_blocks[0], report.num_tokens
    rest = max(count for block, count in enumerate(report.slowest_sweeps("noise", 1e-2)) if block != tough)
    names = ["Jacobi-30", "Jacobi-60"]
    names += [f"[{tough}-{length}-1-{other}]" for other in (rest - 2, rest, 2 * rest)]
    for sweeps in (length // 4, length // 2, length):  # G x J, as 128 and 256 of 1024 in the paper, and as many as T
        names += [f"[{tough}-{count}-{sweeps // count}-{rest}]" for count in (1, 2, 4, 8, 16)]
    found = {name: jf.Strategy.parse(name, report) for name in names}
    for tolerance in (1e-1, 1e-2):
        plan = jf.Strategy.from_report(report, tolerance)
        found.setdefault(str(plan), plan)
        plan = jf.Strategy.from_report(report, tolerance, per_segment=True)
        each, others = (plan.solvers[i].stopping.max_sweeps for i in (tough, 0))
        if isinstance(each, tuple):
            counts = "/".join(map(str, each))
            found[f"block {tough} in {len(each)} segments of {counts} sweeps, {others} elsewhere"] = plan
    return found


def measure(flow: jf.TarFlow, plans: dict[str, jf.Strategy], batch: int) -> list[dict[str, Any]]:
    """A row per strategy: seconds, rate, network calls, and the error paired with the sequential loop's images."""
    z, labels = latents(flow, batch)
    runs = {EAGER: partial(IN_PYTORCH.run, partial(draw, flow, z, labels, "sequential"))}
    runs |= {name: partial(draw, flow, z, labels, plan) for name, plan in plans.items()}
    found = compare(flow, z, labels, runs, repeats=REPEATS[batch])
    rows = []
    for row in found.rows:
        entry = {
            "batch": batch, "strategy": NAMES.get(row.strategy, row.strategy), "seconds": row.seconds.median,
            "seconds_min": row.seconds.min, "seconds_max": row.seconds.max,
            "rate": found.speed_up(row, GROWING_CACHE), "max_error": row.error.max, "mean_error": row.error.mean,
        }  # fmt: skip
        if row.samples is not None:
            entry |= {"network_calls": row.network_calls, "token_evaluations": row.token_evaluations}
        rows.append(entry)
    return rows


def main() -> None:
    """Measure, write."""
    flow = jf.TarFlow.from_pretrained("fashion-p2").requires_grad_(False)
    report = jf.Report.load(REPORT)
    report.check(flow)
    plans, rows = settings(report), []
    for batch in BATCHES:
        rows += measure(flow, plans, batch)
        for row in rows[-len(plans) - 3 :]:  # with the loops
            cost = f"{row['seconds']:.3f} s  {row['rate']:.2f}x"
            print(f"  {batch:3d} {row['strategy']:60s} {cost}  {row['max_error']:.1e}", flush=True)
    write_json(RESULTS / "strategies.json", {"command": "python benchmarks/strategies.py", "model": "fashion-p2",
                                             "machine": machine(), "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
