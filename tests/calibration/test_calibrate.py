"""`calibrate`: metrics, sweeps and error matrices of small float64 flows, recomputed from the oracle's parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from calibration_problems import GUESSES, dense_gamma, errors_of, fresh_latents, guide_of, linear_flow, randn, runs_of
from problems import make_flow, make_maf
from torch import Tensor

import jacobiflow as jf
from jacobiflow.calibration import Metrics, Report, Settings, Trace
from jacobiflow.calibration.convergence import TOLERANCES
from jacobiflow.data import Noise, add_noise, digits

pytestmark = pytest.mark.usefixtures("one_thread")

CHOSEN = torch.tensor([0, 3])  # of 7 images, the two that are traced: evenly spaced
TOUGH = [0.15, 0.15, 2.0, 0.15, 0.15]
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "colours": (lambda: make_flow(image_size=6, in_channels=3), {"norm": 1, "segments": 9}),
    "classes": (lambda: make_flow(num_classes=3), {"norm": "fro", "segments": 3, "labels": True}),
    "tough, volume-preserving": (lambda: linear_flow(TOUGH, num_classes=2, nvp=False), {"segments": 4}),
    "guided": (
        lambda: make_flow(image_size=6, num_classes=2),
        {"segments": 4, "labels": True, "guidance": jf.Guidance(1.5, True, "both", 0.8)},
    ),
    "guided shift": (
        lambda: make_flow(image_size=6),
        {"segments": 1, "guidance": jf.Guidance(1.0, False, "shift", 0.6)},
    ),
    "MAF": (make_maf, {"segments": 2, "labels": True}),
}


def images_of(flow: Any, num: int = 7) -> Tensor:
    config = flow.config
    return randn(num, config.in_channels, config.image_size, config.image_size, seed=2).tanh()


class Case:
    """A flow, its report, and what the oracle says of both."""

    def __init__(self, make: Callable[[], Any], settings: dict[str, Any]) -> None:
        self.flow, self.guidance = make(), settings.get("guidance")
        self.images, self.labels = images_of(self.flow), None
        if settings.get("labels"):  # all classes, and some images without one
            self.labels = torch.tensor([-1, 1, 0, 0, 1, -1, self.flow.config.num_classes - 1])
        self.settings = {
            "norm": 2, "traced": 2, "per_class": self.labels is not None, "batch_size": 4, "progress": False,
        } | settings | {"labels": self.labels}  # fmt: skip
        self.reference: Any = (oracle.MAFOracle if isinstance(self.flow, jf.MAF) else oracle.Oracle)(self.flow)
        self.report = self.calibrate()

    def calibrate(self, images: Any = None, **changed: Any) -> Report:
        return jf.calibrate(self.flow, self.images if images is None else images, **self.settings | changed)

    def g(self, i: int, z: Tensor, rows: Any, guidance: jf.Guidance | None) -> oracle.Map:
        labels = None if self.labels is None else self.labels[rows]
        return lambda x: self.reference.g(i, x, z, labels, guide_of(guidance))

    def affine(self, i: int, x: Tensor, rows: Any, guidance: jf.Guidance | None) -> tuple[Tensor, Tensor]:
        """Scale and shift: g is affine in z."""
        shift = self.g(i, torch.zeros_like(x), rows, guidance)(x)
        return self.g(i, torch.ones_like(x), rows, guidance)(x) - shift, shift

    def walk(self, rows: Any) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Per block X*, its latent, scale and shift there: guided, but the images go on unguided."""
        x = self.flow.to_tokens(self.images[rows])[0]
        for i in range(self.reference.num_blocks):
            x = self.reference.flip(i, x)
            scale, shift = self.affine(i, x, rows, self.guidance)
            yield i, x, (x - shift) / scale, scale, shift
            scale, shift = self.affine(i, x, rows, None)
            x = self.reference.flip(i, (x - shift) / scale)

    def weights(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """W_s, 0 in a volume-preserving flow, and W_u."""
        if isinstance(self.reference, oracle.MAFOracle):
            weight = self.reference.weights[f"blocks.{i}.layers.{self.reference.layers}.weight"].numpy()
            return weight[0::2], weight[1::2]
        weight, size = self.reference.state[f"blocks.{i}.proj_out.weight"].numpy(), self.flow.config.token_channels
        return (weight[:size], weight[size:]) if self.reference.nvp else (np.zeros_like(weight), weight)

    def guess(self, i: int, name: str, z: Tensor) -> Tensor:
        mean = self.report.mean_affine[i]
        zeros = torch.cat((z[:, :1], torch.zeros_like(z[:, 1:])), dim=1)
        return {"latent": z, "zeros": zeros, "mean_affine": mean.log_scale.double().exp() * z + mean.shift}[name]

    def metrics(self, rows: Any, norm: Any, count: int = 1) -> list[Any]:
        """Per block and segment, IGM of each guess and the components of CRM."""
        found = []
        for i, x, z, scale, _ in self.walk(rows):
            g = self.g(i, z, rows, self.guidance)
            for run in runs_of(x.shape[1], count):
                first = {name: errors_of(g, x, self.guess(i, name, z), run, 1)[1].mean(dim=0) for name in GUESSES}
                igm = {name: np.linalg.norm(matrix.numpy(), norm) for name, matrix in first.items()}
                scaled = (x / scale).mean(dim=0)[run].numpy()
                found.append((igm, [np.linalg.norm(matrix, norm) for matrix in (scaled, *self.weights(i))]))
        return found

    def assert_traces(self, i: int, x: Tensor, z: Tensor, traces: Any) -> None:
        g = self.g(i, z, CHOSEN, self.guidance)
        for name in GUESSES:
            assert_trace(traces[i][name], errors_of(g, x, self.guess(i, name, z), slice(0, x.shape[1])))


def assert_metrics(metrics: Metrics, expected: list[Any]) -> None:
    assert len(metrics.igm) == len(expected)
    for igm, (row, _) in zip(metrics.igm, expected, strict=True):
        assert igm == pytest.approx(row, rel=1e-8, abs=1e-12)  # absolute: one sweep may make a token exact
    assert metrics.components is not None
    assert np.array(metrics.components) == pytest.approx(np.array([parts for _, parts in expected]), rel=1e-9)


def assert_trace(trace: Trace, errors: Tensor) -> None:
    """`trace` is of these errors, up to where all of them are rounding."""
    curve, length = errors.abs().amax(dim=(2, 3)), len(trace.largest)
    assert trace.largest == pytest.approx(curve[:length].amax(dim=1).tolist(), rel=1e-6, abs=1e-6)
    assert trace.median == pytest.approx(curve[:length].median(dim=1).values.tolist(), rel=1e-6, abs=1e-6)
    assert curve[length - 1].max() <= 1e-5 or length == len(curve)
    for tolerance in TOLERANCES:
        needed = (next(k for k in range(len(curve)) if (row[k:] <= tolerance).all()) for row in curve.T)
        assert trace.sweeps[tolerance] == tuple(needed)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*CASES[request.param])


@pytest.fixture(scope="module")
def classes() -> Case:
    return Case(*CASES["classes"])


def test_igm_crm_and_mean_parameters(case: Case) -> None:
    """In every norm; of segments, those before being solved; of a class's images, with the guess of all images."""
    report, settings, everything = case.report, case.settings, slice(None)
    for norm in (2, "fro", 1):
        assert_metrics(report.metrics[norm], case.metrics(everything, norm))
    segments = case.metrics(everything, settings["norm"], settings["segments"])
    for i, metrics in enumerate(report.segment_metrics):
        assert_metrics(metrics, segments[i * settings["segments"] : (i + 1) * settings["segments"]])
    assert list(report.class_metrics) == ([] if case.labels is None else sorted(set(case.labels.tolist())))
    for label, metrics in report.class_metrics.items():
        assert_metrics(metrics, case.metrics((case.labels == label).nonzero()[:, 0], settings["norm"]))
    for i, _, _, scale, shift in case.walk(everything):
        assert report.mean_affine[i].log_scale.double().allclose(scale.log().mean(dim=0), 1e-6, 1e-6)
        assert report.mean_affine[i].shift.double().allclose(shift.mean(dim=0), 1e-6, 1e-6)
    made = Settings(7, case.labels is not None, settings["norm"], case.guidance, settings["segments"], 2, 0)
    assert report.settings == made


def test_sweeps_from_noise_are_of_fresh_latents_under_the_labels_of_the_traced_images(case: Case) -> None:
    """Each block's solution is the next one's latent. Segments of tough blocks: 1, those asked for, powers of two."""
    report, tokens = case.report, fresh_latents(case.flow, 2) * case.flow.var.sqrt()
    assert list(report.segment_traces) == list(report.tough_blocks)
    for i in reversed(range(report.num_blocks)):
        z = case.reference.flip(i, tokens)
        g = case.g(i, z, CHOSEN, case.guidance)
        x = oracle.sequential(g, z)
        case.assert_traces(i, x, z, report.traces["noise"])
        for count, traces in report.segment_traces.get(i, {}).items():
            for trace, run in zip(traces, runs_of(x.shape[1], count), strict=True):
                assert_trace(trace, errors_of(g, x, case.guess(i, report.best_guess(i), z), run))
        if case.guidance:
            norms = [np.linalg.norm(gamma, 2) for gamma in dense_gamma(g, x)]
            assert report.gamma[i] == pytest.approx(norms, rel=0.03)
        tokens = case.reference.flip(i, x)
    if 2 in report.tough_blocks:
        assert {i: list(traces) for i, traces in report.segment_traces.items()} == {2: [1, 2, 4]}


def test_sweeps_from_images_are_of_evenly_spaced_ones(case: Case) -> None:
    if case.guidance:
        assert list(case.report.traces) == ["noise"]
        return
    for i, x, z, _, _ in case.walk(CHOSEN):
        case.assert_traces(i, x, z, case.report.traces["images"])
        norms = [np.linalg.norm(gamma, 2) for gamma in dense_gamma(case.g(i, z, CHOSEN, None), x)]
        assert case.report.gamma[i] == pytest.approx(norms, rel=0.03)


@pytest.mark.parametrize(("slope", "log_scale"), [(0.5, 0.0), (-1.25, 0.4)])
def test_metrics_of_a_linear_block_have_a_closed_form(slope: float, log_scale: float) -> None:
    """x_t = exp(w) z_t + a x_{t-1} on grey images of mean m, which `mean_affine` solves in the mean."""
    values = torch.tensor([0.2, 1.0, -0.3, 0.7, 0.9], dtype=torch.float64)
    mean, images = float(values.mean()), values.view(5, 1, 1, 1).expand(5, 1, 3, 3)
    report = jf.calibrate(linear_flow([slope], log_scale), images, batch_size=2, traced=99)
    latent = abs(slope * mean * (math.exp(-log_scale) * (1 - slope) - 1))
    expected = {"latent": 7**0.5 * latent, "zeros": 7**0.5 * abs(slope * mean), "mean_affine": 0}
    assert report.igm[0] == pytest.approx(expected, abs=1e-6)
    scaled = abs(mean) * math.sqrt(1 + 8 * math.exp(-2 * log_scale))
    assert report.components == (pytest.approx((scaled, log_scale, abs(slope))),)
    assert report.gamma == (pytest.approx((abs(slope),) * 5, rel=2e-3),)  # `slope` times a shift by one token


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


def test_batches_and_seeds(classes: Case) -> None:
    """Batches change rounding only, and images may be on disk. A seed changes the noise, a weight of 0 nothing."""
    sizes = []

    class OnDisk:
        __len__ = classes.images.__len__

        def __getitem__(self, index: Tensor) -> Tensor:
            sizes.append(len(index))
            return classes.images[index]

    a, b, other = classes.report, classes.calibrate(OnDisk(), batch_size=1), classes.calibrate(seed=1)
    assert set(sizes) == {1}
    assert b.crm == pytest.approx(a.crm, rel=1e-9)
    assert [t["zeros"].sweeps for t in b.traces["noise"]] == [t["zeros"].sweeps for t in a.traces["noise"]]
    assert np.array(b.gamma) == pytest.approx(np.array(a.gamma), rel=0.03)
    assert classes.calibrate(classes.images.numpy()) == a
    assert (other.metrics, other.traces["images"]) == (a.metrics, a.traces["images"])
    assert other.traces["noise"] != a.traces["noise"]
    assert classes.calibrate(guidance=jf.Guidance(0.0)).metrics == a.metrics
    drawn = jf.sample(classes.flow, 64, seed=0, strategy="jacobi", certify=False, progress=False).latents.double()
    assert torch.cdist(fresh_latents(classes.flow, 8).flatten(1), drawn.flatten(1)).min() > 0.1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calibrating_changes_nothing_else_in_any_mode_of_autograd(classes: Case, mode: Callable[[], Any]) -> None:
    flow, images = copy.deepcopy(classes.flow).train().requires_grad_(True), classes.images.clone().requires_grad_()
    state, numpy_state = torch.get_rng_state(), repr(np.random.get_state())
    with mode():
        assert jf.calibrate(flow, images, **classes.settings) == classes.report
    assert torch.equal(images, classes.images)
    assert flow.training
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(np.random.get_state()) == numpy_state
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
        ({"images": IMAGES[:1]}, "images: 1 of them; give at least 2"),
        ({"images": IMAGES[:, :, :, :7]}, r"images: torch.float64 of shape \(4, 1, 8, 7\).*\(N, 1, 8, 8\)"),
        ({"images": IMAGES.long()}, r"images: torch.int64 .*floating-point"),
        ({"images": [1, 2]}, "images of type list: give a tensor"),
        ({"images": IMAGES / (torch.arange(7) != 5).view(-1, 1, 1, 1)}, "images: number 5 holds a NaN or an infinity"),
        ({"labels": torch.arange(7)}, "label 6: this flow has classes 0 to 2"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels of shape \(3,\).*give 7 whole numbers"),
        ({"labels": [0] * 7}, "labels of type list"),
        ({"norm": "2"}, "norm='2': give 2, 'fro' or 1"),
        ({"guidance": 1.5}, "guidance=1.5: give a Guidance"),
        ({"guidance": jf.Guidance(1e200), "labels": torch.arange(7) % 3}, "parameters of block 0 overflow"),
        ({"segments": 17}, "count=17.*only 16 tokens"),
        ({"traced": 0}, "traced=0: give a positive whole number"),
        ({"traced": 1, "chord": True}, "traced=1: give at least 2"),
        ({"batch_size": 1.5}, "batch_size=1.5: give a positive whole number"),
        ({"per_class": True}, "per_class: give the labels"),
        ({"seed": -1}, "seed=-1"),
    ],
    ids=range(17),
)
def test_what_does_not_fit_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jf.calibrate(FLOW, **{"images": IMAGES, "batch_size": 4, "traced": 1, "segments": 2, **changed})


@pytest.mark.parametrize("i", [0, 1])
def test_what_overflows_in_encoding_or_in_the_exact_inverse_is_refused(i: int) -> None:
    flow = linear_flow([0.1, 0.1])
    with torch.no_grad():
        flow.blocks[i].proj_out.weight[0, 0] = -5000
    with pytest.raises(ValueError, match=f"images overflow in block {i} when they are encoded"):
        jf.calibrate(flow, torch.ones(2, 1, 3, 3).double())
    with pytest.raises(ValueError, match=f"of 2 fresh latents overflow in the exact inverse of block {i}; lower"):
        jf.calibrate(flow, torch.full((2, 1, 3, 3), 0.01).double())


def test_real_weights_and_images() -> None:
    """16 digits say much the same as the 512 of the bundled report; Figure 5 of the paper beside Figure 2."""
    flow, (images, labels) = jf.load("digits-p1"), digits().batch(slice(0, 16))
    images = add_noise(images, Noise("gaussian", 0.1), torch.Generator().manual_seed(0))
    assert flow.report_file is not None
    report, bundled = jf.calibrate(flow, images, labels, traced=2, progress=False), Report.load(flow.report_file)
    assert report.tough_blocks == bundled.tough_blocks
    assert report.crm == pytest.approx(bundled.crm, rel=0.15)
    sweeps = report.mean_sweeps("noise", 1e-3)
    assert sweeps[3] == max(sweeps) > 1.5 * min(sweeps)
    whole, eighths = (report.segment_traces[3][count] for count in (1, 8))
    assert np.mean([trace.slowest(1e-3) for trace in eighths]) < 0.75 * (whole[0].slowest(1e-3) or 0)
    report.check(flow)
