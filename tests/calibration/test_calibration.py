"""IGM, CRM, measured sweeps, the error matrix and the report, against NumPy, the oracle and closed forms."""

from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import MixingBlock, latents, make_flow, to_float32
from running import put
from torch import Tensor

import jacobiflow as jf
from jacobiflow.calibration import (
    DOMINANCE,
    Components,
    Metrics,
    Report,
    Trace,
    distances,
    gamma_norm,
    gamma_products,
    initial_residual,
    matrix_norm,
    rank_correlation,
    tough_blocks,
)
from jacobiflow.calibration.convergence import TOLERANCES, joined
from jacobiflow.calibration.metrics import RunningMean, segment_runs
from jacobiflow.data import Noise, add_noise, bundled_fashion, digits
from jacobiflow.guidance import guided

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-9
NORMS: tuple[Any, ...] = (2, "fro", 1)
GUESSES = ("latent", "zeros", "mean_affine")
TRACED = 3


@pytest.fixture(scope="module", autouse=True)
def reports_on_one_thread() -> Iterator[None]:
    """Fixtures of the module are made before `one_thread`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------- flows and cases


def randn(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_images(flow: jf.TarFlow, num: int) -> Tensor:
    config = flow.config
    return randn(num, config.in_channels, config.image_size, config.image_size, seed=2)


def some_labels(flow: jf.TarFlow, num: int) -> Tensor:
    """All classes in turn, and every fifth image without one."""
    labels = torch.arange(num) % flow.config.num_classes
    labels[::5] = -1
    return labels


@dataclass(frozen=True)
class Case:
    """A flow, what it is calibrated with, and its report."""

    flow: jf.TarFlow
    images: Tensor
    labels: Tensor | None
    guidance: jf.Guidance | None
    guide: oracle.Guide | None
    report: Report

    @property
    def chosen(self) -> Tensor:
        """The images whose sweeps are measured."""
        return torch.arange(TRACED) * len(self.images) // TRACED


@dataclass(frozen=True)
class Recipe:
    config: dict[str, Any]
    num_images: int = 11
    labelled: bool = False
    norm: Any = 2
    segments: int = 4
    guide: oracle.Guide | None = None


CASES = {
    "nvp": Recipe({"image_size": 6, "patch_size": 2, "num_blocks": 3}),
    "nvp, colours": Recipe({"image_size": 6, "patch_size": 2, "in_channels": 3}, norm=1, segments=9),
    "nvp, classes": Recipe({"num_classes": 3}, labelled=True, norm="fro", segments=3),
    "nvp, classes but no labels": Recipe({"image_size": 6, "num_classes": 2}, num_images=5, segments=1),
    "vp, classes": Recipe({"image_size": 6, "num_classes": 2, "nvp": False}, labelled=True),
    "guided": Recipe({"image_size": 6, "num_classes": 2}, labelled=True, guide=oracle.Guide(1.5, True, "both", 0.8)),
    "guided scale": Recipe(
        {"image_size": 6, "num_classes": 2}, labelled=True, guide=oracle.Guide(0.7, False, "scale", 1.0)
    ),
    "guided without labels": Recipe({"image_size": 6}, guide=oracle.Guide(1.0, False, "shift", 0.6)),
}


def calibrated(recipe: Recipe) -> Case:
    flow = make_flow(**recipe.config)
    images = some_images(flow, recipe.num_images)
    labels = some_labels(flow, recipe.num_images) if recipe.labelled else None
    guide = recipe.guide
    guidance = None if guide is None else jf.Guidance(guide.weight, guide.annealed, guide.on, guide.temperature)
    report = jf.calibrate(
        flow, images, labels, recipe.norm, guidance, segments=recipe.segments, traced=TRACED,
        per_class=labels is not None, batch_size=4,
    )  # fmt: skip
    return Case(flow, images, labels, guidance, guide, report)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return calibrated(request.param)


@pytest.fixture(scope="module")
def classes() -> Case:
    """The case with most in its report."""
    return calibrated(CASES["nvp, classes"])


def linear_flow(slopes: list[float], log_scale: float = 0.0, num_classes: int = 0, nvp: bool = True) -> jf.TarFlow:
    """Blocks x_t = exp(log_scale) z_t + slope x_{t-1} on 9 tokens of one number; |W_u| = slope, |W_s| = log_scale.

    All layers are the identity. Channel 0 of the hidden state is the token, channel 1 is 1.
    """
    config = jf.TarFlowConfig(1, 3, 1, 16, len(slopes), 1, num_classes=num_classes, nvp=nvp, head_dim=16, expansion=1)
    flow = jf.TarFlow(config).double().eval()
    with torch.no_grad():
        for block, slope in zip(flow.blocks, slopes, strict=True):
            for layer in block.attn_blocks:
                for last in (layer.attention.proj, layer.mlp.main[2]):
                    last.weight.zero_()
                    last.bias.zero_()
            zeroed = [block.pos_embed, block.proj_in.weight, block.proj_in.bias, block.proj_out.bias]
            for parameter in zeroed if block.class_embed is None else [*zeroed, block.class_embed]:
                parameter.zero_()
            block.proj_in.weight[0, 0] = block.proj_in.bias[1] = 1
            block.proj_out.weight[-1, 0] = slope
            if nvp:
                block.proj_out.weight[0, 1] = log_scale
    return flow


def overflowing_flow() -> jf.TarFlow:
    """One block x_t = exp(-50 x_{t-1}) z_t: images of size 1 have latents that overflow as a guess."""
    flow = linear_flow([0.0])
    with torch.no_grad():
        flow.blocks[0].proj_out.weight[0, 0] = -50
        flow.var.fill_(1e-12)  # fresh latents do not overflow
    return flow


# -------------------------------------------------------------------------------------------- what the report must hold


@dataclass(frozen=True)
class Point:
    """One block's tokens: its solutions, their latents, and the parameters there."""

    x: Tensor
    z: Tensor
    scale: Tensor
    shift: Tensor


def walk(case: Case, index: Tensor | None = None) -> list[Point]:
    """Per block, the images as the oracle encodes them; parameters and latents are guided, what goes on is not."""
    reference = oracle.Oracle(case.flow)
    images = case.images if index is None else case.images[index]
    labels = labels_at(case, index)
    x, points = reference.patches(images), []
    for i in range(reference.num_blocks):
        x = reference.flip(i, x)
        scale, shift = parameters(reference, i, x, labels, case.guide)
        points.append(Point(x, (x - shift) / scale, scale, shift))
        scale, shift = parameters(reference, i, x, labels, None)
        x = reference.flip(i, (x - shift) / scale)
    return points


def labels_at(case: Case, index: Tensor | None) -> Tensor | None:
    return case.labels if case.labels is None or index is None else case.labels[index]


def parameters(
    reference: oracle.Oracle, i: int, x: Tensor, labels: Tensor | None, guide: oracle.Guide | None
) -> tuple[Tensor, Tensor]:
    """Scale and shift: g is affine in z."""
    shift = reference.g(i, x, torch.zeros_like(x), labels, guide)
    return reference.g(i, x, torch.ones_like(x), labels, guide) - shift, shift


def guess_of(case: Case, i: int, name: str, z: Tensor) -> Tensor:
    if name == "latent":
        return z.clone()
    if name == "zeros":
        return torch.cat((z[:, :1], torch.zeros_like(z[:, 1:])), dim=1)
    mean = case.report.mean_affine[i]
    return mean.log_scale.double().exp() * z + mean.shift.double()


def residuals(case: Case, i: int, name: str, point: Point, ends: list[int], index: Tensor | None = None) -> np.ndarray:
    """g(X^(0)) - X* of Gauss-Seidel-Jacobi with segments that end at `ends`, its mean over the batch."""
    reference, guess = oracle.Oracle(case.flow), guess_of(case, i, name, point.z)
    parts = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        mixed = torch.cat((point.x[:, :start], guess[:, start:]), dim=1)
        g = reference.g(i, mixed, point.z, labels_at(case, index), case.guide)
        parts.append((g - point.x)[:, start:end])
    return torch.cat(parts, dim=1).numpy().mean(axis=0)


def weights(flow: jf.TarFlow, i: int) -> tuple[np.ndarray, np.ndarray]:
    """W_s, 0 in a volume-preserving flow, and W_u."""
    weight = flow.state_dict()[f"blocks.{i}.proj_out.weight"].double().numpy()
    size = flow.config.token_channels
    return (weight[:size], weight[size:]) if flow.config.nvp else (np.zeros_like(weight), weight)


def crm(flow: jf.TarFlow, i: int, points: list[Point], norm: Any, run: slice = slice(None)) -> float:
    scaled = (points[i].x / points[i].scale).numpy().mean(axis=0)[run]
    w_s, w_u = weights(flow, i)
    return float(
        np.linalg.norm(scaled, norm) * np.linalg.norm(w_s, norm)
        + np.linalg.norm(w_u, norm)
    )  # fmt: skip


def ends_of(length: int, count: int) -> list[int]:
    return [(segment + 1) * length // count for segment in range(count)]


def curve_of(g: oracle.Map, answer: Tensor, guess: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    """Distances of tokens start .. end-1 after 0, 1, ... plain sweeps of them, those before being solved."""
    end = answer.shape[1] if end is None else end
    x = torch.cat((answer[:, :start], guess[:, start:]), dim=1)
    curve = [(x - answer)[:, start:end].abs().amax(dim=(1, 2))]
    for _ in range(start, end):
        x[:, start:end] = g(x)[:, start:end]
        curve.append((x - answer)[:, start:end].abs().amax(dim=(1, 2)))
    return torch.stack(curve)


def settled_after(curve: Tensor, tolerance: float) -> tuple[int, ...]:
    """Per sample, the first sweep from which on the distance is within `tolerance`."""
    return tuple(
        next(k for k in range(len(curve)) if (column[k:] <= tolerance).all()) for column in curve.T
    )  # fmt: skip


def assert_is_curve(trace: Trace, curve: Tensor) -> None:
    """`trace` is `curve`, up to where all of it is within 1e-5."""
    length = len(trace.largest)
    assert len(trace.median) == length <= len(curve)
    assert torch.tensor(trace.largest, dtype=torch.float64).allclose(curve[:length].amax(dim=1), EXACT, 1e-5)
    assert torch.tensor(trace.median, dtype=torch.float64).allclose(curve[:length].median(dim=1).values, EXACT, 1e-5)
    assert curve[length - 1].max() <= 1e-5 or length == len(curve)
    for tolerance in TOLERANCES:
        assert trace.sweeps[tolerance] == settled_after(curve, tolerance)


# --------------------------------------------------------------------------------------------------------- IGM and CRM


def test_igm_is_the_norm_of_the_mean_residual(case: Case) -> None:
    points, length = walk(case), case.flow.config.num_tokens
    for i, point in enumerate(points):
        for name in GUESSES:
            matrix = residuals(case, i, name, point, [length])
            for norm in NORMS:
                expected = np.linalg.norm(matrix, norm)
                assert case.report.metrics[norm].igm[i][name] == pytest.approx(expected, rel=1e-8)
    assert case.report.igm == case.report.metrics[case.report.settings.norm].igm
    assert all(tuple(row) == GUESSES for row in case.report.igm)


def test_crm_is_that_of_the_mean_scaled_input_and_the_output_weights(case: Case) -> None:
    points = walk(case)
    for norm in NORMS:
        expected = [crm(case.flow, i, points, norm) for i in range(len(points))]
        metrics = case.report.metrics[norm]
        assert metrics.crm == pytest.approx(expected, rel=EXACT)
        assert metrics.crm_percent == pytest.approx([100 * value / sum(expected) for value in expected], rel=EXACT)
        assert metrics.tough_blocks == tough_blocks(expected)
        assert metrics.components is not None
        for i, part in enumerate(metrics.components):
            w_s, w_u = weights(case.flow, i)
            scaled = (points[i].x / points[i].scale).numpy().mean(axis=0)
            assert part == pytest.approx([np.linalg.norm(matrix, norm) for matrix in (scaled, w_s, w_u)], rel=EXACT)
    chosen = case.report.metrics[case.report.settings.norm]
    assert (case.report.crm, case.report.crm_percent) == (chosen.crm, chosen.crm_percent)
    assert (case.report.components, case.report.tough_blocks) == (chosen.components, chosen.tough_blocks)


def test_mean_affine_is_the_mean_of_log_scale_and_shift_per_position(case: Case) -> None:
    points = walk(case)
    assert len(case.report.mean_affine) == len(points)
    for guess, point in zip(case.report.mean_affine, points, strict=True):
        assert guess.log_scale.double().allclose(point.scale.log().mean(dim=0), 1e-6, 1e-6)
        assert guess.shift.double().allclose(point.shift.mean(dim=0), 1e-6, 1e-6)


def test_metrics_of_segments_have_the_segments_before_solved(case: Case) -> None:
    points, length = walk(case), case.flow.config.num_tokens
    norm, ends = case.report.settings.norm, ends_of(case.flow.config.num_tokens, case.report.settings.segments)
    for i, point in enumerate(points):
        metrics = case.report.segment_metrics[i]
        assert len(metrics.igm) == len(metrics.crm) == len(ends)
        matrices = {name: residuals(case, i, name, point, ends) for name in GUESSES}
        for segment, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            for name in GUESSES:
                expected = np.linalg.norm(matrices[name][start:end], norm)
                # Absolute: a segment of the first token alone is exact after a sweep.
                assert metrics.igm[segment][name] == pytest.approx(expected, rel=1e-8, abs=1e-12)
            expected = crm(case.flow, i, points, norm, slice(start, end))
            assert metrics.crm[segment] == pytest.approx(expected, rel=EXACT)
    assert ends[-1] == length


def test_metrics_of_a_class_are_those_of_its_images_with_the_guess_of_all(case: Case) -> None:
    if case.labels is None:
        assert case.report.class_metrics == {}
        return
    norm, length = case.report.settings.norm, case.flow.config.num_tokens
    assert list(case.report.class_metrics) == sorted(set(case.labels.tolist()))
    for label, metrics in case.report.class_metrics.items():
        index = (case.labels == label).nonzero()[:, 0]
        points = walk(case, index)
        assert metrics.crm == pytest.approx([crm(case.flow, i, points, norm) for i in range(len(points))], rel=EXACT)
        for i, point in enumerate(points):
            for name in GUESSES:
                expected = np.linalg.norm(residuals(case, i, name, point, [length], index), norm)
                assert metrics.igm[i][name] == pytest.approx(expected, rel=1e-8)


def test_report_says_what_it_was_made_with(case: Case) -> None:
    config, made = case.flow.config, case.report.settings
    assert (case.report.num_tokens, case.report.token_channels) == (config.num_tokens, config.token_channels)
    assert case.report.num_blocks == config.num_blocks
    assert (made.num_images, made.traced, made.seed) == (len(case.images), TRACED, 0)
    assert (made.labelled, made.guidance) == (case.labels is not None, case.guidance)


def test_best_guess_is_the_one_with_the_smallest_igm(case: Case) -> None:
    z = latents(case.flow, 2)
    for i in range(case.report.num_blocks):
        name = case.report.best_guess(i)
        assert case.report.igm[i][name] == min(case.report.igm[i].values())
        assert torch.equal(case.report.guess(i)(z), case.report.guesses(i)[name](z))
        for name, guess in case.report.guesses(i).items():
            assert guess(z).allclose(guess_of(case, i, name, z), EXACT)


class OnDisk:
    """Images that are no tensor; remembers how many were asked for at once."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self.most = 0

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Tensor) -> Tensor:
        self.most = max(self.most, len(index))
        return self._images[index]


def assert_same_up_to_rounding(a: Report, b: Report, rel: float = EXACT, gamma: bool = True) -> None:
    """All but the error matrix's norm, whose estimate is as good as its tolerance."""
    for norm in NORMS:
        assert a.metrics[norm].crm == pytest.approx(b.metrics[norm].crm, rel=rel)
    rows = [(m, n) for m, n in zip(a.segment_metrics, b.segment_metrics, strict=True)]
    rows += [(a.metrics[norm], b.metrics[norm]) for norm in NORMS]
    rows += [(a.class_metrics[label], b.class_metrics[label]) for label in a.class_metrics]
    for first, second in rows:
        for x, y in zip(first.igm, second.igm, strict=True):
            assert x == pytest.approx(y, rel=max(rel, 1e-5), abs=max(rel, 1e-6))
    for x, y in zip(a.mean_affine, b.mean_affine, strict=True):
        assert x.log_scale.allclose(y.log_scale, max(rel, 1e-5), max(rel, 1e-6))
        assert x.shift.allclose(y.shift, max(rel, 1e-5), max(rel, 1e-6))
    for start, rows_of_traces in a.traces.items():
        for x, y in zip(rows_of_traces, b.traces[start], strict=True):
            for name in GUESSES:
                assert x[name].largest == pytest.approx(y[name].largest, rel=max(rel, 1e-5), abs=2e-5)
                assert x[name].sweeps == y[name].sweeps
    assert (list(a.class_metrics), list(a.traces)) == (list(b.class_metrics), list(b.traces))
    if gamma:
        assert np.array(a.gamma) == pytest.approx(np.array(b.gamma), rel=0.02)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_batch_size_changes_nothing_but_rounding(classes: Case, batch_size: int) -> None:
    """And images may be on disk: never are there more than a batch of them in memory."""
    images = OnDisk(classes.images)
    report = jf.calibrate(
        classes.flow, images, classes.labels, "fro", segments=3, traced=TRACED, per_class=True, batch_size=batch_size,
    )  # fmt: skip
    assert_same_up_to_rounding(report, classes.report, gamma=False)
    assert images.most == min(batch_size, len(images))


@pytest.mark.parametrize("batch_size", [2, 64])
def test_batch_size_does_not_choose_the_samples_of_the_error_matrix(classes: Case, batch_size: int) -> None:
    report = jf.calibrate(classes.flow, classes.images, classes.labels, traced=TRACED, batch_size=batch_size)
    assert [len(row) for row in report.gamma] == [TRACED] * 2
    assert np.array(report.gamma) == pytest.approx(np.array(classes.report.gamma), rel=0.02)


def test_numpy_images_are_as_good_as_tensors(classes: Case) -> None:
    settings = {"segments": 3, "traced": TRACED, "batch_size": 4, "per_class": True}
    report = jf.calibrate(classes.flow, classes.images.numpy(), classes.labels, "fro", **settings)
    assert report == classes.report


def test_running_mean_is_the_mean_and_refuses_no_rows() -> None:
    """In float64: a float32 sum would lose the small rows."""
    rows = (randn(1000, 3, 2) * 1e-3 + 1e4).float()
    mean = RunningMean()
    for part in rows.split(7):
        mean.add(part)
    assert mean.value.allclose(rows.double().mean(dim=0), 1e-12)
    with pytest.raises(ValueError, match="no rows"):
        _ = RunningMean().value


def test_norm_is_numpy_s_and_infinite_where_an_entry_is_not_finite() -> None:
    matrix = randn(7, 3)
    for norm in NORMS:
        assert matrix_norm(matrix, norm) == pytest.approx(np.linalg.norm(matrix.numpy(), norm))
        for broken in (torch.nan, torch.inf):
            assert matrix_norm(torch.cat((matrix, torch.full((1, 3), broken))), norm) == math.inf


@given(length=st.integers(1, 60), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_segments_are_nearly_equal_runs_that_cover_all_tokens(length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, length))
    runs, ends = segment_runs(length, count), ends_of(length, count)
    assert [(run.start, run.stop) for run in runs] == list(zip([0, *ends[:-1]], ends, strict=True))
    assert max(run.stop - run.start for run in runs) - min(run.stop - run.start for run in runs) <= 1


def test_initial_residual_with_a_segment_per_token_is_zero() -> None:
    """One sweep of a token whose predecessors are solved solves it."""
    block, z = MixingBlock(7, 2), randn(3, 7, 2)
    x = fixed_point(block, z)
    whole = initial_residual(block, x, z, jf.Zeros())
    assert whole.allclose(block.g(jf.Zeros()(z), z) - x, EXACT, EXACT)
    assert initial_residual(block, x, z, jf.Latent(), count=7).abs().max() < EXACT


# --------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("log_scale", [0.0, 0.4])
@pytest.mark.parametrize("slope", [0.5, -1.25])
def test_metrics_of_a_linear_block_have_a_closed_form(slope: float, log_scale: float) -> None:
    """x_t = exp(w) z_t + a x_{t-1} on grey images of mean m, which `mean_affine` solves in the mean."""
    flow = linear_flow([slope], log_scale)
    values = torch.tensor([0.2, 1.0, -0.3, 0.7, 0.9], dtype=torch.float64)
    mean, length = float(values.mean()), 9
    report = jf.calibrate(flow, values.view(5, 1, 1, 1).expand(5, 1, 3, 3), batch_size=2, segments=4)
    zeros = abs(slope * mean)
    latent = abs(slope * mean * (math.exp(-log_scale) * (1 - slope) - 1))
    for norm, factor in ((2, math.sqrt(length - 2)), ("fro", math.sqrt(length - 2)), (1, length - 2)):
        igm = report.metrics[norm].igm[0]
        assert igm["zeros"] == pytest.approx(factor * zeros)
        assert igm["latent"] == pytest.approx(factor * latent)
        assert igm["mean_affine"] == pytest.approx(0, abs=1e-6)
    scaled = abs(mean) * math.sqrt(1 + 8 * math.exp(-2 * log_scale))
    assert report.components is not None
    assert report.components[0] == pytest.approx((scaled, log_scale, abs(slope)))
    assert report.crm == pytest.approx((scaled * log_scale + abs(slope),))
    assert report.crm_percent == pytest.approx((100.0,))
    assert report.best_guess(0) == "mean_affine"
    # Segments end at 2, 4, 6, 9. Each has its first token right after a sweep, and x_0 is z_0.
    assert [row["zeros"] for row in report.segment_metrics[0].igm] == pytest.approx([0, zeros, zeros, 2**0.5 * zeros])
    # Gamma is `slope` times a shift by one token.
    assert np.array(report.gamma) == pytest.approx(abs(slope), rel=2e-3)


@pytest.mark.parametrize("slope", [0.5, -0.9])
def test_sweeps_of_a_linear_block_have_a_closed_form(slope: float) -> None:
    """From the latent, x^(k) - x* is -a^(k+1) x*_{t-1-k}: the distance of grey images of value c is |a|^(k+1) c."""
    flow = linear_flow([slope], nvp=False)
    trace = jf.calibrate(flow, torch.ones(2, 1, 3, 3).double(), traced=2).traces["images"][0]["latent"]
    curve = [abs(slope) ** (k + 1) for k in range(8)] + [0.0]
    assert trace.largest == pytest.approx(curve, abs=1e-12)
    assert trace.median == pytest.approx(curve, abs=1e-12)
    for tolerance in TOLERANCES:
        sweeps = next(k for k, distance in enumerate(curve) if distance <= tolerance)
        assert trace.sweeps[tolerance] == (sweeps, sweeps)
        assert trace.slowest(tolerance) == sweeps


def test_identity_takes_no_sweep_from_the_latent_and_one_from_zeros() -> None:
    flow = linear_flow([0.0, 0.0, 0.0], num_classes=2)
    report = jf.calibrate(flow, some_images(flow, 4), torch.tensor([0, 1, 1, -1]), traced=2)
    assert report.crm == report.crm_percent == (0.0,) * 3
    assert report.tough_blocks == ()
    assert report.segment_traces == {}
    assert all(value == 0 for row in report.igm for value in row.values())
    assert [report.best_guess(i) for i in range(3)] == ["latent"] * 3
    assert report.gamma == ((0.0, 0.0),) * 3
    for start in ("images", "noise"):
        assert report.mean_sweeps(start, 1e-3, "latent") == (0.0,) * 3
        assert report.mean_sweeps(start, 1e-3, "zeros") == (1.0,) * 3


def test_constant_map_is_solved_by_one_sweep_of_any_guess() -> None:
    """A fresh flow is affine with the biases of its output layer, whatever x is; mean_affine solves it at once."""
    torch.manual_seed(0)
    flow = jf.TarFlow(jf.TarFlowConfig(2, 6, 2, 32, 3, 2, head_dim=16)).double()
    with torch.no_grad():
        for block in flow.blocks:
            block.proj_out.bias.normal_(std=0.3)
    report = jf.calibrate(flow, some_images(flow, 5), segments=4, traced=2)
    assert all(value == pytest.approx(0, abs=EXACT) for row in report.igm for value in row.values())
    assert report.crm == (0.0,) * 3
    assert report.mean_sweeps("noise", 1e-4, "mean_affine") == (0.0,) * 3
    assert report.mean_sweeps("noise", 1e-4, "latent") == (1.0,) * 3
    assert report.gamma == ((0.0, 0.0),) * 3
    for guess, block in zip(report.mean_affine, flow.blocks, strict=True):
        scale, shift = block.proj_out.bias.detach().float().chunk(2)
        assert guess.log_scale.allclose(torch.cat((torch.zeros(1, 8), scale.expand(8, 8))))
        assert guess.shift.allclose(torch.cat((torch.zeros(1, 8), shift.expand(8, 8))))


def test_flow_of_one_token_is_exact_from_the_start() -> None:
    flow = jf.TarFlow(jf.TarFlowConfig(1, 2, 2, 16, 2, 1, head_dim=16)).double()
    report = jf.calibrate(flow, some_images(flow, 3), segments=1, traced=2)
    assert all(value == 0 for row in report.igm for value in row.values())
    assert report.mean_sweeps("images", 1e-4) == (0.0, 0.0)
    assert report.gamma == ((0.0, 0.0),) * 2


@pytest.fixture(scope="module")
def tough() -> Case:
    """A flow whose block 2 is tough by construction: CRM is the slope."""
    flow = linear_flow([0.15, 0.15, 2.0, 0.15], num_classes=2)
    images, labels = some_images(flow, 6), torch.tensor([0, 1, 1, -1, 0, 0])
    report = jf.calibrate(flow, images, labels, segments=4, traced=TRACED, per_class=True)
    return Case(flow, images, labels, None, None, report)


def test_tough_block_has_traces_of_its_segments(tough: Case) -> None:
    report = tough.report
    assert report.crm == pytest.approx((0.15, 0.15, 2.0, 0.15))
    assert report.crm_percent == pytest.approx(np.array((0.15, 0.15, 2.0, 0.15)) / 2.45 * 100)
    assert report.tough_blocks == (2,)
    assert list(report.segment_traces) == [2]
    steps = report.segment_traces[2]
    assert {1, 4} <= set(steps)
    assert list(steps) == sorted(steps)
    assert steps[1] == (report.traces["noise"][2][report.best_guess(2)],)
    for count, traces in steps.items():
        lengths = [run.stop - run.start for run in segment_runs(9, count)]
        assert len(traces) == count
        for trace, length in zip(traces, lengths, strict=True):
            assert len(trace.largest) <= length + 1
            assert trace.largest[-1] <= 1e-5  # Proposition 1
            assert (trace.slowest(1e-4) or 0) <= length


# --------------------------------------------------------------------------------------------------------- tough blocks

TABLE_2 = {
    "Img128cond": ((6.52, 7.03, 3.08, 13.63, 9.66, 9.17, 70.54, 5.05), (6,)),
    "AFHQ": ((51.85, 51.45, 66.76, 64.98, 73.77, 84.05, 76.64, 348.51), (7,)),
    "Img64uncond": ((22.29, 1.06, 1.01, 1.48, 0.77, 0.58, 14.78, 1.95), (0, 6)),
    "Img64cond": ((141.22, 9.25, 1.36, 1.82, 7.68, 5.08, 3.08, 19.81), (0, 7)),
}


@pytest.mark.parametrize(("values", "picked"), TABLE_2.values(), ids=TABLE_2)
def test_tough_blocks_are_those_that_the_paper_picks_from_its_table_2(
    values: tuple[float, ...], picked: tuple[int, ...]
) -> None:
    assert 0.33 < DOMINANCE < 0.41
    for dominance in (DOMINANCE, *np.linspace(0.33, 0.41, 33).tolist()):
        assert tough_blocks(values, dominance) == picked


def test_crm_of_table_6_is_the_formula_s() -> None:
    """Two rows of the paper, to the digits that it prints."""
    assert Components(131.84, 0.53, 0.19).crm == pytest.approx(70.54, rel=0.02)
    assert Components(286.83, 1.21, 0.93).crm == pytest.approx(348.51, rel=0.02)


@pytest.mark.parametrize(
    ("values", "picked"),
    [
        ((), ()),
        ((5.0,), ()),
        ((100.0, 1.0), ()),
        ((0.0, 0.0, 0.0), ()),
        ((0.0, 0.0, 1e-300), (2,)),
        ((1.0, 1.0, 1.0), ()),
        ((1.0,) * 8, ()),
        ((9.0, 1.0, 1.0), (0,)),
        ((0.1, 5.0, 5.0, 0.1), (1, 2)),
        ((1000.0, 100.0, 10.0, 1.0), (0, 1)),
    ],
)
def test_tough_blocks_at_the_edges(values: tuple[float, ...], picked: tuple[int, ...]) -> None:
    """Of two blocks that remain none dominates; equals are taken alike."""
    assert tough_blocks(values) == picked
    assert tough_blocks([1024 * value for value in values]) == picked


def test_percent_of_nothing_is_0() -> None:
    parts = (Components(1.0, 0.0, 0.0), Components(2.0, 0.0, 0.0))
    assert Metrics(({}, {}), parts).crm_percent == (0.0, 0.0)


# ----------------------------------------------------------------------------------------------------- measured sweeps


def fixed_point(block: MixingBlock, z: Tensor) -> Tensor:
    """The first entry is learned: it needs one sweep too."""
    return oracle.jacobi(lambda x: block.g(x, z), torch.zeros_like(z), z.shape[1])


@dataclass(frozen=True)
class Problem:
    """A block, its map from an oracle (per sample, for the rows at an index), and a solution."""

    block: jf.Block
    g: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    z: Tensor
    labels: Tensor | None


GUIDE = oracle.Guide(1.2, True, "both", 0.7)
PROBLEMS: dict[str, tuple[dict[str, Any], int, oracle.Guide | None]] = {
    "nvp": ({"image_size": 6, "patch_size": 2, "num_blocks": 3}, 0, None),
    "nvp, reversed": ({"image_size": 6, "patch_size": 2, "in_channels": 3}, 1, None),
    "classes": ({"num_classes": 3}, 1, None),
    "vp": ({"image_size": 6, "num_classes": 2, "nvp": False}, 0, None),
    "guided": ({"image_size": 6, "num_classes": 2}, 0, GUIDE),
    "mixing": ({}, -1, None),
}


def problem(name: str, num: int = 3) -> Problem:
    config, i, guide = PROBLEMS[name]
    if i < 0:
        mixing, z = MixingBlock(9, 2), randn(num, 9, 2)
        return Problem(mixing, lambda x, rows: mixing.g(x, z[rows]), fixed_point(mixing, z), z, None)
    flow = make_flow(**config)
    reference, z = oracle.Oracle(flow), latents(flow, num, seed=5) * flow.var.sqrt()
    labels = torch.tensor([0, -1, 1])[:num] if flow.config.num_classes else None

    def g(x: Tensor, rows: Tensor) -> Tensor:
        return reference.g(i, x, z[rows], None if labels is None else labels[rows], guide)

    block: jf.Block = flow.blocks[i]
    if guide is not None:
        block = guided(
            flow.blocks[i],
            jf.Guidance(guide.weight, guide.annealed, guide.on, guide.temperature),
        )
    everything = torch.arange(num)
    return Problem(block, g, oracle.sequential(lambda x: g(x, everything), z), z, labels)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("name", PROBLEMS)
def test_distances_are_those_of_plain_sweeps_without_a_cache(name: str, count: int) -> None:
    """Of segments, with those before solved. Never more sweeps than tokens, after which a segment is exact."""
    p = problem(name)
    ends, rows = ends_of(p.z.shape[1], count), torch.arange(len(p.z))
    for guess in (jf.Latent(), jf.Zeros()):
        curves = distances(p.block, p.x, p.z, guess, p.labels, count)
        assert len(curves) == count
        for curve, start, end in zip(curves, [0, *ends[:-1]], ends, strict=True):
            expected = curve_of(lambda x: p.g(x, rows), p.x, guess(p.z), start, end)
            assert curve.allclose(expected[: len(curve)], EXACT, 1e-10)
            assert len(curve) <= end - start + 1
            assert curve[-1].max() <= 1e-9  # it ends where a sweep changes nothing
            assert not curve.is_inference()


def test_plain_sweeps_are_exact_after_as_many_as_tokens() -> None:
    """Proposition 1, of a block that amplifies errors as long as there are any."""
    flow = linear_flow([3.0])
    x = torch.ones(2, 9, 1, dtype=torch.float64)
    z = x.clone()
    z[:, 1:] -= 3 * x[:, :-1]
    (curve,) = distances(flow.blocks[0], x, z, jf.Zeros())
    assert curve[:-1].min() > 0.9
    assert curve[7].min() > 100
    assert len(curve) <= 10
    assert curve[-1].max() == pytest.approx(0, abs=1e-9)


def test_solution_as_guess_is_at_distance_0() -> None:
    p = problem("nvp")
    for curve in distances(p.block, p.x, p.z, lambda z: p.x.clone(), p.labels, 3):
        assert curve.max() < EXACT


@pytest.mark.parametrize("name", ["nvp", "classes", "guided"])
def test_next_segment_reads_the_solution_not_the_last_sweep_of_the_one_before(name: str) -> None:
    """A segment that starts close ends close, not exact; what follows must not notice."""
    p = problem(name)
    half = p.z.shape[1] // 2
    near = p.x + 1e-6 * randn(*p.x.shape)
    near[:, half:] = 0
    first, second = distances(p.block, p.x, p.z, lambda z: near.clone(), p.labels, count=2)
    assert 0 < first[-1].max() <= 1e-5
    expected = curve_of(lambda x: p.g(x, torch.arange(len(p.z))), p.x, near, half)
    assert second.allclose(expected[: len(second)], EXACT, 1e-10)


class Exploding(jf.AffineBlock):
    """x_t = z_t + exp(x_{t-1} - 1), whose values overflow from a guess far above the solution."""

    def init_cache(self, z: Tensor, context: Tensor | None = None, attn_temperature: Tensor | None = None) -> None:
        return None

    def affine(self, x: Tensor, start: int, stop: int, cache: None) -> tuple[Tensor, Tensor]:
        before = torch.cat((torch.full_like(x[:, :1], -torch.inf), x[:, :-1]), dim=1)[:, start:stop]
        return torch.zeros_like(before), (before - 1).exp()


def test_token_that_overflows_goes_back_to_the_guess_and_is_exact_in_the_end() -> None:
    z = torch.full((2, 6, 1), -0.3, dtype=torch.float64)
    block = Exploding()
    x = oracle.sequential(lambda x: block.update(x, z, 0, 6, None), z)
    assert x.abs().max() < 1
    (curve,) = distances(block, x, z, lambda z: torch.full_like(z, 1000.0))
    assert (curve[0] > 999).all()
    assert torch.isinf(curve[1:6]).all()  # a token less in each sweep
    assert curve[6].max() == 0
    trace = Trace.of(curve)
    assert all(counts == (6, 6) for counts in trace.sweeps.values())
    assert trace.largest[1:] == (math.inf,) * 5 + (0.0,)
    for segment in distances(block, x, z, lambda z: torch.full_like(z, 1000.0), count=3):
        # The first token of a segment follows one that is solved.
        assert torch.isinf(segment[1]).all()
        assert segment[2].max() == 0


def test_trace_counts_the_sweeps_after_which_the_distance_stays_small() -> None:
    """A distance that grows again is not reached before; one that ends above the tolerance is not reached."""
    curve = torch.tensor([[1.0, 5e-4, 0.5], [5e-2, 1e-4, 2.0], [0.2, 0.0, 5e-3], [5e-3, 0.0, 5e-4], [0.0, 0.0, 5e-4]])
    trace = Trace.of(curve.double())
    assert trace.largest == pytest.approx((1.0, 2.0, 0.2, 5e-3, 5e-4))
    assert trace.median == pytest.approx((0.5, 5e-2, 5e-3, 5e-4, 0.0))
    assert trace.sweeps == {1e-1: (3, 0, 2), 1e-2: (3, 0, 2), 1e-3: (4, 0, 3), 1e-4: (4, 1, None)}
    assert trace.slowest(1e-1) == 3
    assert trace.slowest(1e-4) is None
    assert trace.reach(1e-4) == (4, 1, None)
    for measure in (trace.reach, trace.slowest):
        with pytest.raises(ValueError, match=r"tolerance 0\.5: measured are 0\.1, 0\.01, 0\.001, 0\.0001"):
            measure(0.5)


def test_joined_curves_stay_where_they_ended() -> None:
    short, long = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0], [1.0], [0.5], [0.0]])
    expected = torch.tensor([[3.0, 4.0, 2.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.5], [1.0, 0.0, 0.0]])
    assert torch.equal(joined([short, long]), expected)


def test_traces_from_images_are_those_of_plain_sweeps(case: Case) -> None:
    if case.guidance is not None:
        assert list(case.report.traces) == ["noise"]
        return
    reference, labels = oracle.Oracle(case.flow), labels_at(case, case.chosen)
    for i, point in enumerate(walk(case, case.chosen)):
        for name in GUESSES:

            def g(x: Tensor, i: int = i, z: Tensor = point.z) -> Tensor:
                return reference.g(i, x, z, labels)

            curve = curve_of(g, point.x, guess_of(case, i, name, point.z))
            assert_is_curve(case.report.traces["images"][i][name], curve)


def test_sweeps_agree_with_the_curves(case: Case) -> None:
    for rows in case.report.traces.values():
        for row in rows:
            assert tuple(row) == GUESSES
            for trace in row.values():
                assert list(trace.sweeps) == list(TOLERANCES)
                assert len(trace.largest) <= case.flow.config.num_tokens + 1
                for tolerance, counts in trace.sweeps.items():
                    assert len(counts) == TRACED
                    slowest = trace.slowest(tolerance)
                    assert slowest == max(counts)
                    assert max(trace.largest[slowest:]) <= tolerance
                    assert slowest == 0 or trace.largest[slowest - 1] > tolerance
                assert all(middle <= most for middle, most in zip(trace.median, trace.largest, strict=True))


def test_mean_and_slowest_sweeps_are_over_the_samples(case: Case) -> None:
    for start, rows in case.report.traces.items():
        for tolerance in TOLERANCES:
            for name in GUESSES:
                expected = [np.mean(row[name].sweeps[tolerance]) for row in rows]
                assert case.report.mean_sweeps(start, tolerance, name) == pytest.approx(expected)
                slowest = tuple(row[name].slowest(tolerance) for row in rows)
                assert case.report.slowest_sweeps(start, tolerance, name) == slowest
            best = [row[case.report.best_guess(i)].sweeps[tolerance] for i, row in enumerate(rows)]
            assert case.report.mean_sweeps(start, tolerance) == pytest.approx([np.mean(counts) for counts in best])
            assert case.report.slowest_sweeps(start, tolerance) == tuple(max(counts) for counts in best)
    for measure in (case.report.mean_sweeps, case.report.slowest_sweeps):
        with pytest.raises(ValueError, match=r"tolerance 0\.5"):
            measure("noise", 0.5)
        if case.guidance is not None:
            with pytest.raises(ValueError, match="'images': measured are those from noise"):
                measure("images", 1e-3)


def test_sample_that_does_not_get_there_counts_all_tokens(tough: Case) -> None:
    trace = Trace((1.0,), (1.0,), {1e-3: (2, None, 3)})
    traces = {"noise": tuple(dict.fromkeys(GUESSES, trace) for _ in range(4))}
    report = replace(tough.report, traces=traces)
    assert report.mean_sweeps("noise", 1e-3) == pytest.approx(((2 + 9 + 3) / 3,) * 4)
    assert report.slowest_sweeps("noise", 1e-3) == (9,) * 4


@dataclass(frozen=True)
class Solved:
    x: Tensor
    z: Tensor
    labels: Tensor | None


def solutions(case: Case, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> tuple[Report, dict[str, list[Solved]]]:
    """What `calibrate` measures sweeps against, per start and block."""
    module, seen = importlib.import_module("jacobiflow.calibration.calibrate"), []

    def spy(block: Any, x: Tensor, z: Tensor, guess: Any, labels: Tensor | None = None, count: int = 1) -> list[Tensor]:
        seen.append(Solved(x, z, labels))
        return distances(block, x, z, guess, labels, count)

    monkeypatch.setattr(module, "distances", spy)
    report = jf.calibrate(case.flow, case.images, case.labels, guidance=case.guidance, traced=TRACED, seed=seed)
    starts, num = list(report.traces), case.flow.config.num_blocks
    return report, {start: seen[3 * num * k : 3 * num * (k + 1) : 3] for k, start in enumerate(starts)}


def test_sweeps_from_noise_are_of_fixed_points_of_the_guided_map(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample's blocks follow from each other, and its labels are those of the images."""
    reference = oracle.Oracle(case.flow)
    report, found = solutions(case, monkeypatch)
    tokens = None
    for i in reversed(range(reference.num_blocks)):
        at = found["noise"][i]
        labels = labels_at(case, case.chosen)
        assert (at.labels is None) == (labels is None)
        assert labels is None or torch.equal(at.labels, labels)
        assert reference.g(i, at.x, at.z, labels, case.guide).allclose(at.x, EXACT, EXACT)
        if tokens is not None:
            assert torch.equal(at.z, reference.flip(i, tokens))
        tokens = reference.flip(i, at.x)
        for name in GUESSES:

            def g(x: Tensor, i: int = i, at: Solved = at, labels: Tensor | None = labels) -> Tensor:
                return reference.g(i, x, at.z, labels, case.guide)

            mine = Case(case.flow, case.images, case.labels, case.guidance, case.guide, report)
            assert_is_curve(report.traces["noise"][i][name], curve_of(g, at.x, guess_of(mine, i, name, at.z)))


def test_sweeps_from_images_are_of_the_images(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = solutions(case, monkeypatch)
    if case.guidance is not None:
        assert list(found) == ["noise"]
        return
    for at, point in zip(found["images"], walk(case, case.chosen), strict=True):
        assert at.x.allclose(point.x, EXACT, EXACT)
        assert at.z.allclose(point.z, EXACT, EXACT)


def test_latents_are_seeded_and_none_that_samples_are_drawn_from(
    classes: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(seed: int) -> Tensor:
        return solutions(classes, monkeypatch, seed)[1]["noise"][-1].z

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(first, again)
    last = len(classes.flow.blocks) - 1
    samples = jf.sample(classes.flow, 64, seed=0, strategy="jacobi", certify=False, progress=False)
    taken = oracle.Oracle(classes.flow).flip(last, samples.latents.double())
    for mine in (first, other):
        assert torch.cdist(mine.flatten(1), taken.flatten(1)).min() > 0.1
    assert torch.cdist(first.flatten(1), other.flatten(1)).min() > 0.1
    # Standard normal, but for chance.
    assert abs(float(torch.cat((first, other)).mean())) < 0.2
    assert abs(float(torch.cat((first, other)).std()) - 1) < 0.2


# ----------------------------------------------------------------------------------------------------- the error matrix


def dense_gamma(p: Problem, n: int) -> np.ndarray:
    """dg/dx of sample n at its solution, (TC, TC)."""
    size = p.x[n].numel()
    rows = torch.tensor([n])
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: p.g(x, rows), p.x[n : n + 1])
    return jacobian.reshape(size, size).detach().numpy()


@pytest.mark.parametrize("name", PROBLEMS)
def test_gamma_products_and_norm_are_those_of_the_dense_jacobian(name: str) -> None:
    p = problem(name)
    v = randn(*p.x.shape)
    product, transposed = gamma_products(p.block, p.x, p.z, p.labels)
    estimate = gamma_norm(p.block, p.x, p.z, p.labels)
    converged = gamma_norm(p.block, p.x, p.z, p.labels, rtol=1e-13, max_iterations=3000, seed=1)
    for n in range(len(p.x)):
        gamma, row = dense_gamma(p, n), v[n].flatten().numpy()
        assert np.allclose(product(v)[n].flatten().numpy(), gamma @ row, atol=EXACT)
        assert np.allclose(transposed(v)[n].flatten().numpy(), gamma.T @ row, atol=EXACT)
        norm = np.linalg.norm(gamma, 2)
        assert norm > 0.1
        assert float(converged[n]) == pytest.approx(norm, rel=1e-6)
        assert 0.97 * norm <= float(estimate[n]) <= norm * (1 + EXACT)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gamma_is_strictly_lower_triangular_in_the_tokens_and_so_nilpotent(name: str) -> None:
    p = problem(name)
    product, transposed = gamma_products(p.block, p.x, p.z, p.labels)
    length = p.x.shape[1]
    v = randn(*p.x.shape)
    for t in range(length):
        late, early = v.clone(), v.clone()
        late[:, :t] = 0
        early[:, t + 1 :] = 0
        assert product(late)[:, : t + 1].abs().max() < 1e-12
        assert transposed(early)[:, t:].abs().max() < 1e-12
    for multiply in (product, transposed):
        power = v
        for _ in range(length):
            power = multiply(power)
        assert power.abs().max() < 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_gamma_predicts_the_next_error_to_first_order(name: str) -> None:
    """Half the error is off by a quarter; the norm bounds the ratio of errors, and the top direction attains it."""
    p = problem(name)
    rows = torch.arange(len(p.x))
    product, transposed = gamma_products(p.block, p.x, p.z, p.labels)
    error = randn(*p.x.shape, seed=3)
    off = []
    for size in (2e-3, 1e-3):
        following = p.g(p.x + size * error, rows) - p.x
        off.append((following - product(size * error)).norm(dim=(1, 2)))
        assert (off[-1] < 0.1 * following.norm(dim=(1, 2))).all()
    assert ((off[0] / off[1] - 4).abs() < 0.2).all()

    norm = gamma_norm(p.block, p.x, p.z, p.labels, rtol=1e-13, max_iterations=3000)
    top = error
    for _ in range(300):
        top = transposed(product(top))
        top = top / top.norm(dim=(1, 2), keepdim=True)
    for direction, least in ((error, 0.0), (torch.sign(error), 0.0), (top, 0.99)):
        small = 1e-6 * direction
        ratio = (p.g(p.x + small, rows) - p.x).norm(dim=(1, 2)) / small.norm(dim=(1, 2))
        assert (ratio <= norm * (1 + 1e-4)).all()
        assert (ratio >= least * norm).all()


def test_gamma_in_the_report_is_the_norm_at_the_traced_solutions(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = oracle.Oracle(case.flow)
    report, found = solutions(case, monkeypatch)
    for i, at in enumerate(found["images" if case.guidance is None else "noise"]):
        labels = labels_at(case, case.chosen)

        def g(x: Tensor, rows: Tensor, i: int = i, at: Solved = at, labels: Tensor | None = labels) -> Tensor:
            return reference.g(i, x, at.z[rows], None if labels is None else labels[rows], case.guide)

        p = Problem(case.flow.blocks[i], g, at.x, at.z, labels)
        norms = [np.linalg.norm(dense_gamma(p, n), 2) for n in range(TRACED)]
        assert len(report.gamma[i]) == TRACED
        assert all(0.97 * norm <= mine <= norm * (1 + 1e-6) for mine, norm in zip(report.gamma[i], norms, strict=True))


class Constant(jf.AffineBlock):
    """g = z + 1."""

    def init_cache(self, z: Tensor, context: Tensor | None = None, attn_temperature: Tensor | None = None) -> None:
        return None

    def affine(self, x: Tensor, start: int, stop: int, cache: None) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x[:, start:stop]), torch.ones_like(x[:, start:stop])


@pytest.mark.parametrize("name", ["constant", "fresh flow", "frozen fresh flow", "first token alone"])
def test_gamma_of_a_block_that_does_not_depend_on_x_is_0(name: str) -> None:
    block: jf.Block
    if name == "constant":
        block, size = Constant(), (2, 5, 3)
    else:
        patch = 6 if name == "first token alone" else 3
        flow = jf.TarFlow(jf.TarFlowConfig(1, 6, patch, 16, 1, 1, head_dim=16)).double()
        flow.requires_grad_(name != "frozen fresh flow")
        block, size = flow.blocks[0], (2, (6 // patch) ** 2, patch**2)
    x, z = randn(*size), randn(*size, seed=1)
    assert torch.equal(gamma_norm(block, x, z), torch.zeros(2, dtype=torch.float64))
    for multiply in gamma_products(block, x, z):
        assert torch.equal(multiply(torch.ones_like(x)), torch.zeros_like(x))


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_gamma_of_real_weights_in_any_mode_of_autograd(mode: Callable[[], Any]) -> None:
    flow = jf.load("digits-p1")
    flow.requires_grad_(True)
    images, labels = digits().batch(slice(0, 2))
    images = add_noise(images, Noise("gaussian", 0.1), torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = flow.patchify(images)
        log_scale, shift = flow.blocks[0](x, labels)
        z = (x - shift) * torch.exp(-log_scale)
    with mode():
        norm = gamma_norm(flow.blocks[0], x, z, labels)
        product, _ = gamma_products(flow.blocks[0], x, z, labels)
        image = product(torch.ones_like(x))
    assert norm.dtype == torch.float32
    assert labels is not None
    reference = oracle.Oracle(flow)
    p = Problem(
        flow.blocks[0],
        lambda x, rows: reference.g(0, x, z[rows].double(), labels[rows]),
        x.double(),
        z.double(),
        labels,
    )
    for n in range(2):
        gamma = dense_gamma(p, n)
        assert 0.97 * np.linalg.norm(gamma, 2) <= float(norm[n]) <= 1.0001 * np.linalg.norm(gamma, 2)
        assert image[n].flatten().numpy() == pytest.approx(gamma.sum(axis=1), rel=1e-3, abs=1e-4)
    assert all(parameter.grad is None for parameter in flow.parameters())


# ----------------------------------------------------------------------------------------------------------- the report


def test_report_survives_its_file(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    case.report.save(path)
    assert Report.load(path) == case.report
    assert Report.load(str(path)) == case.report
    assert Report.from_json(case.report.to_json()) == case.report
    json.loads(path.read_text(), parse_constant=pytest.fail)  # JSON has no infinity and no NaN
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_reports_of_different_settings_are_not_equal(classes: Case) -> None:
    other = jf.calibrate(classes.flow, classes.images, classes.labels, "fro", traced=TRACED, segments=3, seed=1)
    assert other != classes.report
    assert replace(classes.report, mean_affine=classes.report.mean_affine[::-1]) != classes.report


@pytest.fixture(scope="module")
def overflowing() -> Report:
    flow = overflowing_flow()
    signs = torch.tensor([[1.0, -1, 1, 1, -1, -1, 1, -1, 1], [1.0, 1, -1, -1, 1, 1, -1, 1, 1]], dtype=torch.float64)
    return jf.calibrate(flow, signs.view(2, 1, 3, 3), segments=9)


def test_guess_that_overflows_is_infinitely_bad_and_its_sweeps_end_all_the_same(
    overflowing: Report, tmp_path: Path
) -> None:
    for norm in NORMS:
        igm = overflowing.metrics[norm].igm[0]
        assert igm["latent"] == math.inf
        assert 1 < igm["zeros"] < math.inf
    assert overflowing.best_guess(0) == "zeros"
    trace = overflowing.traces["images"][0]["latent"]
    assert math.inf in trace.largest
    assert trace.largest[-1] <= 1e-2  # latents of size exp(50) amplify rounding
    assert (trace.slowest(1e-2) or 0) > 1
    # Where the tokens before are exact there is nothing to overflow.
    assert all(igm["latent"] < 1e-6 for igm in overflowing.segment_metrics[0].igm)

    overflowing.save(tmp_path / "report.json")
    loaded = Report.load(tmp_path / "report.json")
    assert loaded == overflowing
    assert loaded.igm[0]["latent"] == math.inf


def test_infinities_survive_the_file_wherever_a_number_can_be_one(tough: Case, tmp_path: Path) -> None:
    parts = (Components(math.inf, 1.0, 1.0), *(tough.report.components or ())[1:])
    infinite = Metrics(tuple(dict.fromkeys(row, math.inf) for row in tough.report.igm), parts)
    trace = Trace((math.inf, 0.0), (math.inf, 0.0), dict.fromkeys(TOLERANCES, (1, None)))
    report = replace(
        tough.report,
        metrics={**tough.report.metrics, 2: infinite},
        segment_metrics=(infinite,) * 4,
        class_metrics={0: infinite},
        traces={"noise": (dict.fromkeys(GUESSES, trace),) * 4},
        segment_traces={2: {1: (trace,)}},
        gamma=((math.inf, 1.0),) * 4,
    )
    report.save(tmp_path / "report.json")
    loaded = Report.load(tmp_path / "report.json")
    assert loaded.traces == report.traces
    assert loaded.segment_traces == report.segment_traces
    assert loaded.gamma == report.gamma
    assert loaded.igm == report.igm
    assert loaded == report


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_report_fits_its_flow_in_any_dtype_and_no_other(dtype: torch.dtype) -> None:
    flow = to_float32(make_flow(image_size=6, num_classes=2))
    report = jf.calibrate(flow, some_images(flow, 4).float(), traced=1)
    report.check(copy.deepcopy(flow).to(dtype))
    with pytest.raises(ValueError, match=r"of another flow.*calibrate this one"):
        report.check(to_float32(make_flow(image_size=6, num_classes=2, seed=1)).to(dtype))
    changed = copy.deepcopy(flow)
    with torch.no_grad():
        changed.var[3, 1] = 2
    with pytest.raises(ValueError, match="of another flow"):
        report.check(changed.to(dtype))


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_narrow_weights_give_nearly_the_same_metrics(dtype: torch.dtype, rel: float) -> None:
    exact = make_flow(image_size=6, num_classes=2)
    images, labels = some_images(exact, 5), some_labels(exact, 5)
    narrow = copy.deepcopy(exact).to(dtype)
    expected = jf.calibrate(exact, images, labels, traced=1)
    for given_images in (images, images.float()):
        report = jf.calibrate(narrow, given_images, labels, traced=1)
        assert report.crm == pytest.approx(expected.crm, rel=rel)
        assert np.array(report.gamma) == pytest.approx(np.array(expected.gamma), rel=rel)
        for mine, row in zip(report.igm, expected.igm, strict=True):
            assert mine == pytest.approx(row, rel=5 * rel)


def test_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(ValueError, match=r"report .*: cannot be read"):
            Report.load(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2", "null", "3", "[]", "{}", '"a"', '{"schema_version": 2}', b"\xff\xfe\x00", "[" * 100_000],
    ids=["empty", "open", "list", "null", "number", "array", "object", "string", "version", "bytes", "deep"],
)
def test_file_that_is_no_report_is_a_clear_error(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=r"report .*report\.json: .*; make it anew with jacobiflow calibrate"):
        Report.load(path)


def test_every_truncation_and_another_version_are_refused(tough: Case, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    tough.report.save(path)
    text = path.read_text()
    for end in range(0, len(text.rstrip()), 97):
        path.write_text(text[:end])
        with pytest.raises(ValueError, match="make it anew"):
            Report.load(path)
    for version in (0, 2, "1", None):
        with pytest.raises(ValueError, match="schema_version 1"):
            Report.from_json(tough.report.to_json() | {"schema_version": version})


@pytest.mark.parametrize(
    "path",
    [
        *[(name,) for name in (
            "schema_version", "fingerprint", "num_tokens", "token_channels", "settings", "metrics", "segment_metrics",
            "class_metrics", "mean_affine", "traces", "segment_traces", "gamma",
        )],
        *[("settings", name) for name in ("num_images", "labelled", "norm", "guidance", "segments", "traced", "seed")],
        ("metrics", "2", "igm"), ("metrics", "2", "components"), ("metrics", "2", "components", 0, "scale_weight"),
        ("segment_metrics", 0, "igm"), ("mean_affine", 0, "shift"), ("mean_affine", 0, "shift", "shape"),
        ("traces", "noise", 0, "zeros", "median"), ("traces", "noise", 0, "zeros", "sweeps"),
        ("segment_traces", "2", "1", 0, "largest"),
    ],
    ids=lambda path: ".".join(map(str, path)),
)  # fmt: skip
def test_missing_entry_is_named(tough: Case, path: tuple[Any, ...]) -> None:
    value = json.loads(json.dumps(tough.report.to_json()))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(ValueError, match=path[-1]):
        Report.from_json(value)


def everywhere(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all entries inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from everywhere(inner, (*path, key))


@pytest.fixture(scope="module")
def written(tough: Case) -> tuple[Any, list[tuple[Any, ...]]]:
    """A report that has everything as JSON, and one path of each kind in it."""
    report = replace(tough.report, settings=replace(tough.report.settings, guidance=jf.Guidance(1.0)))
    value = json.loads(json.dumps(report.to_json()))
    kinds = {tuple("*" if isinstance(key, int) else key for key in path): path for path in everywhere(value)}
    return value, list(kinds.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=600, deadline=None, derandomize=True)
def test_any_entry_of_another_kind_is_a_value_error_or_a_report(
    written: tuple[Any, list[tuple[Any, ...]]], data: st.DataObject
) -> None:
    value, paths = written
    path = data.draw(st.sampled_from(paths))
    assert_refused_or_round_trip(put(value, path, data.draw(JSON)))


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        (("mean_affine", 0, "shift", "shape"), [2**70, 1]),
        (("mean_affine", 0, "shift", "shape"), None),
        (("mean_affine", 0, "shift", "shape"), [-1, 1]),
        (("mean_affine", 0, "shift", "shape"), [[9], 1]),
        (("mean_affine", 0, "shift", "float32"), "ü"),
        (("mean_affine", 0, "shift", "float32"), ""),
        (("metrics",), {"2": None}),
        (("metrics", "2", "components"), [[1.0, 2.0, 3.0]]),
        (("settings", "guidance"), {"weight": "1"}),
        (("settings", "guidance"), {"weight": 1.0, "on": []}),
        (("settings",), [["guidance", None]]),
        (("traces", "noise"), {"0": 1}),
        (("segment_traces",), {"a": {}}),
        (("class_metrics",), {"1" * 5000: {}}),
        (("gamma",), [[10**400]]),
    ],
)  # fmt: skip
def test_known_nasty_entries_are_a_value_error_or_a_report(
    written: tuple[Any, list[tuple[Any, ...]]], path: tuple[Any, ...], entry: Any
) -> None:
    assert_refused_or_round_trip(put(written[0], path, entry))


def assert_refused_or_round_trip(value: Any) -> None:
    try:
        report = Report.from_json(value)
    except ValueError:
        return
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


@given(pairs=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
@example(pairs=[(1, 1), (1, 2), (1, 3)])
@settings(max_examples=150, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_rank_correlation_is_spearman_s_ties_included(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    expected = scipy.stats.spearmanr(first, second).statistic
    assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_report_correlates_metrics_with_mean_sweeps(case: Case) -> None:
    gamma = [float(np.mean(norms)) for norms in case.report.gamma]
    for metric, values in (("crm", case.report.crm), ("gamma", gamma)):
        for tolerance in (1e-2, 1e-3):
            expected = rank_correlation(values, case.report.mean_sweeps("noise", tolerance))
            mine = case.report.rank_correlation(metric, tolerance=tolerance)
            assert mine == pytest.approx(expected, nan_ok=True)


def test_class_spread_is_the_mean_and_deviation_over_classes(case: Case) -> None:
    if not case.report.class_metrics:
        with pytest.raises(ValueError, match="per_class=True"):
            case.report.class_spread()
        return
    spreads = case.report.class_spread()
    per_class = list(case.report.class_metrics.values())
    values = np.array([metrics.crm for metrics in per_class])
    ranks = scipy.stats.rankdata(values, axis=1)
    percent = 100 * values / values.sum(axis=1, keepdims=True)
    assert len(spreads) == case.report.num_blocks
    for i, spread in enumerate(spreads):
        assert spread.rank == pytest.approx((ranks[:, i].mean(), ranks[:, i].std()))
        assert spread.percent == pytest.approx((percent[:, i].mean(), percent[:, i].std()))
        igm = {name: np.array([metrics.igm[i][name] for metrics in per_class]) for name in GUESSES}
        for name in GUESSES:
            assert spread.igm[name] == pytest.approx((igm[name].mean(), igm[name].std()))
        winners = np.argmin(np.stack([igm[name] for name in GUESSES]), axis=0)
        assert spread.wins == {name: int((winners == k).sum()) for k, name in enumerate(GUESSES)}
        assert sum(spread.wins.values()) == len(per_class)


# --------------------------------------------------------------------------------------------------------------- errors


def test_images_that_do_not_fit_are_refused() -> None:
    flow = make_flow(num_classes=3)
    images = some_images(flow, 4)
    for wrong, message in (
        (images[:1], r"images: 1 of them; give at least 2"),
        (images[:0], r"images: 0 of them; give at least 2"),
        (images[:, :, :, :7], r"images: torch.float64 of shape \(4, 1, 8, 7\).*\(N, 1, 8, 8\)"),
        (images[:, 0], r"images: .*shape \(4, 8, 8\).*\(N, 1, 8, 8\)"),
        (images.expand(4, 3, 8, 8), r"images: .*shape \(4, 3, 8, 8\)"),
        ((images * 100).to(torch.uint8), r"images: torch.uint8 .*floating-point"),
        ((images * 100).long(), r"images: torch.int64 .*floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            jf.calibrate(flow, wrong)


@pytest.mark.parametrize("number", [0, 5, 10])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_image_that_is_not_finite_is_named(number: int, value: float) -> None:
    """In a later batch, too; of several the first."""
    flow = make_flow(image_size=6)
    images = some_images(flow, 11)
    images[number, 0, 1, 2] = images[10, 0, 0, 0] = value
    with pytest.raises(ValueError, match=rf"images: number {number} holds a NaN or an infinity; leave it out"):
        jf.calibrate(flow, images, batch_size=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": torch.tensor([0, 1, 3, 0])}, "label 3: this flow has classes 0 to 2"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels of shape \(3,\).*give 4 whole numbers"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, r"labels of shape \(4, 1\).*give 4 whole numbers"),
        ({"labels": torch.zeros(4)}, r"torch.float32: give 4 whole numbers"),
        ({"labels": [0, 1, 2, 0]}, "labels"),
        ({"norm": 3}, "norm=3: give 2, 'fro' or 1"),
        ({"norm": "2"}, "norm='2': give 2, 'fro' or 1"),
        ({"norm": None}, "norm=None"),
        ({"guidance": 1.5}, "guidance=1.5"),
        ({"segments": 0}, r"count=0.*positive"),
        ({"segments": 17}, r"count=17.*only 16 tokens"),
        ({"segments": 2.0}, r"count=2.0.*whole number"),
        ({"traced": 0}, "traced=0: give a positive whole number"),
        ({"traced": 1.5}, "traced=1.5: give a positive whole number"),
        ({"batch_size": 0}, "batch_size=0: give a positive whole number"),
        ({"batch_size": -3}, "batch_size=-3: give a positive whole number"),
        ({"per_class": True}, "per_class: give the labels"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    flow = make_flow(num_classes=3)
    with pytest.raises(ValueError, match=message):
        jf.calibrate(flow, some_images(flow, 4), **settings)


def test_labels_for_a_flow_without_classes_are_refused() -> None:
    flow = make_flow(image_size=6)
    with pytest.raises(ValueError, match="unconditional: leave them out"):
        jf.calibrate(flow, some_images(flow, 4), torch.tensor([0, 1, 0, 1]))


def test_latents_that_overflow_in_the_exact_inverse_are_counted() -> None:
    flow = overflowing_flow()
    flow.var.fill_(1.0)
    with pytest.raises(ValueError, match=r"of 2 fresh latents overflow in the exact inverse of block 0; lower"):
        jf.calibrate(flow, torch.full((2, 1, 3, 3), 0.01).double())


def test_images_that_overflow_when_encoded_are_refused_or_make_a_report_that_can_be_read(tmp_path: Path) -> None:
    flow = linear_flow([0.1, 0.1])
    with torch.no_grad():
        flow.blocks[0].proj_out.weight[0, 0] = -800
        flow.var.fill_(1e-12)  # fresh latents do not overflow
    try:
        report = jf.calibrate(flow, torch.ones(2, 1, 3, 3).double(), segments=4)
    except ValueError:
        return
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_more_traced_than_images_takes_all_images() -> None:
    flow = make_flow(image_size=6)
    report = jf.calibrate(flow, some_images(flow, 3), traced=50)
    assert report.settings.traced == 3
    assert len(report.traces["images"][0]["latent"].sweeps[1e-3]) == 3


# --------------------------------------------------------------------------------------------------------- side effects


def test_calibrating_changes_neither_images_nor_flow_nor_the_generator(classes: Case) -> None:
    flow, images = copy.deepcopy(classes.flow).train(), classes.images.clone()
    flow.requires_grad_(True)
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].tolist()
    report = jf.calibrate(
        flow, images, classes.labels, "fro", segments=3, traced=TRACED, per_class=True, batch_size=4
    )  # fmt: skip
    assert report == classes.report
    assert torch.equal(images, classes.images)
    assert flow.training
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state
    for name, value in flow.state_dict().items():
        assert torch.equal(value, classes.flow.state_dict()[name])
    for parameter in flow.parameters():
        assert parameter.requires_grad
        assert parameter.grad is None

    before = (loss := -flow.log_prob(images, classes.labels).mean()).item()
    optimizer = torch.optim.SGD(flow.parameters(), 1e-4)
    loss.backward()
    optimizer.step()
    assert -flow.log_prob(images, classes.labels).mean().item() < before


def test_images_that_require_gradients_get_none(classes: Case) -> None:
    images = classes.images.clone().requires_grad_()
    report = jf.calibrate(
        classes.flow, images, classes.labels, "fro", segments=3, traced=TRACED, per_class=True, batch_size=4
    )  # fmt: skip
    assert_same_up_to_rounding(report, classes.report)
    assert images.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("guidance", [None, jf.Guidance(0.5, attn_temperature=0.9)])
def test_calibrating_works_in_any_mode_of_autograd(
    classes: Case, mode: Callable[[], Any], guidance: jf.Guidance | None
) -> None:
    settings: dict[str, Any] = {"guidance": guidance, "traced": 2}
    expected = jf.calibrate(classes.flow, classes.images, classes.labels, **settings)
    with mode():
        report = jf.calibrate(classes.flow, classes.images, classes.labels, **settings)
    assert report == expected


def test_same_seed_same_report_and_another_seed_changes_the_noise_only(classes: Case) -> None:
    settings: dict[str, Any] = {"norm": "fro", "segments": 3, "traced": TRACED, "per_class": True, "batch_size": 4}
    assert jf.calibrate(classes.flow, classes.images, classes.labels, **settings) == classes.report
    other = jf.calibrate(classes.flow, classes.images, classes.labels, seed=1, **settings)
    assert (other.metrics, other.mean_affine) == (classes.report.metrics, classes.report.mean_affine)
    assert other.traces["images"] == classes.report.traces["images"]
    assert other.traces["noise"] != classes.report.traces["noise"]


def test_guidance_of_weight_0_changes_no_metric(classes: Case) -> None:
    report = jf.calibrate(
        classes.flow, classes.images, classes.labels, "fro", jf.Guidance(0.0), segments=3, traced=TRACED, batch_size=4
    )  # fmt: skip
    assert report.metrics == classes.report.metrics
    assert report.traces["noise"] == classes.report.traces["noise"]


# ------------------------------------------------------------------------------------------- without an output layer


@pytest.mark.parametrize("without", [(0, 1), (1,)])
def test_crm_is_not_defined_without_a_linear_output_layer(
    without: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any block: the others' are not comparable then. IGM and sweeps are there."""
    flow = copy.deepcopy(make_flow(num_classes=3))
    expected = calibrated(CASES["nvp, classes"]).report
    for i in without:
        monkeypatch.setattr(flow.blocks[i], "output_weights", lambda: None)
    report = jf.calibrate(
        flow, some_images(flow, 11), some_labels(flow, 11), "fro", segments=3, traced=TRACED, per_class=True,
        batch_size=4,
    )  # fmt: skip
    assert report.components is None
    assert report.igm == expected.igm
    assert report.traces == expected.traces
    assert report.segment_traces == {}
    for of in (
        lambda: report.crm, lambda: report.crm_percent, lambda: report.tough_blocks,
        lambda: report.rank_correlation("crm"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="CRM is not defined"):
            of()
    assert report.rank_correlation("gamma") == pytest.approx(expected.rank_correlation("gamma"), nan_ok=True)
    for spread in report.class_spread():
        assert (spread.rank, spread.percent) == (None, None)
        assert sum(spread.wins.values()) == 4
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_guided_block_has_the_output_layer_of_its_block() -> None:
    block = make_flow(num_classes=3).blocks[0]
    for mine, weight in zip(
        guided(block, jf.Guidance(1.0)).output_weights() or (), block.proj_out.weight.chunk(2), strict=True
    ):
        assert mine is not None
        assert torch.equal(mine, weight)
    assert MixingBlock(4, 2).output_weights() is None


# --------------------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def fashion() -> Report:
    flow = jf.load("fashion-p2")
    images, labels = bundled_fashion().batch(slice(0, 64))
    images = add_noise(images, Noise("gaussian", 0.1), torch.Generator().manual_seed(0))
    return jf.calibrate(flow, images, labels, traced=2, progress=False)


def test_the_last_block_of_the_bundled_model_is_tough(fashion: Report) -> None:
    assert max(range(8), key=lambda i: fashion.crm[i]) == 7
    assert fashion.tough_blocks == (7,)
    for start in ("images", "noise"):
        sweeps = fashion.mean_sweeps(start, 1e-3)
        assert sweeps[7] > 2 * max(sweeps[:7])


def test_the_latent_is_no_worse_a_guess_than_zeros_for_the_bundled_model(fashion: Report) -> None:
    for start in ("images", "noise"):
        latent, zeros = (np.mean(fashion.mean_sweeps(start, 1e-3, name)) for name in ("latent", "zeros"))
        assert latent <= zeros


def test_segments_of_the_tough_block_need_fewer_sweeps_each(fashion: Report) -> None:
    """Figure 5 of the paper beside Figure 2."""
    traces = fashion.segment_traces[7]
    assert set(traces) >= {1, 8}
    whole = traces[1][0].slowest(1e-3)
    assert whole is not None
    assert all((trace.slowest(1e-3) or 0) <= whole for trace in traces[8])
    assert np.mean([trace.slowest(1e-3) for trace in traces[8]]) < 0.75 * whole


def test_report_of_the_bundled_model_survives_its_file(fashion: Report, tmp_path: Path) -> None:
    fashion.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == fashion
    fashion.check(jf.load("fashion-p2"))
    with pytest.raises(ValueError, match="of another flow"):
        fashion.check(jf.load("digits-p1"))
