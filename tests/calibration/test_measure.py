"""Metrics, sweeps and error matrices of small float64 flows, at images and at fresh latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.calibration import CalibrationReport, CalibrationSettings, ConvergenceCurve, Metrics
from jacobiflow.models.latents import draw_latents
from jacobiflow.utils.progress import Progress
from tests.helpers import oracle
from tests.helpers.calibration_problems import dense_gamma, errors_of, linear_flow, oracle_of, randn, runs_of, way_back
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
        self.reference, self.guide = oracle_of(self.flow, self.guidance)
        self.labels = torch.tensor([-1, 1, 0, 0, 1, -1, self.flow.config.num_classes - 1])  # some without a class
        self.settings = {
            "norm": self.norm, "segments": self.segments, "num_convergence_samples": 2, "per_class": True,
            "batch_size": 4,
        }  # fmt: skip
        self.report = self.calibrate(self.images)

    def calibrate(self, images: Any, **changed: Any) -> CalibrationReport:
        return jf.calibrate(self.guided, images, self.labels, **self.settings | changed)

    def walk(self, rows: Any = slice(None)) -> Iterator[tuple[oracle.Map, Tensor, Tensor, Tensor, Tensor]]:
        """Yields g, X*, z, log-scale and shift of each block, guided; the images are encoded without guidance."""
        reference, guide, labels = self.reference, self.guide, self.labels[rows]
        x, _ = reference.tokens(self.images[rows])
        for i in range(reference.num_blocks):
            x = reference.flip(i, x)
            log_scale, shift = reference.parameters(i, x, labels)
            encoded = (x - shift) / log_scale.exp()
            if guide is not None:
                oracle.guide_away(guide, log_scale, shift, *reference.parameters(i, x, None, guide.temperature))
            z = (x - shift) / log_scale.exp()
            yield partial(reference.g, i, z=z, labels=labels, guide=guide), x, z, log_scale, shift
            x = reference.unflip(i, encoded)

    def guesses(self, z: Tensor) -> dict[str, Tensor]:
        """Returns X^(0) by the name of the guess."""
        return {"latent": z, "zeros": torch.cat((z[:, :1], torch.zeros_like(z[:, 1:])), dim=1)}

    def output_weights(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns W_s and W_u, by the state dict."""
        if isinstance(self.reference, oracle.MAFOracle):
            weight = self.reference.weights[f"blocks.{i}.layers.{self.reference.layers}.weight"]
            return weight[0::2], weight[1::2]
        weight = self.reference.state[f"blocks.{i}.proj_out.weight"]
        size = self.flow.config.token_dim
        return (weight[:size], weight[size:]) if len(weight) > size else (torch.zeros_like(weight), weight)

    def metrics(self, rows: Any, norm: Any, count: int = 1) -> list[Any]:
        """Returns IGM of each guess and the components of CRM, per block and segment."""
        measured = []
        for i, (g, x, z, log_scale, _) in enumerate(self.walk(rows)):
            for run in runs_of(x.shape[1], count):
                igm = {
                    name: np.linalg.norm(errors_of(g, x, guess, run, 1)[1].mean(dim=0).numpy(), norm)
                    for name, guess in self.guesses(z).items()
                }
                matrices = (x / log_scale.exp()).mean(dim=0)[run], *self.output_weights(i)
                measured.append((igm, [np.linalg.norm(matrix.numpy(), norm) for matrix in matrices]))
        return measured


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


def assert_curve(curve: ConvergenceCurve, errors: Tensor) -> None:
    """Checks a curve by the errors (k, B, T, C) of T sweeps, of which it may leave out the last."""
    distances, num = errors.abs().amax(dim=(2, 3)), len(curve.largest)
    assert curve.largest == pytest.approx(distances.amax(dim=1)[:num].tolist(), rel=1e-6, abs=1e-6)
    assert curve.median == pytest.approx(distances.median(dim=1).values[:num].tolist(), rel=1e-6, abs=1e-6)
    for tolerance, sweeps in curve.sweeps.items():
        above = [(column > tolerance).nonzero() for column in distances.T]
        assert sweeps == tuple(int(rows[-1]) + 1 if len(rows) else 0 for rows in above)


@pytest.mark.parametrize("name", CASES)
def test_igm_and_crm(name: str) -> None:
    """They are measured in every norm, in segments, and over each class."""
    case, everything = case_of(name), slice(None)
    report, norm, count = case.report, case.norm, case.segments
    for each in (2, "fro", 1):
        assert_metrics(report.metrics[each], case.metrics(everything, each))
    segments = case.metrics(everything, norm, count)
    assert tuple(report.segment_metrics) == report.tough_blocks
    for i, metrics in report.segment_metrics.items():
        assert_metrics(metrics, segments[i * count : (i + 1) * count])
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
    solutions = {
        "noise": [(p.g, p.answer, p.z) for p in way_back(case.flow, tokens, case.labels[CHOSEN], case.guidance)]
    }
    if not case.guidance:
        solutions["images"] = [(g, x, z) for g, x, z, _, _ in case.walk(CHOSEN)]
    assert report.curves.keys() == solutions.keys()
    for source, blocks in solutions.items():
        for i, (g, x, z) in enumerate(blocks):
            for name, guess in case.guesses(z).items():
                assert_curve(report.curves[source][i][name], errors_of(g, x, guess, slice(0, x.shape[1])))  # type: ignore[index]
            if source == "images" or case.guidance:
                norms = np.linalg.norm(dense_gamma(g, x), 2, axis=(1, 2))
                assert report.gamma[i] == pytest.approx(norms, rel=0.01)
    for i, segments in report.segment_curves.items():
        g, x, z = solutions["noise"][i]
        guess = case.guesses(z)[report.best_guess(i)]
        for count, curves in segments.items():
            for curve, run in zip(curves, runs_of(x.shape[1], count), strict=True):
                assert_curve(curve, errors_of(g, x, guess, run))
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


def calibrate_to(out: Path, progress: Progress | None = None, **changed: Any) -> bytes:
    """Calibrates a small flow, and returns the bytes of the report."""
    arguments = {"segments": 2, "num_convergence_samples": 2, "batch_size": 2} | changed
    jf.calibrate(FLOW, IMAGES, [0, 1, 2, 0, 1, 2, 0], progress=progress, out=out, **arguments)
    return (out / "report.json").read_bytes()


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
