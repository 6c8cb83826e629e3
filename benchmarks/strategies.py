"""Times the paper's strategies for a bundled model, its Tables 3 and 4: `python -m benchmarks.strategies MODEL`.

Writes docs/results/MODEL-strategies.json, which fills docs/paper.md, from one interleaved run per batch size, in
ten minutes on two cores that are otherwise idle. Guesses are by IGM, from the report that `make calibration` writes.
Peers are at their published settings; `auto` is certified.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jacobiflow as jf
from benchmarks.common import IN_PYTORCH, MODELS, RESULTS, Json, latents, origin, parser, without_native
from benchmarks.peers import PEERS
from benchmarks.performance import WITHOUT_LOOP, images, sample
from benchmarks.quality import ORIGINAL
from jacobiflow.calibration import gs_jacobi_notation
from jacobiflow.comparison.baselines import GROWING_CACHE
from jacobiflow.comparison.compare import compare_samplers
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.planner import auto
from jacobiflow.utils.files import write_json

LARGE = 64  # The batch at which the strategies of the paper take too long.
REPEATS = {1: 5, 4: 3, 16: 3, LARGE: 3}
AUTOS = {"auto:1e-1": 1e-1, "auto:1e-2": 1e-2, "auto": 1e-3}


def stacked(report: jf.CalibrationReport) -> list[int]:
    """The tough blocks by CRM, the toughest first; if there is none, the block that takes the most sweeps."""
    if report.tough_blocks:
        return sorted(report.tough_blocks, key=lambda block: -report.crm[block])
    return [max(range(report.num_blocks), key=report.mean_sweeps("noise", 1e-2).__getitem__)]


def grid(report: jf.CalibrationReport) -> list[str]:
    """The settings of the paper's Tables 3 and 4, with numbers of segments and sweeps in proportion to T.

    Tough blocks are solved token by token, or in G segments of J sweeps, G x J = T/4, T/2 or T. If there are several, T
    is replaced by Table 4b: the toughest is solved token by token or in 16 segments, the others in fewer. J is rounded
    down.
    """
    toughest, *others = blocks = stacked(report)
    slowest, length = report.slowest_sweeps("noise", 1e-2), report.num_tokens
    rest = max(count for block, count in enumerate(slowest) if block not in blocks)

    def name(first: tuple[int, int], other: tuple[int, int], elsewhere: int = rest) -> str:
        pairs = [first if block == toughest else other for block in sorted(blocks)]
        fields = [
            "/".join(map(str, values if len(set(values)) > 1 else values[:1])) for values in zip(*pairs, strict=True)
        ]
        return f"[{'-'.join(['/'.join(map(str, sorted(blocks))), *fields, str(elsewhere)])}]"

    def cut(count: int, total: int) -> tuple[int, int]:
        return count, total // count

    whole, few, more = (length, 1), length // 4, 3 * length // 8
    names = ["Jacobi-30", "Jacobi-60", *(name(whole, whole, n) for n in (max(rest - 2, 1), rest, 2 * rest))]
    for total in (few, length // 2, *[length] * (not others)):
        names += [name(cut(count, total), cut(count, total)) for count in (1, 2, 4, 8, 16)]
    if others:
        names += [name(whole, cut(count, few)) for count in (1, 2, 4, 8)]
        names += [name(whole, cut(count, more)) for count in (4, 8)]
        names += [name(cut(16, eighths * length // 8), cut(8, more)) for eighths in (4, 5, 6)]
    return list(dict.fromkeys(names))


def plans_of(report: jf.CalibrationReport) -> dict[str, jf.Strategy]:
    """The grid by name, and what the report proposes, with a number of sweeps for all segments or each."""
    names = grid(report)
    for tolerance in (1e-1, 1e-2):
        names += [gs_jacobi_notation(report, tolerance, per_segment=each) for each in (False, True)]
    return {name: jf.Strategy.parse(name, report) for name in names}


def measure(flow: jf.TarFlow, report: jf.CalibrationReport, batch: int) -> list[Json]:
    """A row per strategy: seconds, rate, network calls, and the error against the exact loop's images."""
    z, labels = latents(flow, batch)
    runs: dict[str, Callable[[], Any]] = {
        IN_PYTORCH: without_native()(partial(sample, flow, "sequential", z, labels)),
    }
    if batch < LARGE:
        runs |= {name: partial(sample, flow, plan, z, labels) for name, plan in plans_of(report).items()}
        runs |= {name: partial(images, peer, flow, z, labels) for name, peer in PEERS.items()}
    with without_native():
        plan = jf.plan(flow, batch_size=batch)
    runs[WITHOUT_LOOP] = without_native()(partial(sample, flow, plan, z, labels, certify=True))
    for name, tolerance in AUTOS.items():
        runs[name] = partial(sample, flow, auto(flow, batch, tolerance), z, labels, certify=True)
    comparison = compare_samplers(flow, z, labels, runs, repeats=REPEATS[batch])
    rows = []
    for row in comparison.results:
        rate, name = comparison.speed_up(row, GROWING_CACHE), row.strategy
        entry = {
            "batch": batch, "strategy": ORIGINAL if name == GROWING_CACHE else name, "seconds": row.seconds.median,
            "seconds_min": row.seconds.min, "seconds_max": row.seconds.max, "rate": rate,
            "max_error": row.error.max, "mean_error": row.error.mean,
        }  # fmt: skip
        if row.samples is not None:
            entry |= {
                "network_calls": row.samples.network_calls, "token_evaluations": row.samples.token_evaluations,
            }  # fmt: skip
        rows.append(entry)
        print(f"  {batch:3d} {name:60s} {row.seconds.median:.3f} s  {rate:.2f}x  {row.error.max:.1e}", flush=True)
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", help="a bundled TarFlow, such as fashion-p2")
    model = arguments.parse_args().model
    flow = jf.TarFlow.from_pretrained(model).requires_grad_(False)
    report = jf.CalibrationReport.load(MODELS / model / "report.json")
    report.check(flow)
    rows = [row for batch in REPEATS for row in measure(flow, report, batch)]
    write_json(RESULTS / f"{model}-strategies.json", {**origin(measure), "model": model, "rows": rows})


if __name__ == "__main__":
    keep_freed_memory()
    main()
