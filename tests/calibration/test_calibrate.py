"""`calibrate`: metrics, sweeps and error matrices of small float64 flows, recomputed from the oracle's parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.calibration import Metrics, Report, Settings, Trace
from jacobiflow.data import Noise, add_noise, digits
from jacobiflow.files import locked, write_json
from tests.helpers import oracle
from tests.helpers.calibration_problems import (
    GUESSES,
    dense_gamma,
    errors_of,
    fresh_latents,
    guide_of,
    linear_flow,
    oracle_of,
    randn,
    runs_of,
    way_back,
)
from tests.helpers.problems import make_flow, make_maf

pytestmark = pytest.mark.usefixtures("one_thread")

CHOSEN = torch.tensor([0, 3])  # of 7 images, the two that are traced: evenly spaced
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "classes": (make_flow, {"num_classes": 3}, {"norm": "fro", "segments": 3, "labels": True}),
    "tough": (linear_flow, {"slopes": [0.15, 0.15, 2.0, 0.15, 0.15], "nvp": False}, {"segments": 4}),
    "guided": (make_flow, {"image_size": 6, "num_classes": 2}, {
        "segments": 4, "labels": True, "guidance": jf.Guidance(1.5, True, "both", 0.8)}),
    "MAF": (make_maf, {}, {"norm": 1, "segments": 2, "labels": True}),
}  # fmt: skip


def images_of(flow: Any) -> Tensor:
    config = flow.config
    return randn(7, config.in_channels, config.image_size, config.image_size, seed=2).tanh()


class Case:
    """A flow, its report, and what the oracle says of both."""

    def __init__(self, name: str) -> None:
        make, config, settings = CASES[name]
        self.flow, self.guidance = make(**config), settings.get("guidance")
        self.images, self.labels = images_of(self.flow), None
        if settings.get("labels"):  # all classes, and some images without one
            self.labels = torch.tensor([-1, 1, 0, 0, 1, -1, self.flow.config.num_classes - 1])
        defaults = {"norm": 2, "traced": 2, "per_class": self.labels is not None, "batch_size": 4}
        self.settings = {k: v for k, v in (defaults | settings).items() if k != "guidance"} | {"labels": self.labels}
        self.reference = oracle_of(self.flow)
        self.report = self.calibrate()

    def calibrate(self, images: Any = None, **changed: Any) -> Report:
        return jf.calibrate(
            self.flow.guided(self.guidance), self.images if images is None else images, **self.settings | changed
        )

    def walk(self, rows: Any = slice(None)) -> Iterator[tuple[oracle.Map, Tensor, Tensor, Tensor, Tensor]]:
        """Per block its map, X*, its latent, scale and shift there: guided, but the images go on unguided."""
        labels, x = None if self.labels is None else self.labels[rows], self.flow.to_tokens(self.images[rows])[0]

        def g(x: Tensor, i: int, z: Tensor, guide: oracle.Guide | None) -> Tensor:
            return self.reference.g(i, x, z, labels, guide)

        def affine(x: Tensor, i: int, guide: oracle.Guide | None) -> tuple[Tensor, Tensor]:
            shift = g(x, i, torch.zeros_like(x), guide)
            return g(x, i, torch.ones_like(x), guide) - shift, shift

        for i in range(self.reference.num_blocks):
            x = self.reference.flip(i, x)
            scale, shift = affine(x, i, guide := guide_of(self.guidance))
            z = (x - shift) / scale
            yield partial(g, i=i, z=z, guide=guide), x, z, scale, shift
            scale, shift = affine(x, i, None)
            x = self.reference.flip(i, (x - shift) / scale)

    def guess(self, i: int, name: str, z: Tensor) -> Tensor:
        mean = self.report.mean_affine[i]
        zeros = torch.cat((z[:, :1], torch.zeros_like(z[:, 1:])), dim=1)
        return {"latent": z, "zeros": zeros, "mean_affine": mean.log_scale.double().exp() * z + mean.shift}[name]

    def metrics(self, rows: Any, norm: Any, count: int = 1) -> list[Any]:
        """Per block and segment, IGM of each guess and the components of CRM."""
        measured = []
        for i, (g, x, z, scale, _) in enumerate(self.walk(rows)):
            for run in runs_of(x.shape[1], count):
                first = {name: errors_of(g, x, self.guess(i, name, z), run, 1)[1].mean(dim=0) for name in GUESSES}
                igm = {name: np.linalg.norm(matrix.numpy(), norm) for name, matrix in first.items()}
                scaled, (w_s, w_u) = (x / scale).mean(dim=0)[run], self.flow.blocks[i].output_weights()
                matrices = scaled, torch.zeros_like(w_u) if w_s is None else w_s, w_u
                measured.append((igm, [np.linalg.norm(matrix.detach().numpy(), norm) for matrix in matrices]))
        return measured

    def assert_solution(self, i: int, start: Any, g: oracle.Map, x: Tensor, z: Tensor) -> None:
        """The report on block i from `start` agrees with the map g, its solution and latent."""
        for name in GUESSES:
            errors = errors_of(g, x, self.guess(i, name, z), slice(0, x.shape[1]))
            assert_trace(self.report.traces[start][i][name], errors)
        if start == "images" or self.guidance:
            norms = [np.linalg.norm(gamma, 2) for gamma in dense_gamma(g, x)]
            assert self.report.gamma[i] == pytest.approx(norms, rel=0.03)


def assert_metrics(metrics: Metrics, expected: list[Any]) -> None:
    assert len(metrics.igm) == len(expected)
    for igm, (row, _) in zip(metrics.igm, expected, strict=True):
        assert igm == pytest.approx(row, rel=1e-8, abs=1e-12)  # absolute: one sweep may make a token exact
    assert metrics.components is not None
    components = np.array([astuple(part) for part in metrics.components])
    assert components == pytest.approx(np.array([parts for _, parts in expected]), rel=1e-9)


def assert_trace(trace: Trace, errors: Tensor) -> None:
    """The trace agrees with these errors, and ends once all of them are rounding."""
    curve, length = errors.abs().amax(dim=(2, 3)), len(trace.largest)
    expected = Trace.of([curve[:length]])
    assert trace.largest == pytest.approx(expected.largest, rel=1e-6, abs=1e-6)
    assert trace.median == pytest.approx(expected.median, rel=1e-6, abs=1e-6)
    assert trace.sweeps == expected.sweeps
    assert curve[length - 1].max() <= 1e-5 or length == len(curve)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def classes() -> Case:
    return Case("classes")


def test_igm_crm_and_mean_parameters(case: Case) -> None:
    """In every norm; of segments, those before being solved; of a class's images, with the guess of all images."""
    report, everything, norm, count = case.report, slice(None), case.settings["norm"], case.settings["segments"]
    for each in (2, "fro", 1):
        assert_metrics(report.metrics[each], case.metrics(everything, each))
    segments = case.metrics(everything, norm, count)
    assert tuple(report.segment_metrics) == (report.tough_blocks if report.components else ())
    for i, metrics in report.segment_metrics.items():
        assert_metrics(metrics, segments[i * count : (i + 1) * count])
    for i, (_, _, _, scale, shift) in enumerate(case.walk()):
        assert report.mean_affine[i].log_scale.double().allclose(scale.log().mean(dim=0), 1e-6, 1e-6)
        assert report.mean_affine[i].shift.double().allclose(shift.mean(dim=0), 1e-6, 1e-6)
    assert list(report.class_metrics) == ([] if case.labels is None else sorted(set(case.labels.tolist())))
    for label, metrics in report.class_metrics.items():
        assert_metrics(metrics, case.metrics((case.labels == label).nonzero()[:, 0], norm))
    assert report.settings == Settings(7, case.labels is not None, norm, case.guidance, count, 2, 0)


def test_sweeps_from_noise_are_of_fresh_latents_under_the_labels_of_the_traced_images(case: Case) -> None:
    """Tough blocks have those of segments too: of one, of as many as asked for, of powers of two."""
    report, tokens = case.report, fresh_latents(case.flow, 2) * case.flow.var.sqrt()
    assert tuple(report.segment_traces) == report.tough_blocks
    labels = None if case.labels is None else case.labels[CHOSEN]
    for i, p in enumerate(way_back(case.flow, tokens, labels, case.guidance)):
        case.assert_solution(i, "noise", p.g, p.answer, p.z)
        for count, traces in report.segment_traces.get(i, {}).items():
            for trace, run in zip(traces, runs_of(p.length, count), strict=True):
                assert_trace(trace, errors_of(p.g, p.answer, case.guess(i, report.best_guess(i), p.z), run))
    if report.tough_blocks:
        assert {i: list(traces) for i, traces in report.segment_traces.items()} == {2: [1, 2, 4]}


def test_sweeps_from_images_are_of_evenly_spaced_ones(case: Case) -> None:
    if case.guidance:
        assert list(case.report.traces) == ["noise"]
        return
    for i, (g, x, z, _, _) in enumerate(case.walk(CHOSEN)):
        case.assert_solution(i, "images", g, x, z)


def test_an_identity_needs_no_sweep_and_crm_may_be_undefined() -> None:
    """One sweep from a wrong guess. A block without a linear output layer leaves CRM undefined for all."""
    flow = linear_flow([0.0, 0.0], num_classes=2)
    report = jf.calibrate(flow, images_of(flow), torch.tensor([0, 1, 1, -1, 0, 0, 0]), traced=2)
    assert report.crm == report.crm_percent == (0.0, 0.0)
    assert (report.tough_blocks, report.segment_traces, report.gamma) == ((), {}, ((0.0, 0.0),) * 2)
    assert report.mean_sweeps("noise", 1e-3) == report.mean_sweeps("images", 1e-3, "latent") == (0.0, 0.0)
    assert report.slowest_sweeps("noise", 1e-3, "zeros") == (1, 1)
    block: Any = flow.blocks[1]
    block.output_weights = lambda: None
    undefined = jf.calibrate(flow, images_of(flow), torch.tensor([0, 1, 1, -1, 0, 0, 0]), traced=2)
    assert (undefined.components, undefined.igm, undefined.traces) == (None, report.igm, report.traces)
    assert Report.from_json(undefined.to_json()) == undefined


def test_batches_change_rounding_only_and_seeds_the_noise_only(classes: Case) -> None:
    """Images may be on disk."""
    sizes = []

    class OnDisk:
        __len__ = classes.images.__len__

        def __getitem__(self, index: Tensor) -> Tensor:
            sizes.append(len(index))
            return classes.images[index]

    a, b, progress = classes.report, classes.calibrate(OnDisk(), batch_size=1), Mock()
    other = classes.calibrate(seed=1, progress=progress)
    assert set(sizes[1:]) == {1}
    assert b.crm == pytest.approx(a.crm, rel=1e-9)
    assert [t["zeros"].sweeps for t in b.traces["noise"]] == [t["zeros"].sweeps for t in a.traces["noise"]]
    assert np.array(b.gamma) == pytest.approx(np.array(a.gamma), rel=0.03)
    assert classes.calibrate(classes.images.numpy(), batch_size=1) == b
    assert (other.metrics, other.traces["images"]) == (a.metrics, a.traces["images"])
    assert other.traces["noise"] != a.traces["noise"]
    totals = {"mean parameters": 2, "metrics": 2, "encoding": 1, "exact loop": 2, "sweeps": 2}
    calls = [call(step + 1, total, what) for what, total in totals.items() for step in range(total)]
    assert progress.mock_calls == calls


def test_calibrating_changes_nothing_else(classes: Case) -> None:
    flow, images = copy.deepcopy(classes.flow).train().requires_grad_(True), classes.images.clone().requires_grad_()
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert jf.calibrate(flow, images, **classes.settings) == classes.report
    assert jf.calibrate(flow, images, **classes.settings) == classes.report
    assert torch.equal(torch.get_rng_state(), state)
    assert flow.training
    assert all(torch.equal(value, classes.flow.state_dict()[name]) for name, value in flow.state_dict().items())
    assert all(tensor.grad is None for tensor in (images, *flow.parameters()))
    (-flow.log_prob(images, classes.labels).mean()).backward()  # nothing of inference mode was kept


def test_bfloat16_weights_give_nearly_the_same_metrics(classes: Case) -> None:
    report = jf.calibrate(copy.deepcopy(classes.flow).bfloat16(), classes.images.float(), **classes.settings)
    assert report.crm == pytest.approx(classes.report.crm, rel=0.1)
    assert np.array(report.gamma) == pytest.approx(np.array(classes.report.gamma), rel=0.1)


FLOW = make_flow(num_classes=3)
IMAGES = images_of(FLOW)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": IMAGES / (torch.arange(7) != 5).view(-1, 1, 1, 1)}, "images=.* holds a NaN or an infinity"),
        ({"images": list(IMAGES)}, "images of type list: give a tensor"),
        ({"labels": torch.arange(7)}, "label 6: this flow has classes 0 to 2"),
        ({"segments": 17}, "there are only 16 tokens"),
        ({"per_class": True}, "per_class: give the labels"),
    ],
    ids=range(5),
)
def test_bad_arguments_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        jf.calibrate(**{"flow": FLOW, "images": IMAGES, "batch_size": 4, "traced": 1, "segments": 2, **changed})


@pytest.mark.parametrize("i", [0, 1])
def test_overflow_in_encoding_or_in_the_exact_inverse_is_refused(i: int) -> None:
    flow = linear_flow([0.1, 0.1])
    with torch.no_grad():
        flow.blocks[i].proj_out.weight[0, 0] = -5000
    for pixel, message in ((1.0, f"images overflow in block {i} when"), (0.01, f"of 2 fresh latents .* of block {i};")):
        with pytest.raises(ValueError, match=message):
            jf.calibrate(flow, torch.full((2, 1, 3, 3), pixel).double())


def test_real_weights_and_images() -> None:
    """16 digits say much the same as the 512 of the bundled report; Figure 5 of the paper beside Figure 2."""
    flow, (images, labels) = jf.load("digits-p1"), digits().batch(slice(0, 16))
    images = add_noise(images, Noise("gaussian", 0.1), torch.Generator().manual_seed(0))
    report, bundled = jf.calibrate(flow, images, labels, traced=2), Report.load(flow.report_files[0])
    assert report.tough_blocks == bundled.tough_blocks
    assert report.crm == pytest.approx(bundled.crm, rel=0.15)
    sweeps = report.mean_sweeps("noise", 1e-3)
    assert sweeps[3] == max(sweeps) > 1.5 * min(sweeps)
    whole, eighths = (report.segment_traces[3][count] for count in (1, 8))
    assert np.mean([max(trace.reach(1e-3, 64)) for trace in eighths]) < 0.75 * max(whole[0].reach(1e-3, 64))
    report.check(flow)


# ------------------------------------------------------------------------------------------------- interrupted runs


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


def kill_at_write(number: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    """Runs a calibration that is killed when it writes its part of that number."""
    writes = []

    def write(path: Path, *rest: Any, **named: Any) -> None:
        writes.append(path)
        if len(writes) == number:
            raise Killed
        write_json(path, *rest, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(import_module("jacobiflow.calibration.calibrate"), "write_json", write)
        run()


def test_an_interrupted_calibration_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill, with a damaged part, and with the parts of other settings; in a folder of its own."""
    flow, out, folder = make_maf(num_classes=0).float(), tmp_path / "r.json", tmp_path / "r.json.partial"
    images = images_of(flow).float()

    def calibrate(out: Path = out, seed: int = 0) -> bytes:
        jf.calibrate(flow, images, segments=2, traced=2, seed=seed, out=out)
        return out.read_bytes()

    expected = calibrate(tmp_path / "calm.json")
    kill_at_write(2, monkeypatch, calibrate)
    kill_at_write(2, monkeypatch, calibrate)  # further on
    assert sorted(path.name for path in folder.glob("*.json")) == ["block-0.json", "manifest.json", "metrics.json"]
    assert not out.exists()
    damaged = folder / "metrics.json"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    other = folder / "block-0.json"
    other.write_text(other.read_text().replace('"gamma"', '"delta"'))
    assert calibrate() == expected
    kill_at_write(3, monkeypatch, lambda: calibrate(seed=1))
    with locked(folder), pytest.raises(ValueError, match="another run is writing"):
        calibrate()
    assert calibrate() == expected
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["calm.json", "r.json"]
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that this command did not write"):
        calibrate()
    assert (folder / "mine.txt").read_text() == "mine"
