"""The paper's strategies for a bundled model, as its Tables 3 and 4: `python -m benchmarks.strategies MODEL`.

Writes docs/results/MODEL-strategies.json, from one interleaved run per batch size. Guesses are by IGM, from the report
that `make calibration` writes. Peers are at their published settings; `auto` is certified, as it is in use. Batches of
64 are drawn by the loops and by `auto` only. Needs an otherwise idle machine; fashion-p2 takes about 10 minutes on two
cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

import jacobiflow as jf
from benchmarks.common import IN_PYTORCH, MODELS, RESULTS, in_pytorch, latents, without_native
from benchmarks.peers import PEERS, PeerSamples
from benchmarks.performance import draw
from benchmarks.quality import ORIGINAL
from jacobiflow.baselines import GROWING_CACHE
from jacobiflow.calibration import gs_jacobi_notation
from jacobiflow.comparison import compare
from jacobiflow.files import write_json
from jacobiflow.measuring import machine
from jacobiflow.memory import keep_freed_memory
from jacobiflow.strategy import auto

BATCHES, LARGE = (1, 4, 16), 64
REPEATS = {1: 5, 4: 3, 16: 3, LARGE: 3}
NAMES = {GROWING_CACHE: ORIGINAL}
NO_LOOP = "auto, without the native loop"
AUTOS = {"auto:1e-1": 1e-1, "auto:1e-2": 1e-2, "auto": 1e-3}


def stacked(report: jf.Report) -> list[int]:
    """The tough blocks by CRM, the toughest first; if it calls none so, the one that takes the most sweeps."""
    if report.tough_blocks:
        return sorted(report.tough_blocks, key=lambda block: -report.crm[block])
    return [max(range(report.num_blocks), key=report.mean_sweeps("noise", 1e-2).__getitem__)]


def grid(report: jf.Report) -> list[str]:
    """The settings of the paper's Tables 3 and 4, with numbers of segments and sweeps in proportion to T.

    The stacked blocks token by token; in segments, all alike, of G x J = T/4, T/2 and T sweeps in all; and where there
    are several, instead of T, as in Table 4b the toughest token by token or in 16 segments, and the others in fewer. J
    is rounded down.
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


def settings(report: jf.Report) -> dict[str, jf.Strategy]:
    """By name, the paper's grid, and what the report proposes, with a number of sweeps for all segments or each."""
    plans = {name: jf.Strategy.parse(name, report) for name in grid(report)}
    for tolerance in (1e-1, 1e-2):
        for per_segment in (False, True):
            name = gs_jacobi_notation(report, tolerance, per_segment=per_segment)
            plans.setdefault(name, jf.Strategy.parse(name, report))
    return plans


def measure(flow: jf.TarFlow, report: jf.Report, batch: int) -> list[dict[str, Any]]:
    """A row per strategy: seconds, rate, network calls, and the error paired with the sequential loop's images."""
    z, labels = latents(flow, batch)
    runs: dict[str, Callable[[], Any]] = {
        IN_PYTORCH: in_pytorch(partial(draw, flow, z, labels, "sequential")),
    }
    if batch < LARGE:
        runs |= {name: partial(draw, flow, z, labels, plan) for name, plan in settings(report).items()}
        runs |= {name: partial(images, peer, flow, z, labels) for name, peer in PEERS.items()}
    with without_native():
        plan = jf.plan(flow, batch_size=batch)
    runs[NO_LOOP] = in_pytorch(partial(draw, flow, z, labels, plan, certify=True))
    for name, tolerance in AUTOS.items():
        runs[name] = partial(draw, flow, z, labels, auto(flow, batch, tolerance), certify=True)
    comparison = compare(flow, z, labels, runs, repeats=REPEATS[batch])
    rows = []
    for row in comparison.rows:
        entry = {
            "batch": batch, "strategy": NAMES.get(row.strategy, row.strategy), "seconds": row.seconds.median,
            "seconds_min": row.seconds.min, "seconds_max": row.seconds.max,
            "rate": comparison.speed_up(row, GROWING_CACHE), "max_error": row.error.max, "mean_error": row.error.mean,
        }  # fmt: skip
        if row.samples is not None:
            entry |= {
                "network_calls": row.samples.network_calls, "token_evaluations": row.samples.token_evaluations,
            }  # fmt: skip
        rows.append(entry)
    return rows


def images(peer: Callable[..., PeerSamples], *arguments: Any) -> Tensor:
    """Images by the sampler of another paper."""
    return peer(*arguments).images


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a bundled TarFlow, such as fashion-p2")
    model = parser.parse_args().model
    flow = jf.TarFlow.from_pretrained(model).requires_grad_(False)
    report = jf.Report.load(MODELS / model / "report.json")
    report.check(flow)
    rows = []
    for batch in (*BATCHES, LARGE):
        new = measure(flow, report, batch)
        for row in new:
            cost = f"{row['seconds']:.3f} s  {row['rate']:.2f}x"
            print(f"  {batch:3d} {row['strategy']:60s} {cost}  {row['max_error']:.1e}", flush=True)
        rows += new
    write_json(
        RESULTS / f"{model}-strategies.json",
        {"command": f"python -m benchmarks.strategies {model}", "model": model, "machine": machine(), "rows": rows},
    )


if __name__ == "__main__":
    keep_freed_memory()
    main()
