"""`jacobiflow compare`: the quality of each strategy's samples beside its time, as in the paper's Tables 3 and 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from jacobiflow.baselines import PEERS, SEQUENTIAL, gs_jacobi_grid
from jacobiflow.calibration import find_report
from jacobiflow.cli import options, pages, paths
from jacobiflow.cli.progress import progress
from jacobiflow.cli.real_images import RealImages, real_images
from jacobiflow.cli.tables import show
from jacobiflow.data import scale
from jacobiflow.errors import InputValueError
from jacobiflow.evaluation import NAMES
from jacobiflow.evaluation.features import need_torchmetrics
from jacobiflow.experiments.quality import (
    FIGURES,
    ORIGINAL,
    Experiment,
    Row,
    begin,
    draw,
    finalists,
    largest_row,
    score,
    timings,
)
from jacobiflow.files import write_json
from jacobiflow.locking import locking
from jacobiflow.plots import Picture, Table, check_picture, comparison_figure, rows_sheet, save_png
from jacobiflow.storage import Processes, SampleFolder, processes, sizes

_SAMPLES = 10  # of each row, on the page of --html
_AUTOS = ("auto:1e-1", "auto:1e-2", "auto")


def compare(
    context: typer.Context,
    model: options.Model = "fashion-p2",
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            help="A row; give it again for each. As in jacobiflow sample, auto:1e-2 for a tolerance, or "
            f"{', '.join(PEERS)}. Default: the paper's grid for the model's tough blocks, both samplers, and auto at "
            "1e-1, 1e-2 and 1e-3. Original and sequential are there in any case.",
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", help="Samples per row.")] = 2000,
    final: Annotated[
        int | None,
        typer.Option(
            "--final",
            help="Then draw this many of Original, and of the fastest auto and the fastest other row within 1% of it.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images solved together.")] = 16,
    shard_size: Annotated[
        int | None, typer.Option("--shard-size", help="Images per shard, which is what a stopped run loses.")
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Rounds of timing that count, after one that does not.")
    ] = 3,
    report: options.ReportFile = None,
    labels: options.Labels = "balanced",
    seed: options.Seed = 0,
    guidance: options.GuidanceWeight = 0.0,
    guidance_on: options.GuidanceOn = "both",
    constant_guidance: options.ConstantGuidance = False,
    attn_temperature: options.AttnTemperature = 1.0,
    denoise: options.Denoise = 0.0,
    features: options.Features = "fashion",
    inception: options.Inception = None,
    images: options.RealImages = None,
    stats: options.Stats = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the comparison that is in the folder, and start again.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for comparison.json, comparison.png, and the samples.")
    ] = Path("out/comparison"),
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Compare strategies by the distance of their samples to real images, by their error, and by their time.

    All rows are timed first, in turn, and the time of the whole run is estimated. The same command again resumes a run
    that was stopped. Under torchrun, processes share the drawing, as for jacobiflow sample.

    Example: jacobiflow compare --model fashion-p2 --strategy "[7-8-32-10]" --strategy auto --num 200 --html page.html
    """
    paths.check(
        json, out, (*FIGURES, "settings.json", "timings.json", "rows", "exact", "plans"), html=html, model=model,
        strategy=strategy, labels=labels, report=report, images=images, stats=stats, inception=inception,
    )  # fmt: skip
    _check(num, final, batch_size, shard_size, repeats, features)
    shard_size = shard_size or max(512 // batch_size, 1) * batch_size
    with processes() as among, locking(out) as acquire:
        flow = options.load_model(model, among.device(device), dtype)
        guide = options.parse_guidance(guidance, guidance_on, constant_guidance, attn_temperature)
        path = report or find_report(flow, guide)
        found = None if path is None else options.load_report(path, flow)
        rows = strategy or [*gs_jacobi_grid(found, short=True), *PEERS, *_AUTOS]
        most = max(num, final or 0, 0 if overwrite else largest_row(out))
        experiment = Experiment(
            flow, out, tuple(dict.fromkeys((ORIGINAL, SEQUENTIAL, *rows))),
            options.parse_labels(labels, most, flow, seed), seed,
            guide, denoise, found, batch_size, shard_size, model,
        )  # fmt: skip
        run = _Run(
            experiment, among, cache(lambda: real_images(flow, features, inception, images, stats)), NAMES[features]
        )
        run.begin(acquire, repeats, overwrite)
        scored = run.table(experiment.names, num, 0)
        last = None if final is None else run.table(finalists(scored), final, num)
        if not among.rank:
            run.write(scored, last, json, html, context)


def _check(num: int, final: int | None, batch_size: int, shard_size: int | None, repeats: int, features: str) -> None:
    """**Raises** `ValueError` for numbers that do not go together, or features that nothing measures."""
    for option, value in (
        ("--num", num), ("--batch-size", batch_size), ("--repeats", repeats), ("--shard-size", shard_size),
        ("--final", final),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise InputValueError(f"{option} {value}: give a positive number")
    if num < 2:
        raise InputValueError(f"--num {num}: give at least 2, or there is no distance")
    if final is not None and final < num:
        raise InputValueError(f"--final {final}: give at least --num, {num}")
    if shard_size is not None and shard_size % batch_size:
        raise InputValueError(f"--shard-size {shard_size}: give a multiple of --batch-size, {batch_size}")
    sizes(final or num, batch_size, shard_size)
    if features not in NAMES:
        raise InputValueError(f"--features {features}: give one of {', '.join(NAMES)}")
    need_torchmetrics("compare")


@dataclass
class _Run:
    """The steps of an experiment, by the processes of one command; the first one times, scores and prints."""

    experiment: Experiment
    among: Processes
    real: Callable[[], RealImages]
    distance: str
    timings: dict[str, Any] = field(default_factory=dict)

    def begin(self, acquire: Callable[[], None], repeats: int, overwrite: bool) -> None:
        """Lock the folder by `acquire`, begin or resume in it, and time all rows."""

        def work() -> dict[str, Any]:
            picture = self.experiment.out / FIGURES[1]
            acquire()
            check_picture(picture)
            self.real()  # refuse bad input before anything is timed
            begin(self.experiment, overwrite)
            if overwrite:
                picture.unlink(missing_ok=True)
            with progress("timing", (repeats + 1) * len(self.experiment.names)) as advance:
                return timings(self.experiment, repeats, lambda _: advance(1))

        self.timings = self.among.once(work)

    def table(self, names: Sequence[str], num: int, drawn: int) -> list[Row]:
        """Draw `num` samples of each row, of which `drawn` are there already, and score them."""
        first = self.among.rank == 0
        if first:
            _estimate(names, self.timings, num - drawn)
        folders = {}
        # The exact images first, with which all others are compared, then the fastest rows.
        for name in sorted(names, key=lambda name: (name not in (ORIGINAL, SEQUENTIAL), self._seconds(name))):
            if first:
                print(f"drawing {name}", flush=True)
            folders[name] = draw(self.experiment, name, num, self.among)
        folders = {name: folders[name] for name in names}
        rows = self.among.once(lambda: self._scored(folders, num))
        if first:
            print()
            show(_table(rows, self.distance))
        return rows

    def write(
        self, scored: Sequence[Row], final: Sequence[Row] | None, json: Path | None, html: Path | None,
        context: typer.Context,
    ) -> None:  # fmt: skip
        """Write what was found, as a table, as a picture, and as a page."""
        of = self.experiment
        figures: dict[str, Any] = {
            "model": of.model, "distance": self.distance, "against": self.real().source, "seed": of.seed,
            "denoise": of.denoise, "guidance": None if of.guidance is None else asdict(of.guidance),
            "timings": self.timings, "rows": [asdict(row) for row in scored],
            "final": None if final is None else [asdict(row) for row in final],
        }  # fmt: skip
        table_file, picture = (of.out / name for name in FIGURES)
        write_json(table_file, figures)
        drawn = comparison_figure(scored, self.distance)
        save_png(drawn, picture)
        options.report(json, figures)
        if html is not None:
            pages.write(
                html, context, of.flow, f"Strategies for {of.model} compared",
                f"Samples of the same latents by {len(scored)} strategies, scored against {self.real().source}.",
                figures, [_table(rows, self.distance) for rows in (scored, final) if rows is not None],
                [Picture(f"{self.distance} above the original's, against speed", drawn), self._sheet(scored)],
            )  # fmt: skip
        print(f"wrote {table_file} and {picture}")

    def _sheet(self, rows: Sequence[Row]) -> Picture:
        """The first samples of every row."""
        folders = {
            row.name: SampleFolder.open(self.experiment.row_folder(row.name)) for row in rows if row.name != ORIGINAL
        }
        shown = [(name, scale(folder.images(0))[:_SAMPLES]) for name, folder in folders.items()]
        labels = folders[SEQUENTIAL].labels(0)
        columns = [] if labels is None else [f"class {label}" for label in labels[:_SAMPLES].tolist()]
        return Picture("The first samples of every strategy, from the same latents", rows_sheet(shown, columns=columns))

    def _scored(self, folders: Mapping[str, SampleFolder], num: int) -> list[Row]:
        real = self.real()
        return score(folders, num, real.extractor, real.statistics, self.timings)

    def _seconds(self, name: str) -> float:
        return self.timings["rows"][name]["median"]


def _estimate(names: Sequence[str], timings: Mapping[str, Any], num: int) -> None:
    """Print how long drawing takes by the timings; what is there already is not subtracted."""
    batches = -(-num // timings["batch_size"])
    drawn = {SEQUENTIAL if name == ORIGINAL else name for name in names}  # which have their images in common
    seconds = sum(timings["rows"][name]["median"] + timings["denoise_seconds"] for name in drawn)
    print(f"{num:,} samples of each of {len(names)} rows: about {batches * seconds / 60:.0f} minutes by one process")


def _table(rows: Sequence[Row], distance: str) -> Table:
    columns = (
        "strategy", distance.replace("-", "-\n"), "above\noriginal", "max\nerror", "RMS\nerror", "8-bit\npixels",
        "re-\nsolved", "seconds\na batch", "times\nas fast",
    )  # fmt: skip
    cells = [
        (
            row.name, f"{row.distance:.4f}", f"{100 * row.relative:+.2f}%{'*' if row.within else ' '}",
            f"{row.max:.1e}", f"{row.rms:.1e}", f"{row.pixels.share:.2%}", f"{row.resolved:.1%}",
            f"{row.seconds.median:.3f}", f"{row.rate:.2f}x",
        )
        for row in rows
    ]  # fmt: skip
    note = f"*: {distance} at most 1% above that of {ORIGINAL}; seconds include denoising"
    return Table(f"{rows[0].num:,} samples a row", columns, cells, note=note)
