"""Metrics, sweeps and error matrices of small float64 flows, at images and at fresh latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from functools import cache
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.calibration import (
    CalibrationReport,
    CalibrationSettings,
    ConvergenceCurve,
    Metrics,
    gamma_norm,
    initial_residuals,
    measure_distances,
)
from jacobiflow.calibration.report import guesses_by_name
from jacobiflow.models.latents import draw_latents
from jacobiflow.utils.progress import Progress
from tests.helpers.calibration_problems import linear_flow, randn, runs_of, way_back
from tests.helpers.problems import make_flow, make_maf

pytestmark = pytest.mark.usefixtures("one_thread")

CHOSEN = torch.tensor([0, 3])  # of 7 images, the two whose sweeps are measured: evenly spaced
CASES: dict[str, tuple[Callable[[], Any], jf.Guidance | None, Any, int]] = {  # flow, guidance, norm, segments
    "classes": (lambda: make_flow(num_classes=3), None, "fro", 3),
    "tough": (lambda: linear_flow([0.15, 0.15, 2.0, 0.15, 0.15], num_classes=2, nvp=False), None, 2, 4),
    "guided": (lambda: make_flow(image_size=6, num_classes=2), jf.Guidance(1.5, True, "both", 0.8), 2, 4),
    "MAF": (make_maf, None, 1, 2),
}


def images_of(flow: Any) -> Tensor:
    config = flow.config
    return randn(7, config.in_channels, config.image_size, config.image_size, seed=2).tanh()


FLOW = make_flow(num_classes=3)
IMAGES = images_of(FLOW)


class Case:
    """A flow, its report, and what to expect of it."""

    def __init__(self, name: str) -> None:
        make, self.guidance, self.norm, self.segments = CASES[name]
        self.flow = make()
        self.guided, self.images = self.flow.guided(self.guidance), images_of(self.flow)
        self.blocks = [self.guided.inverse_block(i) for i in range(self.guided.config.num_blocks)]
        self.labels = torch.tensor([-1, 1, 0, 0, 1, -1, self.flow.config.num_classes - 1])  # some without a class
        self.settings = {
            "norm": self.norm,
            "segments": self.segments,
            "num_convergence_samples": 2,
            "per_class": True,
            "batch_size": 4,
        }
        self.report = self.calibrate(self.images)

    def calibrate(self, images: Any, **changed: Any) -> CalibrationReport:
        return jf.calibrate(self.guided, images, self.labels, **self.settings | changed)

    @torch.no_grad()
    def walk(self, rows: Any = slice(None)) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yields X* of each block, and its guided z, scale and shift; the images are encoded without guidance."""
        x = self.flow.to_tokens(self.images[rows])
        for i, block in enumerate(self.flow.blocks):
            x = block.permutation(x)
            log_scale, shift = self.blocks[i].affine_whole(x, jf.Context(self.labels)[rows])
            yield x, (x - shift) / log_scale.exp(), log_scale.exp(), shift
            x = block.permutation.inverse(block.encode(x, jf.Context(self.labels)[rows])[0])

    def metrics(self, rows: Any, norm: Any, count: int = 1) -> list[Any]:
        """Returns IGM of each guess and the components of CRM, per block and segment."""
        measured = []
        for i, (x, z, scale, _) in enumerate(self.walk(rows)):
            residuals = {
                name: initial_residuals(self.blocks[i], x, z, guess, self.labels[rows], count).mean(dim=0)
                for name, guess in guesses_by_name(self.report.mean_affine[i]).items()
            }
            w_s, w_u = self.flow.blocks[i].output_weights()
            for run in runs_of(x.shape[1], count):
                igm = {name: np.linalg.norm(mean[run].numpy(), norm) for name, mean in residuals.items()}
                matrices = (x / scale).mean(dim=0)[run], torch.zeros_like(w_u) if w_s is None else w_s, w_u
                measured.append((igm, [np.linalg.norm(matrix.detach().numpy(), norm) for matrix in matrices]))
        return measured

    def curves(self, i: int, x: Tensor, z: Tensor, guess: str, count: int = 1) -> list[ConvergenceCurve]:
        """Returns the curve of each segment over the samples whose sweeps are measured."""
        start = guesses_by_name(self.report.mean_affine[i])[guess]
        curves = measure_distances(self.blocks[i], x, z, start, self.labels[CHOSEN], count)
        return [ConvergenceCurve.from_distances([curve]) for curve in curves]


case_of = cache(Case)


@pytest.fixture
def classes() -> Case:
    return case_of("classes")


def assert_metrics(metrics: Metrics, expected: list[Any]) -> None:
    assert len(metrics.igm) == len(expected)
    for igm, (row, _) in zip(metrics.igm, expected, strict=True):
        assert igm == pytest.approx(row, rel=1e-8, abs=1e-12)  # absolute: one sweep may make a token exact
    assert metrics.components is not None
    components = np.array([astuple(part) for part in metrics.components])
    assert components == pytest.approx(np.array([parts for _, parts in expected]), rel=1e-9)


def assert_curves(curves: Sequence[ConvergenceCurve], expected: Sequence[ConvergenceCurve]) -> None:
    assert [curve.sweeps for curve in curves] == [curve.sweeps for curve in expected]
    for curve, other in zip(curves, expected, strict=True):
        assert curve.largest == pytest.approx(other.largest, rel=1e-6, abs=1e-6)
        assert curve.median == pytest.approx(other.median, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_igm_crm_and_mean_parameters(name: str) -> None:
    """They are measured in every norm, in segments, and over each class with the guess of all images."""
    case, everything = case_of(name), slice(None)
    report, norm, count = case.report, case.norm, case.segments
    for each in (2, "fro", 1):
        assert_metrics(report.metrics[each], case.metrics(everything, each))
    segments = case.metrics(everything, norm, count)
    assert tuple(report.segment_metrics) == report.tough_blocks
    for i, metrics in report.segment_metrics.items():
        assert_metrics(metrics, segments[i * count : (i + 1) * count])
    for i, (_, _, scale, shift) in enumerate(case.walk()):
        assert report.mean_affine[i].log_scale.double().allclose(scale.log().mean(dim=0), 1e-6, 1e-6)
        assert report.mean_affine[i].shift.double().allclose(shift.mean(dim=0), 1e-6, 1e-6)
    assert list(report.class_metrics) == sorted(set(case.labels.tolist()))
    for label, metrics in report.class_metrics.items():
        assert_metrics(metrics, case.metrics((case.labels == label).nonzero()[:, 0], norm))
    assert report.settings == CalibrationSettings(7, True, norm, case.guidance, count, 2, 0)


@pytest.mark.parametrize("name", CASES)
def test_sweeps_and_gamma_are_those_at_fresh_latents_and_at_evenly_spaced_images(name: str) -> None:
    """The latents have the images' labels. Tough blocks are cut into 1, `segments`, and powers of 2 segments."""
    case = case_of(name)
    report, config = case.report, case.flow.config
    tokens = draw_latents(2, config.num_tokens, config.token_dim, 0, 2**40).double() * case.flow.var.sqrt()
    problems = way_back(case.flow, tokens, case.labels[CHOSEN], case.guidance)
    solutions = {"noise": [(problem.answer, problem.z) for problem in problems]}
    if not case.guidance:
        solutions["images"] = [(x, z) for x, z, _, _ in case.walk(CHOSEN)]
    assert report.curves.keys() == solutions.keys()
    for start, blocks in solutions.items():
        for i, (x, z) in enumerate(blocks):
            for guess, curve in report.curves[start][i].items():  # type: ignore[index]
                assert_curves([curve], case.curves(i, x, z, guess))
            if start == "images" or case.guidance:
                norms = gamma_norm(case.blocks[i], x, z, case.labels[CHOSEN])
                assert report.gamma[i] == pytest.approx(norms.tolist(), rel=1e-3)
    for i, segments in report.segment_curves.items():
        for count, curves in segments.items():
            assert_curves(curves, case.curves(i, *solutions["noise"][i], report.best_guess(i), count))
    assert tuple(report.segment_curves) == report.tough_blocks
    if report.tough_blocks:
        assert {i: list(curves) for i, curves in report.segment_curves.items()} == {2: [1, 2, 4]}


def test_a_block_without_a_linear_output_layer_leaves_crm_undefined_for_all() -> None:
    flow = linear_flow([0.1, 2.0, 0.1, 0.1])
    block: Any = flow.blocks[0]
    block.output_weights = lambda: None
    report = jf.calibrate(flow, randn(2, 1, 3, 3), num_convergence_samples=1)
    assert (report.components, report.segment_metrics, report.segment_curves) == (None, {}, {})
    assert CalibrationReport.from_json(report.to_json()) == report


def test_batches_change_rounding_only_and_seeds_the_noise_only(classes: Case) -> None:
    """Images may be on disk."""
    sizes = []

    class OnDisk:
        __len__ = classes.images.__len__

        def __getitem__(self, index: Tensor) -> Tensor:
            sizes.append(len(index))
            return classes.images[index]

    a, b, other = classes.report, classes.calibrate(OnDisk(), batch_size=1), classes.calibrate(classes.images, seed=1)
    assert set(sizes[1:]) == {1}
    assert b.crm == pytest.approx(a.crm, rel=1e-9)
    assert [t["zeros"].sweeps for t in b.curves["noise"]] == [t["zeros"].sweeps for t in a.curves["noise"]]
    assert np.array(b.gamma) == pytest.approx(np.array(a.gamma), rel=0.03)
    assert classes.calibrate(classes.images.numpy(), batch_size=1) == b
    assert (other.metrics, other.curves["images"]) == (a.metrics, a.curves["images"])
    assert other.curves["noise"] != a.curves["noise"]


def test_calibrating_changes_nothing_else(classes: Case) -> None:
    flow, images = copy.deepcopy(classes.flow).train().requires_grad_(True), classes.images.clone().requires_grad_()
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert jf.calibrate(flow, images, classes.labels, **classes.settings) == classes.report
    assert jf.calibrate(flow, images, classes.labels, **classes.settings) == classes.report
    assert torch.equal(torch.get_rng_state(), state)
    assert flow.training
    assert all(torch.equal(value, classes.flow.state_dict()[name]) for name, value in flow.state_dict().items())
    (-flow.log_prob(images, classes.labels).mean()).backward()  # no tensor of inference mode is left in the flow


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": IMAGES / (torch.arange(7) != 5).view(-1, 1, 1, 1)}, "images=.*: holds a NaN or an infinity"),
        ({"segments": 17}, "there are only 16 tokens"),
        ({"per_class": True}, "per_class=True: needs the labels"),
    ],
    ids=range(3),
)
def test_bad_arguments_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        jf.calibrate(
            **{"flow": FLOW, "images": IMAGES, "batch_size": 4, "num_convergence_samples": 1, "segments": 2, **changed}
        )


@pytest.mark.parametrize("i", [0, 1])
def test_overflow_in_encoding_or_in_the_exact_inverse_is_refused(i: int) -> None:
    flow = linear_flow([0.1, 0.1])
    with torch.no_grad():
        flow.blocks[i].proj_out.weight[0, 0] = -5000
    for pixel, message in ((1.0, f"images overflow in block {i} when"), (0.01, f"of 2 fresh latents .* of block {i};")):
        with pytest.raises(ValueError, match=message):
            jf.calibrate(flow, torch.full((2, 1, 3, 3), pixel).double())


def calibrate_to(out: Path, progress: Progress | None = None, barrier: Barrier | None = None, **changed: Any) -> bytes:
    """Calibrates a small flow, once all processes of the barrier have come here; returns the bytes of the report."""
    arguments = {"segments": 2, "num_convergence_samples": 2, "batch_size": 2} | changed
    if barrier is not None:
        barrier.wait()
    jf.calibrate(FLOW, IMAGES, [0, 1, 2, 0, 1, 2, 0], progress=progress, out=out, **arguments)
    return (out / "report.json").read_bytes()


def test_processes_share_a_calibration(tmp_path: Path) -> None:
    """Their report is that of one process, which needs no folder."""
    context = get_context("spawn")
    barrier = context.Barrier(2)
    other = context.Process(target=calibrate_to, args=(tmp_path / "two", None, barrier))
    other.start()
    assert calibrate_to(tmp_path / "two", barrier=barrier) == calibrate_to(tmp_path / "one")
    other.join()
    assert other.exitcode == 0


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    """Finished measurements stay. A folder of another calibration is refused."""
    expected, out = calibrate_to(tmp_path / "calm"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate_to(out, Mock(side_effect=[None] * 20 + [KeyboardInterrupt]))
    units = {path: path.stat().st_mtime_ns for path in out.glob("units/*.json")}
    with pytest.raises(ValueError, match="holds calibration of seed 0, not 1; batch size 2, not 1; give another"):
        calibrate_to(out, seed=1, batch_size=1)
    assert calibrate_to(out) == expected
    assert units == {path: path.stat().st_mtime_ns for path in units}
