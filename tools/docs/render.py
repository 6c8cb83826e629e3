"""Fills the marked regions of the pages from result files: `python -m tools.docs.render`, or `make render`.

A region names a template of tools/docs/templates and the results that it shows, or a value:

    <!-- render comparison emoji-p2-comparison --> ... <!-- end -->
    <!-- render = "%.1f" % result("emoji-features").test_accuracy --> ... <!-- end -->

A result is a file of docs/results without its ending, or MODEL/report, the report of a bundled model. Jinja templates
get the results as `results`, the first as `result`, and reports by model as `reports`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import torch

import jacobiflow as jf
from benchmarks import MODELS, RESULTS, ROOT, regimes, search_guidance
from benchmarks.lib.results import Json, parser
from jacobiflow.calibration import rank_correlation
from jacobiflow.calibration.convergence import TOLERANCES
from jacobiflow.utils.files import write_atomically
from tools.docs import paper_facts

REGION = re.compile(r"(<!-- render (?P<source>[^>]+?) -->)(?P<text>.*?)(<!-- end -->)", re.DOTALL)
SAMPLERS = {  # as the pages call them, by their names in results
    "Original": "original sampler",
    "growing cache": "original sampler",
    "sequential": "exact loop",
    "sequential, in PyTorch": "exact loop, in PyTorch",
}
MEASURES = {"fashion_fid": "fashion-FID", "emoji_fid": "emoji-FID", "pixel_distance": "Fréchet distance of the pixels"}


def pages() -> list[Path]:
    """All pages of the documentation and the model cards."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(MODELS.glob("*/README.md"))]


def render(page: str) -> str:
    """The text of a page with its regions filled."""
    return REGION.sub(lambda match: f"{match[1]}{_fill(match['source'])}{match[4]}", page)


def _fill(source: str) -> str:
    if source.startswith("="):
        return _environment().from_string(f"{{{{ {source[1:].strip()} }}}}").render()
    template, *names = source.split()
    reports = {name.removesuffix("/report"): result(name) for name in names if name.endswith("/report")}
    results = [result(name) for name in names if not name.endswith("/report")]
    values = {"reports": reports, "results": results, "result": next(iter(results), None)}
    text = _environment().get_template(f"{template}.md").render(values)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"\n\n{text}\n\n"


@cache
def result(name: str) -> Any:
    if name.endswith("/report"):
        return jf.CalibrationReport.load(MODELS / f"{name}.json")
    return json.loads((RESULTS / f"{name}.json").read_text())


def has_result(name: str) -> bool:
    """True if a result was measured."""
    return (RESULTS / f"{name}.json").exists()


def format_speed_up(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


def duration(seconds: float) -> str:
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{2 if seconds < 1e-3 else 1}f} ms"


def grouped(rows: Iterable[Any], *keys: str) -> list[tuple[tuple[Any, ...], list[Any]]]:
    """Rows with equal values of the keys together, in the order in which these first occur."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [*groups.items()]


def where(rows: Iterable[Any], /, **values: Any) -> Any:
    """The first row with these values; undefined if there is none."""
    return next((row for row in rows if values.items() <= row.items()), jinja2.Undefined())


def strategy(comparison: Json, name: str) -> Any:
    return where(comparison["rows"], strategy=name)


def fastest(comparison: Json, name: str, bound: float | None) -> Any:
    """The fastest row of a sampler, of all its settings, whose largest error is at most `bound`; None if none is."""
    rows = [row for row in comparison["rows"] if row["strategy"].split(" | ")[0] == name]
    near = [row for row in rows if bound is None or row["error"]["max"] <= bound]
    return min(near, key=lambda row: row["seconds"]["median"], default=None)


def largest_error_ratio(name: str) -> str:
    """The largest ratio, over the flows of 100 rows, of the error of the accelerated call to that of the library."""
    errors = [run["error"] for run in result(name)["runs"] if run["rows"] == 100 and run["error"]]
    return f"{max(error['accelerated'] / error['library'] for error in errors):.1f}"


@cache
def paper_megabytes() -> tuple[float, float]:
    """The least and the largest weights of a block of the paper's models, in MB."""
    sizes = []
    for preset in jf.PRESETS.values():
        with torch.device("meta"):
            block = jf.TarFlow(preset.config).blocks[0]
        sizes.append(sum(parameter.nbytes for parameter in block.parameters()) / 1e6)
    return min(sizes), max(sizes)


def recommendation(search: Json) -> str:
    """Returns the recommended settings of a search, and their distance to real images."""
    rows, settings = search["runs"], search_guidance.recommended(search["runs"])
    guidance, rate = settings.guidance or jf.Guidance(0.0), settings.denoise
    weight, temperature = guidance.weight, guidance.attn_temperature
    distance = where(rows, weight=weight, attn_temperature=temperature, denoise=rate)["distance"]
    plain = where(rows, weight=0, attn_temperature=1, denoise=0)["distance"]
    parts = [f"guidance of weight {weight:g} at attention temperature {temperature:g}"] * bool(settings.guidance)
    parts += [f"denoising rate {rate:g}"] * bool(rate)
    text = f"{MEASURES[rows[0]['measure']]} {distance:.3f} of {rows[0]['num']:,} samples"
    return f"{', '.join(parts)}: {text}, {plain:.3f} without" if parts else f"none: {text}"


def find_runs(name: str, **values: Any) -> list[Json]:
    """The runs of a result that have these values; a tuple lists several values."""
    accepted = {key: value if isinstance(value, tuple) else (value,) for key, value in values.items()}
    return [run for run in result(name)["runs"] if all(run.get(key) in accepted[key] for key in accepted)]


def speed_up_range(name: str, **values: Any) -> str:
    """The range of the speed-ups of a result's runs with these values, such as "5 to 150"."""
    return paper_facts.number_range([run["speed_up"] for run in find_runs(name, **values)], ".0f")


def largest_speed_up(name: str, **values: Any) -> str:
    """The largest of the speed-ups of a result's runs with these values."""
    return f"{max(run['speed_up'] for run in find_runs(name, **values)):.0f}"


def ratios(name: str, slow: str, fast: str, **values: Any) -> list[float]:
    """How many times as long one way takes as another, in each run of a result with these values that has both."""
    timed = [run["seconds"] for run in find_runs(name, **values) if {slow, fast} <= run.get("seconds", {}).keys()]
    return [seconds[slow]["median"] / seconds[fast]["median"] for seconds in timed]


def star_follows(name: str, group: str) -> str:
    """The share of guided samples of a category of captions that are nearest to the emoji of their caption."""
    return f"{where(result(name)['runs'], follows='guided')['groups'][group]['nearest']:.0%}"


@cache
def _environment() -> jinja2.Environment:
    templates = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=templates, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    functions = {function.__name__: function for function in (
        paper_facts.agreement, paper_facts.best_guess, paper_facts.mean_sweeps, paper_facts.number_range,
        paper_facts.segment_sweeps, paper_facts.sweeps_range, paper_facts.tough_share, duration, fastest,
        find_runs, format_speed_up, grouped, has_result, largest_error_ratio, largest_speed_up,
        paper_megabytes, rank_correlation, ratios, recommendation, regimes.best_in_passes,
        regimes.in_passes, result, search_guidance.best_point, speed_up_range, star_follows, strategy, where,
    )}  # fmt: skip
    environment.globals |= functions | {
        "calls": {"sampling": "inverse", "density": "`log_prob`"},
        "measures": MEASURES,
        "starts": [*product(("images", "noise"), TOLERANCES)],
    }
    environment.filters |= functions | {
        "code": "`{}`".format,
        "start": lambda start: f"{start[0]}, {start[1]:g}",
        "sampler": lambda name: SAMPLERS.get(name, name),
    }
    return environment


if __name__ == "__main__":
    parser(__doc__).parse_args()
    for path in pages():
        text = path.read_text()
        if (rendered := render(text)) != text:
            write_atomically(path, rendered.encode())
