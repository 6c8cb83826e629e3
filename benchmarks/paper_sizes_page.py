"""What docs/performance.md estimates for the paper's models on a CPU; `performance_page.py` puts it there.

Seconds of a block are a product of two factors: seconds of a step, a window or a pass at the model's own size
(paper-sizes.json), and how many of them a block needs, by the bundled reports of our trained models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filling import measured_on, table
from paper_sizes import DTYPES, WINDOWS, name_of, run_name
from regimes import FUSED, TRAINED
from regimes_page import seconds_of

import jacobiflow as jf
from jacobiflow.baselines import GROWING_CACHE

MODELS = Path(jf.__file__).resolve().parent / "models"
TOLERANCE = 1e-3
EAGER = "loop in PyTorch"
Counts = list[tuple[int, ...]]  # sweeps: of each block, of each sample


class Sweeps(NamedTuple):
    """A way to sweep a block: so many sweeps of all tokens in bfloat16, then windows of `size`, 0 for all tokens."""

    coarse: int
    size: int

    def __str__(self) -> str:
        if self.coarse:
            return f"all, after {self.coarse} in bfloat16"
        return f"windows of {self.size}" if self.size else "all tokens"


class Term(NamedTuple):
    """So many blocks that each take so many times something that takes `seconds`."""

    blocks: int
    times: float
    what: str
    seconds: float

    def __str__(self) -> str:
        milliseconds = self.seconds * 1e3
        each = f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
        return f"{self.blocks} x {self.times:,.4g} {self.what} x {each}"


def total(terms: Iterable[Term]) -> float:
    """Seconds of all terms."""
    return sum(term.blocks * term.times * term.seconds for term in terms)


def joined(terms: Sequence[Term]) -> list[Term]:
    """The same sum, blocks that take the same in one term; certificates last."""
    blocks = Counter[tuple[float, str, float]]()
    for term in sorted(terms, key=lambda term: term.what == "certificate"):
        blocks[term[1:]] += term.blocks
    return [Term(count, *rest) for rest, count in blocks.items()]


# --------------------------------------------------------------------------------------------------------- factor two


def slowest_of(counts: Sequence[int], batch: int) -> float:
    """The expected largest of `batch` draws, with replacement, from n counts; their mean where `batch` is 1.

    The i-th smallest is the largest of the draws with probability (i/n)^batch - ((i-1)/n)^batch.
    """
    n = len(counts)
    return sum(c * ((i / n) ** batch - ((i - 1) / n) ** batch) for i, c in enumerate(sorted(counts), 1))


def mean_slowest(counts: Counts, batch: int) -> float:
    """The mean over blocks of `slowest_of`."""
    return sum(slowest_of(block, batch) for block in counts) / len(counts)


def slow_blocks(report: jf.Report) -> list[int]:
    """The tough blocks by CRM that take more sweeps than every block that is not; CRM can call an easy one tough."""
    sweeps = report.mean_sweeps("noise", TOLERANCE)
    others = [count for i, count in enumerate(sweeps) if i not in report.tough_blocks]
    return [i for i in report.tough_blocks if sweeps[i] > max(others, default=0.0)]


def counted(report: jf.Report, tough: bool) -> dict[Sweeps, Counts]:
    """Sweeps to `TOLERANCE` of the tough blocks, or of the others, by the ways that all of these were tried in."""
    assert report.tuning is not None
    length, slow, blocks = report.num_tokens, slow_blocks(report), []
    for i, block in enumerate(report.tuning.blocks):
        if (i in slow) == tough:
            found = {}
            for run in (run for run in block.runs if run.tolerance == TOLERANCE):
                size = run.partition.stop(0, length)
                way = Sweeps(run.coarse, 0 if size == length else size)
                if not way.size or (way.size in WINDOWS and not way.coarse):
                    found[way] = run.sweeps
            blocks.append(found)
    shared = [way for way in blocks[0] if all(way in found for found in blocks)]
    return {way: [found[way] for found in blocks] for way in sorted(shared)}


# -------------------------------------------------------------------------------------------------------- the estimate


def stacked(preset: jf.Preset) -> Counter[tuple[int, int]]:
    """Blocks of the paper's strategy by the tokens that they sweep together, and how many such sweeps they make."""
    config = preset.config
    plan = jf.Strategy.parse(preset.strategy, num_blocks=config.num_blocks, num_tokens=config.num_tokens)
    found = Counter[tuple[int, int]]()
    for solver in plan.solvers:
        size, sweeps = solver.partition.stop(0, config.num_tokens), solver.stopping.max_sweeps
        assert isinstance(sweeps, int)
        found[size, sweeps * config.num_tokens // size] += 1
    return found


def tough_blocks(preset: jf.Preset) -> int:
    """How many blocks the paper's strategy cuts into segments."""
    return sum(n for (size, _), n in stacked(preset).items() if size < preset.config.num_tokens)


def by_steps(preset: jf.Preset, name: str, seconds: Mapping[str, float]) -> list[Term]:
    """A loop over all tokens of all blocks."""
    return [Term(preset.config.num_blocks, preset.config.num_tokens, "steps", seconds[name])]


def by_paper(preset: jf.Preset, seconds: Mapping[str, float], dtype: str = "float32") -> list[Term]:
    """The sweeps of the paper's strategy."""
    length = preset.config.num_tokens
    return [
        Term(blocks, count, "passes" if size == length else f"windows of {size}", seconds[run_name(dtype, size)])
        for (size, count), blocks in sorted(stacked(preset).items())
    ]


def cheapest(
    report: jf.Report, tough: bool, blocks: int, length: int, batch: int, seconds: Mapping[str, float]
) -> list[Term]:
    """`blocks` blocks of `length` tokens by the cheapest way in which the report has sweeps, and the certificate.

    In a tough block convergence is a front, and a window passes as many tokens in a sweep as in the trained block: its
    sweeps are in proportion to the tokens. Elsewhere all tokens converge together, and sweeps of all of them are as
    many as in the trained block.
    """
    choices: list[list[Term]] = []
    one_pass = seconds[run_name("float32", length)]
    for way, counts in counted(report, tough).items():
        count = mean_slowest(counts, batch)
        if way.size:
            window = seconds[run_name("float32", way.size)]
            choices.append([Term(blocks, count * length / report.num_tokens, str(way), window)])
        elif not tough:
            low = Term(blocks, way.coarse, "passes in bfloat16", seconds[run_name("bfloat16", length)])
            whole = Term(blocks, count, "passes", one_pass)
            choices.append([*([low] if way.coarse else []), whole])
    return [*min(choices, key=total), Term(blocks, 1, "certificate", one_pass)]


def by_sweeps(preset: jf.Preset, report: jf.Report, batch: int, seconds: Mapping[str, float]) -> list[list[Term]]:
    """Sweeps in the tough blocks, and in the others."""
    tough, length = tough_blocks(preset), preset.config.num_tokens
    kinds = ((True, tough), (False, preset.config.num_blocks - tough))
    return [cheapest(report, kind, blocks, length, batch, seconds) for kind, blocks in kinds]


def mixed(preset: jf.Preset, report: jf.Report, batch: int, seconds: Mapping[str, float]) -> list[Term]:
    """The cheaper of the fused loop and of sweeps, in the tough blocks and in the others."""
    found = []
    for swept in by_sweeps(preset, report, batch, seconds):
        loop = [Term(swept[0].blocks, preset.config.num_tokens, "steps", seconds[FUSED])]
        found += min(loop, swept, key=total)
    return joined(found)


def estimates(preset: jf.Preset, run: Mapping[str, Any], models: Mapping[str, jf.Report]) -> dict[str, list[Term]]:
    """What a model of the paper takes by each way, at the batch size of `run`. Those of the paper come last."""
    batch, seconds = run["batch_size"], seconds_of(run)
    loops = {GROWING_CACHE: GROWING_CACHE, EAGER: run_name("float32", 1), FUSED: FUSED}
    found = {way: by_steps(preset, name, seconds) for way, name in loops.items()}
    for model, report in models.items():
        swept = [term for terms in by_sweeps(preset, report, batch, seconds) for term in terms]
        found[f"sweeps of {model}"] = joined(swept)
        found[f"{FUSED} or sweeps of {model}"] = mixed(preset, report, batch, seconds)
    for dtype in DTYPES:
        found[f"`{preset.strategy}` in {dtype}"] = by_paper(preset, seconds, dtype)
    return found


# ------------------------------------------------------------------------------------------------------------ the page


def reports() -> dict[str, jf.Report]:
    """Those of our trained models."""
    return {name: jf.Report.load(MODELS / name / "report.json") for name in TRAINED}


def block_table(result: Mapping[str, Any]) -> str:
    """Factor one: milliseconds of a block in each shape."""
    lines = []
    for run in result["runs"]:
        seconds, sizes = seconds_of(run), (1, *WINDOWS, run["tokens"])
        pairs = {size: [seconds[run_name(dtype, size)] for dtype in DTYPES] for size in sizes}
        in_steps = [window / step for step, window in zip(pairs[1], pairs[64], strict=True)]
        lines.append([
            f"{run['channels']} x {run['layers']}", str(run["tokens"]), str(run["batch_size"]),
            *(f"{seconds[name] * 1e3:.1f}" for name in (GROWING_CACHE, FUSED)),
            *(" / ".join(f"{each * 1e3:,.1f}" for each in pair) for pair in pairs.values()),
            " / ".join(f"{each:.2f}" for each in in_steps),
        ])  # fmt: skip
    steps = [f"{name}, a step" for name in (GROWING_CACHE, FUSED, EAGER)]
    windows = [f"window of {size}" for size in WINDOWS]
    return table(["channels x layers", "T", "batch", *steps, *windows, "pass", "window of 64, in steps"], lines)


def sweep_table(models: Mapping[str, jf.Report], batches: Sequence[int]) -> str:
    """Factor two: sweeps of the slowest sample of a batch."""
    found = {(name, tough): counted(report, tough) for name, report in models.items() for tough in (True, False)}
    ways = sorted({way for ways in found.values() for way in ways}, key=lambda way: (way.size, way.coarse))
    lines = []
    for (name, tough), counts in found.items():
        cells = (" / ".join(f"{mean_slowest(counts[w], b):.1f}" for b in batches) if w in counts else "" for w in ways)
        kind = "tough" if tough else "others"
        blocks = f"{len(next(iter(counts.values())))} {kind}"
        lines.append([name, str(models[name].num_tokens), blocks, *cells])
    return table(["model", "T", "blocks", *map(str, ways)], lines)


def timed(name: str, result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs of the shape of a model of the paper."""
    shape = name_of(jf.PRESETS[name].config)
    return sorted((run for run in result["runs"] if run["name"] == shape), key=lambda run: run["batch_size"])


def estimate_table(name: str, result: Mapping[str, Any], models: Mapping[str, jf.Report]) -> str:
    """Seconds of a model of the paper by each way, and the factors that they are the product of."""
    preset = jf.PRESETS[name]
    columns = {run["batch_size"]: estimates(preset, run, models) for run in timed(name, result)}
    lines = []
    for way in next(iter(columns.values())):
        cells = [way]
        for found in columns.values():
            seconds, base = total(found[way]), total(found[GROWING_CACHE])
            cells.append("<br>".join([f"**{seconds:,.1f} s** ({base / seconds:.1f}x)", *map(str, found[way])]))
        lines.append(cells)
    config = preset.config
    title = f"`{name}`, {config.num_blocks} blocks of {config.channels} x {config.layers_per_block}, T = "
    title += f"{config.num_tokens}, {tough_blocks(preset)} tough:"
    return f"{title}\n\n{table(['way', *(f'batch {batch}' for batch in columns)], lines)}"


def best_table(result: Mapping[str, Any], models: Mapping[str, jf.Report]) -> str:
    """The fastest way of each model of the paper that keeps the tolerance."""
    batches, lines = sorted({run["batch_size"] for run in result["runs"]}), []
    for name, preset in jf.PRESETS.items():
        cells = dict.fromkeys(batches, "")
        for run in timed(name, result):
            found = {way: total(terms) for way, terms in estimates(preset, run, models).items() if "`" not in way}
            best = min(found, key=found.__getitem__)
            rate = found[GROWING_CACHE] / found[best]
            cells[run["batch_size"]] = f"{best}: {found[best]:,.1f} s ({rate:.1f}x)"
        lines.append([name, *cells.values()])
    return table(["model of the paper", *(f"batch {batch}" for batch in batches)], lines)


def parts(result: Mapping[str, Any]) -> dict[str, str]:
    """The page's parts, by their marks."""
    models, batches = reports(), sorted({run["batch_size"] for run in result["runs"]})
    shown = [estimate_table(name, result, models) for name in jf.PRESETS if timed(name, result)]
    return {
        "paper sizes": f"{measured_on(result['machine'])}\n\n{block_table(result)}",
        "paper sweeps": sweep_table(models, batches),
        "paper best": best_table(result, models),
        "paper estimate": "\n\n".join(shown),
    }
