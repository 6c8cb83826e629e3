"""Pictures: every pixel where it belongs."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

import jacobiflow as jf
from jacobiflow.calibration import Components, Metrics, Trace
from jacobiflow.calibration.report import Settings
from jacobiflow.experiments.speed import Comparison, Row
from jacobiflow.measuring import Error, Timing
from jacobiflow.plots import (
    bench_figure,
    comparison_sheet,
    convergence_figure,
    image_grid,
    rows_sheet,
    save_png,
    segments_figure,
    trace_sheet,
)

WHITE, CAPTION = 255, 22


def random_images(num: int, channels: int = 1, height: int = 3, width: int = 4) -> Tensor:
    levels = torch.randint(256, (num, channels, height, width), generator=torch.Generator().manual_seed(0))
    return levels.float() / 127.5 - 1


def bytes_of(images: Tensor) -> NDArray[np.uint8]:
    """8-bit pixels (N, H, W, 3), by a formula of its own."""
    levels = np.clip(np.rint((images.double().numpy() + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.broadcast_to(levels.transpose(0, 2, 3, 1), (*levels.shape[:1], *levels.shape[2:], 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("columns", "zoom", "gap"), [(3, 2, 2), (5, 1, 0), (7, 3, 1), (1, 1, 4)])
def test_a_grid_places_every_pixel(channels: int, columns: int, zoom: int, gap: int) -> None:
    images = random_images(5, channels)
    sheet = image_grid(images, columns, zoom, gap)
    assert sheet.mode == "RGB"
    rows = -(-5 // columns)
    want = np.full((rows * (3 * zoom + gap) + gap, columns * (4 * zoom + gap) + gap, 3), WHITE, np.uint8)
    for i, image in enumerate(bytes_of(images)):
        row, column = divmod(i, columns)
        for y in range(3 * zoom):
            for x in range(4 * zoom):
                top, left = gap + row * (3 * zoom + gap), gap + column * (4 * zoom + gap)
                want[top + y, left + x] = image[y // zoom, x // zoom]
    assert np.array_equal(np.asarray(sheet), want)


def test_values_are_clipped_and_a_nan_is_black() -> None:
    images = torch.tensor([-torch.inf, -1.5, -1, 0, 1, 1.5, torch.inf, torch.nan]).view(1, 1, 1, 8)
    kept = images.clone()
    row = np.asarray(image_grid(images, columns=1, zoom=1, gap=0))[0, :, 0]
    assert row.tolist() == [0, 0, 0, 128, 255, 255, 255, 0]
    assert torch.equal(images.nan_to_num(nan=7), kept.nan_to_num(nan=7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_drawn(dtype: torch.dtype) -> None:
    images = torch.tensor([-1.0, 0.5, 1.0]).view(1, 1, 1, 3)
    assert image_grid(images.to(dtype), 1) == image_grid(images, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_comparison_shows_both_rows_and_their_difference(channels: int) -> None:
    reference = random_images(4, channels, height=20, width=40)
    images = reference.clone()
    images[1, :, 5, 7] += 0.25
    images[2, :, 6, 8] -= 0.5
    sheet = comparison_sheet(reference, images, ("sequential", "window:32"), zoom=2)
    grid_height, width = 20 * 2 + 4, 4 * (40 * 2 + 2) + 2
    assert sheet.size == (width, 3 * (CAPTION + grid_height))

    drawn = np.asarray(sheet)
    panels = [drawn[i * (CAPTION + grid_height) :][: CAPTION + grid_height] for i in range(3)]
    difference = torch.full_like(images, -1.0)
    difference[1, :, 5, 7] = 0.0  # half of the largest
    difference[2, :, 6, 8] = 1.0
    for panel, shown in zip(panels, (reference, images, difference), strict=True):
        assert np.array_equal(panel[CAPTION:], np.asarray(image_grid(shown, columns=4)))
        assert (panel[:CAPTION] < 128).any(axis=2).sum() > 50, "no caption"
    captions = [panel[:CAPTION] for panel in panels]
    assert not any(np.array_equal(captions[i], captions[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_comparison_holds_its_captions_and_at_most_20_images_in_a_row() -> None:
    narrow = comparison_sheet(*[random_images(1)] * 2, ("a strategy of a long name", "b"))
    assert narrow.width > 150
    right = np.asarray(narrow)[:CAPTION, -4:]
    assert (right == WHITE).all(), "a caption is cut"
    wide = comparison_sheet(*[random_images(45)] * 2, ("a", "b"))
    assert wide.size == (20 * (4 * 2 + 2) + 2, 3 * (CAPTION + 3 * (3 * 2 + 2) + 2))


@pytest.mark.parametrize("lost", [False, True])
def test_equal_rows_have_a_black_difference(lost: bool) -> None:
    images = random_images(2)
    if lost:
        images[0] = torch.nan
    sheet = np.asarray(comparison_sheet(images, images, ("a", "b"), zoom=1))
    height = 3 + 4
    grid = sheet[-height:, : 2 * (4 + 2) + 2]
    assert np.array_equal(grid, np.asarray(image_grid(torch.full_like(images, -1), 2, zoom=1)))


def test_a_png_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, image = tmp_path / "a.png", image_grid(random_images(2, 3), 2)
    save_png(image, path)
    with Image.open(path) as read:
        assert np.array_equal(np.asarray(read), np.asarray(image))
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "write_bytes"):
        monkeypatch.setattr(*((os, name) if name == "replace" else (Path, name)), no_space)
        with pytest.raises(OSError, match="No space"):
            save_png(image_grid(random_images(1), 1), path)
        monkeypatch.undo()
        assert os.listdir(tmp_path) == ["a.png"]
        assert path.read_bytes() == before
    with pytest.raises(OSError):
        save_png(image, tmp_path / "missing" / "a.png")


# -------------------------------------------------------------------------------------------------- captions in sheets


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every text drawn from here on, with its box (left, top, right, bottom)."""
    drawn: list[tuple[str, tuple[float, float, float, float]]] = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, *args: Any, **kwargs: Any) -> None:
        drawn.append((text, self.textbbox(xy, text, font=kwargs["font"], anchor=kwargs.get("anchor"))))
        draw_text(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return drawn


def enlarged(image: Tensor, zoom: int) -> NDArray[np.uint8]:
    """The pixels of one image (C, H, W), each `zoom` wide."""
    return bytes_of(image.unsqueeze(0))[0].repeat(zoom, axis=0).repeat(zoom, axis=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("denoised", "blocks", "zoom"), [(True, 2, 8), (False, 2, 4), (True, 11, 8), (False, 1, 8)])
def test_a_trace_is_a_line_a_sample_and_a_column_a_block(
    channels: int, denoised: bool, blocks: int, zoom: int, captions: list[tuple[str, tuple[float, ...]]]
) -> None:
    columns = 1 + blocks + denoised
    images = random_images(3 * columns, channels, height=8, width=8).view(columns, 3, channels, 8, 8)
    sheet = trace_sheet(list(images), denoised, zoom)
    size = 8 * zoom
    assert sheet.size == (columns * (size + 2) + 2, CAPTION + 3 * (size + 2) + 2)

    pixels, rest = np.asarray(sheet), np.ones((sheet.height, sheet.width), dtype=bool)
    for column in range(columns):
        for line in range(3):
            top, left = CAPTION + 2 + line * (size + 2), 2 + column * (size + 2)
            place = (slice(top, top + size), slice(left, left + size))
            assert np.array_equal(pixels[place], enlarged(images[column, line], zoom)), f"line {line}, column {column}"
            rest[place] = False
    rest[:CAPTION] = False
    assert (pixels[rest] == WHITE).all(), "something is drawn between the images"

    want = ["noise", *(f"block {i}" for i in reversed(range(blocks))), *(["denoised"] if denoised else [])]
    assert [text for text, _ in captions] == want
    for column, (text, (left, top, right, bottom)) in enumerate(captions):
        assert 0 <= top < bottom <= CAPTION, f"{text} lies on the images"
        assert column * (size + 2) <= left < right <= (column + 1) * (size + 2) + 2, f"{text} leaves its column"
        assert (pixels[:CAPTION, int(left) : int(right) + 1] < 128).any(), f"{text} is not there"


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_lie_under_their_captions(channels: int, captions: list[tuple[str, tuple[float, ...]]]) -> None:
    zoom, counts, names = 6, (5, 23, 1), ("guess 0, Jacobi-3", "[6-8-32-10] (gypq)", "sequential")
    rows = list(zip(names, random_images(sum(counts), channels, 5, 7).split(counts), strict=True))
    sheet = rows_sheet(rows, zoom)
    lines = (1, 2, 1)  # at most 20 images a line
    assert sheet.size == (20 * (7 * zoom + 2) + 2, sum(CAPTION + n * (5 * zoom + 2) + 2 for n in lines))

    pixels, top, rest = np.asarray(sheet), 0, np.ones((sheet.height, sheet.width), dtype=bool)
    assert [text for text, _ in captions] == list(names)
    for (name, images), count, (_, box) in zip(rows, lines, captions, strict=True):
        assert top <= box[1] < box[3] <= top + CAPTION, f"{name} lies on images"
        assert 0 <= box[0] < box[2] <= sheet.width
        assert (pixels[top : top + CAPTION] < 128).any()
        rest[top : top + CAPTION] = False
        for i, image in enumerate(images):
            y, x = top + CAPTION + 2 + i // 20 * (5 * zoom + 2), 2 + i % 20 * (7 * zoom + 2)
            place = (slice(y, y + 5 * zoom), slice(x, x + 7 * zoom))
            assert np.array_equal(pixels[place], enlarged(image, zoom)), f"{name}, image {i}"
            rest[place] = False
        top += CAPTION + count * (5 * zoom + 2) + 2
    assert (pixels[rest] == WHITE).all()


def test_a_single_narrow_row_holds_its_caption_and_nan_is_black() -> None:
    images = torch.full((1, 1, 4, 4), torch.nan)
    sheet = rows_sheet([("a caption far wider than the image", images)], zoom=2)
    pixels = np.asarray(sheet)
    assert sheet.width > 150
    assert (pixels[:CAPTION, -4:] == WHITE).all(), "the caption is cut"
    assert (pixels[CAPTION + 2 : CAPTION + 10, 2:10] == 0).all()
    assert (pixels[CAPTION:, 12:] == WHITE).all()


# -------------------------------------------------------------------------------------------------- curves of a report

CRM = (22.3, 1.1, 1.0, 1.5, 0.8, 0.6, 14.8, 2.0)  # Img64uncond in Table 2 of the paper, where 0 and 6 are stacked
BEST = ("zeros", "latent", "mean_affine", "latent", "zeros", "mean_affine", "mean_affine", "latent")


def some_trace(start: float, sweeps: int) -> Trace:
    """From `start` down to below 1e-5, the last few entries being the rounding that is not to be drawn."""
    curve = tuple(start * 10 ** (-6 * k / sweeps) for k in range(sweeps + 1))
    return Trace((*curve, 3e-7, 2e-7), tuple(4 * distance for distance in (*curve, 3e-7, 2e-7)), {1e-2: (sweeps,)})


def make_report(
    crm: Sequence[float] | None = CRM, guidance: jf.Guidance | None = None, tough: Sequence[int] = (0, 6),
    traces: Callable[[str, int, str], Trace] | None = None,
) -> jf.Report:  # fmt: skip
    """A report of one trace for each start, block and guess, no two alike."""
    num_blocks = len(crm or CRM)
    igm = tuple({name: 1.0 if name == best else 9.0 for name in ("latent", "zeros", "mean_affine")} for best in BEST)
    components = None if crm is None else tuple(Components(1.0, value, 0.0) for value in crm)
    metrics = Metrics(igm[:num_blocks], components)
    draw = traces or (
        lambda start, block, guess: some_trace(
            2.0 + len(start) + block / 7, 9 + block + 3 * ("latent", "zeros", "mean_affine").index(guess)
        )
    )
    starts = ("noise",) if guidance else ("images", "noise")
    return jf.Report(
        fingerprint="0" * 64,
        num_tokens=64,
        token_channels=4,
        settings=Settings(9, True, 2, guidance, segments=4, traced=5, seed=0),
        metrics={2: metrics},
        segment_metrics=(metrics,) * num_blocks,
        class_metrics={},
        mean_affine=(jf.MeanAffine(torch.zeros(64, 4), torch.zeros(64, 4)),) * num_blocks,
        traces={
            start: tuple({name: draw(start, block, name) for name in igm[0]} for block in range(num_blocks))
            for start in starts
        },
        segment_traces={
            block: {
                count: tuple(some_trace(1.5 + segment + block / 3, 5 + 2 * segment + count) for segment in range(count))
                for count in (1, 2, 4, 8)
            }
            for block in tough
        },
        gamma=((1.0,),) * num_blocks,
    )


def lines_of(axis: Axes) -> Mapping[str, Line2D]:
    """The lines of a panel by label."""
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    assert len(lines) == len(axis.get_lines()), "two lines of one label"
    return lines


def assert_drawn(line: Line2D, distances: Sequence[float]) -> None:
    """The line is the distances by sweep, up to the first below 1e-5 from which on all are below 3e-5: rounding."""
    ends = [k for k in range(len(distances)) if distances[k] < 1e-5 and np.all(np.less(distances[k:], 3e-5))]
    end = ends[0] if ends else len(distances) - 1
    assert np.array_equal(line.get_ydata(), distances[: end + 1])
    assert np.array_equal(line.get_xdata(), range(end + 1))


def assert_readable(figure: Figure) -> None:
    """Axes are logarithmic and labelled, and no text leaves the figure or runs into another panel's title."""
    figure.draw_without_rendering()
    for axis in figure.axes:
        assert axis.get_yscale() == "log"
        assert "sweeps" in axis.get_xlabel()
        low, high = axis.get_xlim()
        assert low == 0 and high >= max(line.get_xdata()[-1] for line in axis.get_lines())
        bottom, top = axis.get_ylim()
        shown = [y for line in axis.get_lines() for y in line.get_ydata() if np.isfinite(y)]
        assert 0 < bottom <= 1e-5 and top >= max(shown)
        texts = [axis.title, axis.xaxis.label, axis.yaxis.label, *legend_texts(axis)[1]]
        for text in texts:
            if text.get_text():
                box = text.get_window_extent()
                assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text.get_text()
                assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text.get_text()
    assert "|X" in figure.axes[0].get_ylabel()
    assert "median" in figure.axes[0].get_ylabel()
    titles = [axis.title.get_window_extent() for axis in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(titles)), "titles overlap"


def legend_texts(axis: Axes) -> tuple[list[str], list[Any]]:
    legend = axis.get_legend()
    texts = [] if legend is None else list(legend.get_texts())
    return [text.get_text() for text in texts], texts


def test_convergence_draws_the_curves_of_the_report() -> None:
    report = make_report()
    figure = convergence_figure(report)
    assert len(figure.axes) == 2
    for axis, start in zip(figure.axes, ("images", "noise"), strict=True):
        lines = lines_of(axis)
        labels = [f"block {i}{' (tough)' if i in (0, 6) else ''}" for i in range(8)]
        assert set(lines) == {*labels, "block 0, slowest sample", "block 6, slowest sample"}
        for block, (label, best) in enumerate(zip(labels, BEST, strict=True)):
            trace = report.traces[start][block][best]
            assert_drawn(lines[label], trace.median)
            assert lines[label].get_linestyle() == "-"
            if block in (0, 6):
                slowest = lines[f"block {block}, slowest sample"]
                assert_drawn(slowest, trace.largest)
                assert slowest.get_linestyle() == ":"
                assert slowest.get_color() == lines[label].get_color()
        medians = [lines[label] for label in labels]
        assert len({to_hex(line.get_color()) for line in medians}) == 8
        widths = [line.get_linewidth() for line in medians]
        assert min(widths[0], widths[6]) > max(widths[1:6] + widths[7:])
        assert start == "noise" or not legend_texts(axis)[0]
    assert set(legend_texts(figure.axes[-1])[0]) == set(lines)
    titles = [axis.get_title() for axis in figure.axes]
    assert "images" in titles[0] and "fresh" not in titles[0]
    assert "fresh" in titles[1] and "images" not in titles[1]
    assert all("5 samples" in title and "guided" not in title for title in titles)
    assert_readable(figure)


def test_convergence_under_guidance_is_of_fresh_latents_and_says_so() -> None:
    report = make_report(guidance=jf.Guidance(1.0))
    figure = convergence_figure(report)
    (axis,) = figure.axes
    assert "guided" in axis.get_title() and "fresh" in axis.get_title()
    assert_drawn(lines_of(axis)["block 3"], report.traces["noise"][3]["latent"].median)
    assert len(legend_texts(axis)[0]) == 10
    assert_readable(figure)


def test_without_crm_no_block_is_drawn_as_tough() -> None:
    for axis in convergence_figure(make_report(crm=None, tough=())).axes:
        assert set(lines_of(axis)) == {f"block {i}" for i in range(8)}
        assert len({line.get_linewidth() for line in axis.get_lines()}) == 1


def test_segments_are_drawn_with_the_whole_block_beside_them() -> None:
    report = make_report()
    figure = segments_figure(report)
    assert len(figure.axes) == 2
    for axis, block in zip(figure.axes, (0, 6), strict=True):
        lines = lines_of(axis)
        names = [f"segment {i}" for i in range(1, 5)]
        assert set(lines) == {*names, "all tokens at once"}
        for name, trace in zip(names, report.segment_traces[block][4], strict=True):
            assert_drawn(lines[name], trace.median)
        assert_drawn(lines["all tokens at once"], report.traces["noise"][block][BEST[block]].median)
        assert len({to_hex(line.get_color()) for line in lines.values()}) == 5
        assert set(legend_texts(axis)[0]) == set(lines)
        assert re.search(rf"block {block}\b.*\b4 segments\b.*\b16 tokens", axis.get_title())
    assert_readable(figure)


def test_segments_need_a_tough_block() -> None:
    with pytest.raises(ValueError, match="no block of this report is tough"):
        segments_figure(make_report(crm=(1.0,) * 8, tough=()))


def test_one_tough_block_is_one_panel() -> None:
    figure = segments_figure(make_report(crm=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 99.0, 1.0), tough=(6,)))
    assert len(figure.axes) == 1
    assert_readable(figure)


@pytest.mark.parametrize("kind", ["overflows", "solved at once", "never solved", "grows again"])
def test_odd_curves_are_drawn_without_a_warning(kind: str, tmp_path: Path) -> None:
    curve = {
        "overflows": (5.0, float("inf"), float("inf"), 1e30, 1e-2, 0.0), "solved at once": (0.0,),
        "never solved": (5.0, 4.0, 3.0), "grows again": (5.0, 1e-6, 0.0, 0.5, 2e-5, 1e-6, 1e-7),
    }[kind]  # fmt: skip
    report = make_report(traces=lambda *_: Trace(curve, curve, {1e-2: (None,)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (convergence_figure(report), segments_figure(report)):
            save_png(figure, tmp_path / "a.png")
            for axis in figure.axes:
                for label, line in lines_of(axis).items():
                    if "segment" not in label:
                        assert_drawn(line, curve)


def test_many_blocks_repeat_colours_and_keep_their_labels() -> None:
    report = make_report()
    twelve = replace(
        report,
        metrics={2: Metrics(report.igm + report.igm[:4], None)},
        mean_affine=report.mean_affine + report.mean_affine[:4],
        segment_metrics=report.segment_metrics + report.segment_metrics[:4],
        gamma=report.gamma + report.gamma[:4],
        traces={start: rows + rows[:4] for start, rows in report.traces.items()},
        segment_traces={},
    )
    for axis in convergence_figure(twelve).axes:
        assert set(lines_of(axis)) == {f"block {i}" for i in range(12)}


def make_comparison(batch_size: int, points: Mapping[str, tuple[float, float]]) -> Comparison:
    """Baselines, and strategies by name with seconds and largest error."""
    points = {"growing cache": (8.0, 1e-6), "sequential": (4.0, 0.0), **points}
    rows = (
        Row(name, Timing(seconds, seconds / 2, seconds * 3), Error(error, 0.0, 0.0), None)
        for name, (seconds, error) in points.items()
    )
    return Comparison(batch_size, tuple(rows), Timing(0.02, 0.01, 0.03))


def markers_of(axis: Axes) -> list[tuple[float, float, float, float]]:
    """Seconds, error, and the ends of the bar of each marker."""
    found = []
    for container in axis.containers:
        line, _, (bar,) = container
        (start, end) = bar.get_segments()[0]
        found.append((line.get_xdata()[0], line.get_ydata()[0], start[0], end[0]))
    return found


def test_bench_draws_a_marker_for_every_strategy_in_every_panel() -> None:
    points = {"auto": (1.0, 1e-3), "[7-8-14-10]": (0.5, 2e-1), "jacobi": (2.0, 4e-3)}
    comparisons = [make_comparison(size, {n: (x * size, y) for n, (x, y) in points.items()}) for size in (1, 16)]
    figure = bench_figure(comparisons)
    figure.draw_without_rendering()
    for axis, comparison in zip(figure.axes, comparisons, strict=True):
        size = comparison.batch_size
        assert axis.get_title() == f"batch size {size}"
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        want = [(x * size, y, x * size / 2, x * size * 3) for x, y in points.values()]
        assert markers_of(axis) == [pytest.approx(values) for values in want]
        lines = [line for line in axis.get_lines() if len(line.get_xdata()) == 2]
        assert [line.get_xdata()[0] for line in lines] == [0.02, 4.0, 8.0]
        assert len({line.get_linestyle() for line in lines}) == 3
        (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
        assert left < 0.02 and right > max(8.0, 6.0 * size)
        assert bottom < 1e-3 and top > 2e-1
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "encoding pass", "sequential", "growing cache", *points
    ]  # fmt: skip
    assert "seconds" in figure.get_supxlabel() and "error" in figure.get_supylabel()
    assert "0" not in edge_labels(figure) and "not finite" not in edge_labels(figure)


def edge_labels(figure: Figure) -> list[str]:
    axis = figure.axes[0]
    bottom, top = axis.get_ylim()
    return [t.get_text() for t, y in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True) if y in (bottom, top)]


def test_errors_of_zero_and_infinite_ones_are_at_the_edges_which_say_so() -> None:
    figure = bench_figure([make_comparison(1, {"a": (1.0, 0.0), "b": (2.0, 1e-2), "c": (3.0, float("inf"))})])
    figure.draw_without_rendering()
    (axis,) = figure.axes
    bottom, top = axis.get_ylim()
    assert [y for _, y, _, _ in markers_of(axis)] == [bottom, 1e-2, top]
    assert bottom < 1e-2 < top
    assert edge_labels(figure) == ["0", "not finite"]


@pytest.mark.parametrize("count", range(1, 8))
def test_bench_panels_are_in_rows_and_spare_ones_are_empty(count: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = bench_figure([make_comparison(size + 1, {"auto": (1.0, 1e-3)}) for size in range(count)])
        save_png(figure, tmp_path / "a.png")
    drawn = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in drawn] == [f"batch size {size + 1}" for size in range(count)]
    titles = [axis.title.get_window_extent() for axis in drawn]
    assert not any(one.overlaps(other) for i, one in enumerate(titles) for other in titles[:i])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_bench_labels_do_not_overlap(scale: float) -> None:
    names = [f"folder_{i}/plan-of-a-very-long-name-$x$-{i}.json" for i in range(20)]
    points = {name: (scale * 1.4**i, 1e-12 * 10**i) for i, name in enumerate(names)}
    figure = bench_figure([make_comparison(1, points), make_comparison(4, points), make_comparison(16, points)])
    figure.draw_without_rendering()
    for axis in figure.axes:
        (left, right), shown = axis.get_xlim(), []
        for label, x in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True):
            if left <= x <= right:
                shown.append(label.get_window_extent())
        assert len(shown) >= 2
        assert all(one.x1 < other.x0 for one, other in pairwise(shown))
    handles = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in handles}) == 20
    (legend,) = figure.legends
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    assert legend.get_texts()[3].get_text().replace("\n", "").replace("\\$", "$") == names[0]


def test_figures_stay_out_of_pyplot_and_leave_its_settings(tmp_path: Path) -> None:
    mine = plt.figure()
    try:
        before, settings = plt.get_fignums(), dict(plt.rcParams)
        for figure in (convergence_figure(make_report()), segments_figure(make_report())):
            save_png(figure, tmp_path / "a.png")
        assert plt.get_fignums() == before
        assert plt.gcf() is mine
        assert dict(plt.rcParams) == settings
    finally:
        plt.close(mine)


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, figure = tmp_path / "a.png", Figure(figsize=(4, 3))
    figure.subplots().plot([1, 2], color="red")
    save_png(figure, path)
    with Image.open(path) as read:
        assert read.format == "PNG"
        assert read.width > read.height > 300
        assert (255, 0, 0) in {color for _, color in read.convert("RGB").getcolors(1 << 16)}
    before = path.read_bytes()

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for place, name in ((os, "replace"), (Path, "write_bytes"), (Figure, "savefig")):
        monkeypatch.setattr(place, name, no_space)
        with pytest.raises(OSError, match="No space"):
            save_png(figure, path)
        monkeypatch.undo()
        assert os.listdir(tmp_path) == ["a.png"]
        assert path.read_bytes() == before
    with pytest.raises(OSError):
        save_png(figure, tmp_path / "missing" / "a.png")
    assert os.listdir(tmp_path) == ["a.png"]
