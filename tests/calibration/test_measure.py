"""Metrics, sweeps and error matrices of small float64 flows, at images and at fresh latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from functools import cache
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
from jacobiflow.data import Noise, add_noise, digits
from jacobiflow.models.latents import draw_latents
from jacobiflow.utils.files import locked, write_json
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


class Case:
    """A flow, its report, and what to expect of it."""

    def __init__(self, name: str) -> None:
        make, self.guidance, self.norm, self.segments = CASES[name]
        self.flow = make()
        self.guided, self.images = self.flow.guided(self.guidance), images_of(self.flow)
        self.blocks = self.guided.inverse_blocks
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
        for step in self.flow.encode_steps(self.flow.to_tokens(self.images[rows]), self.labels[rows]):
            log_scale, shift = self.blocks[step.block].affine_whole(step.x, jf.Context(self.labels)[rows])
            yield step.x, (step.x - shift) / log_scale.exp(), log_scale.exp(), shift

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
    tokens = draw_latents(2, config.num_tokens, config.token_channels, 0, 2**40).double() * case.flow.var.sqrt()
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


FLOW = make_flow(num_classes=3)
IMAGES = images_of(FLOW)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": IMAGES / (torch.arange(7) != 5).view(-1, 1, 1, 1)}, "images=.*: holds a NaN or an infinity"),
        ({"images": list(IMAGES)}, "images of type list: give a tensor"),
        ({"labels": torch.arange(7)}, "label 6: this flow has classes 0 to 2"),
        ({"segments": 17}, "there are only 16 tokens"),
        ({"per_class": True}, "per_class: give the labels"),
    ],
    ids=range(5),
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


@pytest.mark.slow
def test_real_weights_and_images() -> None:
    """16 digits give nearly the metrics of the bundled report."""
    flow, (images, labels) = jf.load("digits-p1"), digits().batch(slice(0, 16))
    images = add_noise(images, Noise("gaussian", 0.1), torch.Generator().manual_seed(0))
    report = jf.calibrate(flow, images, labels, num_convergence_samples=2)
    bundled = CalibrationReport.load(flow.report_files[0])
    assert report.tough_blocks == bundled.tough_blocks
    assert report.crm == pytest.approx(bundled.crm, rel=0.15)


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


def kill_at_write(number: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[str]:
    """Runs a calibration that is killed when it stores the measurement of this number; returns the names before it."""
    names = list[str]()

    def write(path: Path, *rest: Any, **named: Any) -> None:
        if len(names) == number - 1:
            raise Killed
        names.append(path.stem)
        write_json(path, *rest, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("jacobiflow.utils.store.write_json", write)
        patch.setattr(CalibrationReport, "save", Mock(side_effect=Killed))
        run()
    return names


def test_an_interrupted_calibration_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged measurements, and those of other settings, are made again; foreign files in the folder stay."""
    flow, out, folder = make_maf(num_classes=0).float(), tmp_path / "r.json", tmp_path / "r.json.partial"
    images = images_of(flow).float()

    def calibrate(out: Path = out, seed: int = 0) -> bytes:
        jf.calibrate(flow, images, segments=2, num_convergence_samples=2, seed=seed, out=out)
        return out.read_bytes()

    expected = calibrate(tmp_path / "calm.json")
    kill_at_write(3, monkeypatch, calibrate)
    damaged, other = folder / "means.json", folder / "metrics.json"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    other.write_text(other.read_text().replace('"igm"', '"other"'))
    assert calibrate() == expected
    assert not folder.exists()
    kill_at_write(3, monkeypatch, lambda: calibrate(seed=1))
    with locked(folder), pytest.raises(ValueError, match="another run is writing"):
        calibrate()
    (folder / "block-mine.json").write_text("mine")
    assert calibrate() == expected
    assert sorted(entry.name for entry in folder.iterdir()) == [".lock", "block-mine.json", "manifest.json"]


def test_a_kill_costs_only_the_measurement_in_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No finished measurement is made again, up to the report itself."""
    flow, out, written = copy.deepcopy(make_flow(num_classes=3)).float(), tmp_path / "r.json", list[str]()
    images, labels = images_of(flow).float(), [0, 1, 2, 0, 1, 2, 0]

    def calibrate(out: Path = out) -> bytes:
        jf.calibrate(flow, images, labels, segments=2, num_convergence_samples=2, per_class=True, out=out)
        return out.read_bytes()

    expected = calibrate(tmp_path / "calm.json")
    while names := kill_at_write(2, monkeypatch, calibrate):
        written += names
    assert len(set(written)) == len(written) > 10
    monkeypatch.setattr("jacobiflow.calibration.statistics.solve", None)
    assert calibrate() == expected


def test_a_folder_in_place_of_a_report_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out=.*: is a folder; give a file"):
        jf.calibrate(FLOW, IMAGES, progress=Mock(side_effect=AssertionError), out=tmp_path)
    assert not [*tmp_path.iterdir()]
