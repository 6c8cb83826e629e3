"""`jacobiflow bench`: time and error of each strategy on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jacobiflow.cli import loading, options
from jacobiflow.cli.output import format_count, progress_bar, show_table, to_json
from jacobiflow.utils.provenance import Provenance

if TYPE_CHECKING:
    from jacobiflow.comparison.compare import Comparison, SamplerResult
    from jacobiflow.models.flow import Flow
    from jacobiflow.utils.progress import Progress
    from jacobiflow.utils.timing import Timing

_FIGURE, _TABLE = "bench.png", "bench.json"
_LEGEND = """over: speed-up over the model's original sampler, and over the exact loop
evals/token: evaluations of a block's network, for each token of each sample
max error: largest difference from the exact loop's samples
residual: the largest |g(x) - x|; exact: every block was solved token by token
*: not certified: the strategy stops after a fixed number of sweeps"""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(options.Config):
    """Time strategies and measure their errors.

    The strategies, the original sampler and the exact loop run in turn on the same latents. Errors are differences
    from the samples of the exact loop.

    Example: jacobiflow bench --model digits-p1 --strategy jacobi --strategy "[2-4-5-6]" --repeats 3

    Attributes:
        strategy: A strategy as in jacobiflow sample; may be repeated. The original sampler, the exact loop and an
            encoding pass are always timed.
        batch_size: Samples solved together; may be repeated.
        repeats: Number of timed rounds, after one that warms up.
        certify: Certify the samples, within the measured time.
        out: Folder for bench.png and bench.json.
    """

    model: options.Model = "fashion-p2"
    strategy: Annotated[
        tuple[Annotated[str, options.STRATEGY], ...], options.SPEED, options.REPEATABLE
    ] = ("auto", "jacobi")  # fmt: skip
    batch_size: Annotated[
        tuple[Annotated[int, options.within(1, options.MAX_BATCH_SIZE)], ...], options.SPEED, options.REPEATABLE
    ] = (1, 4, 16)  # fmt: skip
    repeats: Annotated[int, options.MEASUREMENT, options.within(1)] = 5
    tolerance: options.Tolerance = None
    report: options.ReportFile = None
    labels: options.Labels = ("balanced",)
    seed: options.Seed = 0
    guidance: options.RecommendedGuidance = None
    plain: options.NoGuidance = False
    certify: Annotated[options.Flag, options.SPEED, options.NEGATABLE] = True
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    out: Annotated[Path, options.OUTPUT] = Path("out/bench")
    folder_kind = "benchmark"


@dataclass(frozen=True)
class BenchResult(Provenance):
    """Timings and errors of strategies.

    Attributes:
        settings: A line that names the guidance.
        native_loops: The instruction set of the native exact loops.
        comparisons: One for each batch size.
    """

    settings: str
    native_loops: str
    comparisons: tuple[Comparison, ...]


def run(config: BenchConfig) -> BenchResult:
    """Times the strategies, and writes the table and the figure."""
    from jacobiflow import native, plots
    from jacobiflow.models.contexts import Texts
    from jacobiflow.utils import files, timing

    flow = loading.load_model(config.model, config.device, config.dtype)
    has_context = config.labels != ("none",) and not isinstance(flow.context_kind, Texts)
    settings, origin = loading.resolve_settings(flow, config.guidance, 0.0, config.plain, has_context)
    flow = flow.guided(settings.guidance)
    with progress_bar() as progress:
        cases = _prepare(config, flow, progress)
        with files.locked(config.out):
            files.write_json(config.out / files.MANIFEST, {"kind": config.folder_kind, "files": [_FIGURE, _TABLE]})
            comparisons = tuple(case(progress=progress) for case in cases)
            result = BenchResult(
                origin, native.describe(), comparisons, machine=timing.describe_machine(flow.var.device)
            )
            plots.save_png(plots.bench_figure(comparisons), config.out / _FIGURE)
            files.write_json(config.out / _TABLE, to_json(config) | to_json(result))
    return result


def _prepare(config: BenchConfig, flow: Flow, progress: Progress | None) -> list[partial[Comparison]]:
    """Chooses the strategies, and returns a function for each batch size that times them."""
    from jacobiflow.comparison import baselines, compare
    from jacobiflow.models import latents
    from jacobiflow.sampling.request import SamplingRequest

    names = [name for name in dict.fromkeys(config.strategy) if name != baselines.SEQUENTIAL]
    strategies = {name: loading.load_strategy(name, config.report, flow) for name in names}
    cases = []
    for size in dict.fromkeys(config.batch_size):
        z = latents.draw_latents(size, flow.config.num_tokens, flow.config.token_dim, config.seed)
        classes = options.parse_labels(config.labels, size, flow, config.seed)
        runs = {}
        for name, strategy in strategies.items():
            request = SamplingRequest.resolve(
                flow, size, classes, settings=None, strategy=strategy, tolerance=config.tolerance,
                certify=config.certify, log_prob=False,
            )  # fmt: skip
            runs[name] = partial(replace(request, strategy=request.plan(size, progress)).run, z)
        cases.append(partial(compare.compare_samplers, flow, z, classes, runs, repeats=config.repeats))
    return cases


def show(config: BenchConfig, result: BenchResult) -> None:
    """Prints a table for each batch size."""
    machine = result.machine
    print(
        f"{config.model} on {machine['processor']}, {format_count(machine['cores'], 'core')}, "
        f"{format_count(machine['threads'], 'thread')}, device {machine['device']}, "
        f"PyTorch {machine['torch']}\nnative exact loops: {result.native_loops}\n{result.settings}"
    )
    for comparison in result.comparisons:
        _print_comparison(comparison)
    print(f"{_LEGEND}\nwrote {config.out / _FIGURE} and {config.out / _TABLE}")


def _print_comparison(comparison: Comparison) -> None:
    from jacobiflow.comparison.compare import ENCODING_PASS

    over = [f"over\n{comparison.title(name).removesuffix(' sampler')}" for name in comparison.baselines]
    columns = ("sampler", "median\nseconds", "min to\nmax", *over, "evals/\ntoken", "max\nerror", "residual")
    rows = []
    for row in comparison.results:
        evaluations = row.evaluations_per_token
        rows.append((
            comparison.title(row.strategy), *_seconds(row.seconds),
            *(f"{comparison.speed_up(row, name):.2f}" for name in comparison.baselines),
            "" if evaluations is None else f"{evaluations:.2f}",
            f"{row.error.max:.1e}" if row.error.max else "0", _residual(row),
        ))  # fmt: skip
    rows.append((ENCODING_PASS, *_seconds(comparison.encoding_pass), *[""] * (len(columns) - 3)))
    print(f"\nbatch size {comparison.batch_size}")
    show_table(columns, rows)


def _residual(row: SamplerResult) -> str:
    """Formats the largest residual, with an asterisk if the strategy has no tolerance."""
    if row.outcome is None or (row.outcome.residual is None and not row.outcome.is_exact):
        return ""
    return "exact" if row.outcome.is_exact else f"{row.outcome.residual:.1e}{'*' * (row.outcome.tolerance is None)}"


def _seconds(timing: Timing) -> tuple[str, str]:
    """Formats the median, and the range from the fastest to the slowest round."""
    least, median, most = (
        f"{seconds:.{3 if seconds < 10 else 1}f}" for seconds in (timing.min, timing.median, timing.max)
    )
    return median, f"{least}-{most}"
