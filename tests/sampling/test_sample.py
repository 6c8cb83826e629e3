"""Images end to end: against the oracle's token-by-token inverse, back through the encoding, and with bad input."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models.latents import draw_latents
from tests.helpers.kills import Killed, killed
from tests.helpers.oracle import Guide, Oracle
from tests.helpers.problems import latents, make_flow, to_float32

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10
SOLVED = 1e-8  # a tolerance of 1e-12 in each of two or three blocks, amplified by at most 1e3

FLOWS: dict[str, dict[str, Any]] = {
    "nvp, classes": {"image_size": 8, "patch_size": 2, "num_classes": 3, "num_blocks": 3, "noise_std": 0.1},
    "nvp": {"image_size": 5, "patch_size": 1},
    "vp, classes": {"image_size": 6, "patch_size": 2, "in_channels": 3, "num_classes": 2, "nvp": False},
}
CLASSES = FLOWS["nvp, classes"]
ANNEALED, CONSTANT = Guide(0.8, annealed=True, on="both", temperature=0.7), Guide(0.5, False, "both", 1.3)


def some_labels(flow: jf.TarFlow, num: int = 4) -> Tensor | None:
    classes = flow.config.num_classes
    return torch.arange(num) % (classes + 1) - 1 if classes else None


def as_guidance(guide: Guide | None) -> jf.Guidance | None:
    return None if guide is None else jf.Guidance(guide.weight, guide.annealed, guide.on, guide.temperature)  # type: ignore[arg-type]


@cache
def answer(name: str, guide: Guide | None = None) -> Tensor:
    flow = make_flow(**FLOWS[name])
    return Oracle(flow).decode(latents(flow, 4), some_labels(flow), guide)


def sample(flow: Any, **arguments: Any) -> jf.Samples:
    return jf.sample(flow, **{"strategy": "jacobi", **arguments})


@pytest.mark.parametrize(
    ("name", "guide", "strategy"),
    [
        ("nvp, classes", ANNEALED, "auto"), ("nvp, classes", ANNEALED, "jacobi"), ("nvp, classes", None, "sequential"),
        ("nvp", CONSTANT, "gs-jacobi:3"), ("nvp", None, "window:4"), ("vp, classes", CONSTANT, "jacobi"),
    ],
)  # fmt: skip
def test_samples_are_the_oracle_s(name: str, guide: Guide | None, strategy: str) -> None:
    flow = make_flow(**FLOWS[name])
    z, labels = latents(flow, 4), some_labels(flow)
    out = sample(flow.guided(as_guidance(guide)), latents=z, labels=labels, strategy=strategy, tolerance=1e-12)
    assert (out.images - answer(name, guide)).abs().max() < SOLVED
    assert (out.status == jf.Status.CONVERGED).all()
    assert (out.residual <= 1e-12).all()
    if guide is None:
        assert (flow.encode(out.images, labels)[0] - z).abs().max() < SOLVED


@pytest.mark.parametrize("name", ["digits-maf", pytest.param("digits-p1", marks=pytest.mark.slow)])
def test_under_autocast_tokens_stay_in_float32(name: str) -> None:
    flow, labels = jf.load(name), torch.arange(2)
    exact = sample(flow, num=2, labels=labels, strategy="sequential").images
    with torch.autocast("cpu", torch.bfloat16):
        outs = [sample(flow, num=2, labels=labels, strategy=each, tolerance=0.5) for each in ("sequential", "jacobi")]
    for out in outs:
        assert out.images.dtype == torch.float32
        assert (out.images - exact).abs().mean() < 0.2


def test_classes_have_names() -> None:
    flow, classes = jf.load("fashion-p2"), ["dress", "bag"]
    numbers = [flow.classes.index(name) for name in classes]
    draw = partial(jf.sample, flow, 2, strategy="sequential", settings=None)
    assert torch.equal(draw(labels=classes).images, draw(labels=numbers).images)
    for label in ("bag", "Bag", torch.tensor(numbers[1])):
        assert torch.equal(draw(labels=label).images, draw(labels=numbers[1]).images)
    with pytest.raises(jf.InputError, match=r"labels=dres: no such class \(did you mean dress\?\)"):
        draw(labels="dres")


@pytest.mark.parametrize("strategy", ["[0/2-4-2-3]", "jacobi"])
def test_the_certificate_is_the_largest_residual_of_any_block(strategy: str) -> None:
    """Computed by the oracle, from the trace."""
    flow, guide = make_flow(**CLASSES), ANNEALED
    reference, labels, z = Oracle(flow), some_labels(flow), latents(flow, 4)
    view = flow.guided(as_guidance(guide))
    out = sample(view, latents=z, labels=labels, strategy=strategy, return_intermediates=True, batch_size=3)
    assert len(out.intermediates) == 4
    assert torch.equal(out.intermediates[-1], out.images)
    torch.testing.assert_close(reference.patches(out.intermediates[0]), z * reference.var.sqrt())
    residuals = []
    for step, i in enumerate(reversed(range(3))):
        at, x = (reference.flip(i, reference.patches(out.intermediates[step + k])) for k in (0, 1))
        residuals.append((reference.g(i, x, at, labels, guide) - x).abs().amax(dim=(1, 2)))
        torch.testing.assert_close(out.stats[i].residual, residuals[-1], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(out.residual, torch.stack(residuals).amax(dim=0), rtol=1e-6, atol=1e-12)


def test_statistics_add_up() -> None:
    flow, calls = make_flow(**FLOWS["vp, classes"]), list[tuple[int, int, str]]()

    def progress(done: int, total: int, what: str) -> None:
        calls.append((done, total, what))

    out = sample(flow, num=33, strategy="sequential", certify=False, batch_size=1, progress=progress)
    for block in out.stats:
        assert block.sweeps == block.network_calls == block.token_evaluations == 33 * 9
        assert block.status.shape == block.residual.shape == block.used_fallback.shape == (33,)
    assert out.outcome.network_calls == out.outcome.token_evaluations == 2 * 33 * 9
    assert out.residual is out.intermediates is None
    assert calls == [(k, 6, "sampling") for k in range(1, 7)]  # three groups of up to 16 batches, two blocks
    certified = sample(flow, num=33, strategy="sequential", batch_size=2, certify="always")
    assert certified.outcome.network_calls == 2 * (17 * 9 + 17)
    assert certified.outcome.token_evaluations == 2 * out.outcome.token_evaluations


def test_samples_that_are_solved_token_by_token_are_exact() -> None:
    """No pass measures it, unless that is asked for; a block that sweeps solve is measured."""
    flow = make_flow(**CLASSES)
    exact, measured = (sample(flow, num=3, strategy="sequential", certify=certify) for certify in (True, "always"))
    assert torch.equal(exact.images, measured.images)
    assert exact.exact.all() and measured.exact.all()
    assert (exact.residual == 0).all()
    assert (measured.residual > 0).any() and measured.residual.max() < EXACT
    mixed = jf.Strategy((jf.Solver(jf.Sequential()), jf.Solver(), jf.Solver(jf.Sequential())))
    out = sample(flow, num=3, strategy=mixed)
    assert [bool(block.exact.all()) for block in out.stats] == [True, False, True]
    assert not out.exact.any()
    assert torch.equal(out.residual, out.stats[1].residual)


def test_a_seed_fixes_the_samples() -> None:
    flow = make_flow(**CLASSES)
    one, again, other = (sample(flow, num=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.images, again.images)
    assert (one.images - other.images).abs().max() > 0.1
    assert torch.equal(one.latents, draw_latents(3, 16, 4, seed=1).double())
    unlabelled = sample(flow, num=3, seed=1, labels=torch.tensor([-1, -9, -1]))
    assert torch.equal(one.images, unlabelled.images)


@pytest.mark.parametrize("strategy", ["[1-5-2-4]", "jacobi"])
def test_batches_change_rounding_only(strategy: str) -> None:
    """And the order of latents and labels stays, also where more than 16 batches go through in groups."""
    flow, num = make_flow(**FLOWS["vp, classes"]).guided(as_guidance(ANNEALED)), 35
    draw = {"num": num, "labels": torch.arange(num) % 3 - 1, "strategy": strategy}
    draw["tolerance"] = 1e-12 if strategy == "jacobi" else None
    whole = sample(flow, **draw)
    for batch_size in (2, 100):
        out = sample(flow, batch_size=batch_size, **draw)
        assert torch.equal(out.latents, whole.latents)
        assert (out.images - whole.images).abs().max() < SOLVED
        torch.testing.assert_close(out.residual, whole.residual, rtol=1e-6, atol=1e-11)


def test_inputs_and_weights_stay_and_images_have_no_history() -> None:
    flow = make_flow(**CLASSES)
    z, labels = latents(flow, 4), some_labels(flow)
    weights = {name: value.clone() for name, value in flow.state_dict().items()}
    arguments = {"latents": z, "labels": labels, "strategy": "[0-3-2-4]", "settings": jf.SamplingSettings(denoise=1.0)}
    out = sample(flow.guided(jf.Guidance(0.5)), **arguments)
    assert torch.equal(z, latents(flow, 4)) and torch.equal(labels, some_labels(flow))
    assert all(torch.equal(value, weights[name]) for name, value in flow.state_dict().items())
    assert all(parameter.grad is None for parameter in flow.parameters())
    assert not out.images.requires_grad
    images = out.images.requires_grad_()
    assert torch.autograd.grad(flow.log_prob(images).sum(), images)[0].isfinite().all()
    with torch.inference_mode():
        assert torch.equal(sample(flow.guided(jf.Guidance(0.5)), **arguments).images, out.images)


def test_sample_refuses_latents_that_require_a_gradient() -> None:
    """Samples have no gradient: images without one would stop a training silently."""
    flow = make_flow()
    z = latents(flow, 2).requires_grad_()
    with pytest.raises(
        jf.InputError, match=r"^latents=.* requires a gradient: give latents.detach\(\), or use decode$"
    ):
        sample(flow, latents=z)
    with torch.no_grad():
        assert torch.equal(sample(flow, latents=z, strategy="jacobi").images, jf.decode(flow, z, strategy="jacobi"))


@pytest.mark.parametrize(
    ("name", "strategy"), [("nvp, classes", "sequential"), ("nvp, classes", "jacobi"), ("vp, classes", "jacobi-3")]
)
def test_an_image_that_overflows_exactly_is_nan_with_a_warning(strategy: str, name: str) -> None:
    """In its block, or in the prior: from there on. The others are what they are without it, denoised too."""
    flow = to_float32(make_flow(**FLOWS[name]))
    z, denoise = latents(flow, 3), 1.0 if flow.config.noise_std else 0.0
    z[1] = 3.4e38
    draw = partial(sample, flow, strategy=strategy, settings=jf.SamplingSettings(denoise=denoise))
    with pytest.warns(UserWarning, match=r"^3 samples: .*1 not finite, since the exact inverse overflows"):
        out = draw(latents=z, return_intermediates=True, batch_size=2)
    assert out.images[1].isnan().all()
    assert out.intermediates[-1][1].isnan().all()
    assert (out.status == jf.Status.NONFINITE).tolist() == out.residual.isinf().tolist() == [False, True, False]
    first = [block.status[1] == jf.Status.NONFINITE for block in out.stats]
    assert first == sorted(first, reverse=True)  # blocks are in encoding order: once not finite, it stays so
    for block in out.stats:
        assert torch.equal(block.residual.isinf(), block.status == jf.Status.NONFINITE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lost")
        alone = draw(latents=z[[0, 2]])
    assert (out.images[[0, 2]] - alone.images).abs().max() < 0.05
    assert torch.equal(out.status[[0, 2]], alone.status)


def test_arguments_that_do_not_fit_the_flow_are_named() -> None:
    for arguments, names in (
        ({"num": 2, "labels": torch.tensor([0, 3])}, "label 3: this flow has classes 0 to 2 .below 0: no class"),
        ({}, "either num or latents"), ({"num": 2, "latents": torch.zeros(2, 16, 4)}, "either num or latents"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=names):
            sample(make_flow(**CLASSES), **arguments)
    with pytest.raises(TypeError, match=r"jf\.accelerate\(module\), then its own sampling method"):
        jf.sample(torch.nn.Linear(2, 2), 1)  # type: ignore[arg-type]


def test_options_that_a_flow_lacks_are_refused() -> None:
    flow, labels = make_flow(**FLOWS["nvp"]), [0, 0]
    z, images = latents(flow, 2), sample(flow, num=2).images
    for call in (lambda: flow.log_prob(images, labels), lambda: jf.decode(flow, z, labels)):
        with pytest.raises(ValueError, match="labels or a context given, but this flow takes none: leave them out"):
            call()
    with pytest.raises(ValueError, match="the training images had no noise"):
        sample(flow, num=2, settings=jf.SamplingSettings(denoise=1.0))


def test_guidance_that_changes_nothing_warns_or_is_off() -> None:
    flow, labels = make_flow(**CLASSES), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="changes nothing"):
        out = sample(flow.guided(jf.Guidance(2.0)), num=2, tolerance=1e-12, log_prob=True)
    own = sample(flow, num=2, tolerance=1e-12, log_prob=True)
    assert (out.images - own.images).abs().max() < SOLVED
    assert torch.allclose(out.log_prob, own.log_prob)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(flow.guided(jf.Guidance(0.5, attn_temperature=0.7)), num=2)
        off = sample(flow.guided(jf.Guidance(0.0, attn_temperature=0.3)), num=2, labels=labels)
    assert torch.equal(off.images, sample(flow, num=2, labels=labels).images)


def outcome(flow: jf.TarFlow, **settings: Any) -> tuple[str, list[str]]:
    """The sentence, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = jf.sample(flow, 4, **settings)
    return str(samples.outcome), [str(warning.message) for warning in caught]


def test_certified_and_exact_samples_are_counted_without_a_warning() -> None:
    flow, one_sweep = make_flow(), jf.Strategy.uniform(jf.Solver(stopping=jf.Stopping(1)), 2, 1e-9)
    exact = "4 samples: 4 exact, since every block was solved token by token"
    for settings, text in (
        ({"strategy": "sequential"}, exact), ({"strategy": "[0/1-16-1-1]"}, exact),
        ({"strategy": "jacobi", "tolerance": 1e-9}, "4 samples: 4 certified to 1e-09"),
        ({"strategy": one_sweep, "certify": False}, f"{exact}; 4 solved again token by token"),
        ({"strategy": "jacobi", "certify": False}, "4 samples: not certified, since certificates were turned off"),
    ):  # fmt: skip
        assert outcome(flow, **settings) == (text, [])


def test_samples_of_a_number_of_sweeps_are_not_certified() -> None:
    largest = float(jf.sample(make_flow(), 4, strategy="[1-4-1-2]").residual.max())
    text = "4 samples: not certified, since the strategy stops after a fixed number of sweeps; the largest residual is"
    assert outcome(make_flow(), strategy="[1-4-1-2]") == (f"{text} {largest:.1e}", [f"{text} {largest:.1e}"])


def test_samples_above_the_tolerance_are_named_with_the_reason() -> None:
    flow, labels = jf.load("digits-p1", dtype="bfloat16"), [0, 1, 2, 3]
    text, caught = outcome(flow, labels=labels, strategy="window:8", tolerance=1e-4)
    assert caught == [text]
    samples = jf.sample(flow, 4, labels, strategy="window:8", tolerance=1e-4)
    num, largest = int((samples.residual > 1e-4).sum()), float(samples.residual.max())
    assert f"; {num} above the tolerance, up to {largest:.1e}, by the rounding of the network" in text


def test_sensitivity_is_near_the_error_beside_float64() -> None:
    """Within a factor of four for nine samples of ten of a guided model."""
    flow, labels = jf.load("fashion-p2"), torch.arange(10)
    settings = {"settings": jf.SamplingSettings(flow.recommended.guidance), "strategy": "sequential"}
    out = jf.sample(flow, 10, labels, sensitivity=True, **settings)
    exact = jf.sample(copy.deepcopy(flow).double(), latents=out.latents.double(), labels=labels, **settings).x
    ratio = out.sensitivity / (out.x - exact).abs().flatten(1).amax(dim=1)
    assert ((ratio > 1 / 4) & (ratio < 4)).double().mean() >= 0.9


@pytest.mark.parametrize(("dtype", "size"), [("float64", 1e-15), ("float32", 1e-6), ("bfloat16", 1e-6)])
def test_sensitivity_leaves_samples_as_they_are(dtype: str, size: float) -> None:
    flow, labels = jf.load("digits-p1", dtype=dtype), torch.arange(5)
    plain, measured = (
        jf.sample(flow, 5, labels, strategy="sequential", batch_size=2, sensitivity=is_measured)
        for is_measured in (False, True)
    )
    assert torch.equal(plain.x, measured.x)
    assert plain.outcome.network_calls == measured.outcome.network_calls
    assert plain.sensitivity is plain.outcome.sensitivity is plain.outcome.num_sensitive is None
    assert ((measured.sensitivity > size / 30) & (measured.sensitivity < size * 30)).all()


def test_a_sample_is_lost_or_sensitive_if_a_solve_overflows() -> None:
    flow, z = to_float32(make_flow()), latents(make_flow(), 3)
    z[1] = 3.4e38
    with pytest.warns(UserWarning, match="1 not finite"):
        out = sample(flow, latents=z, sensitivity=True)
    assert out.sensitivity.isinf().tolist() == [False, True, False]
    assert out.outcome.num_sensitive == 0 and 0 < out.outcome.sensitivity < 1e-3
    other = replace(out, stats=sample(flow, latents=z[[0, 0, 2]]).stats, dtype="float64")
    assert str(other.outcome).endswith("; 1 of 3 samples amplify float64 rounding above 0.01")


def test_a_flow_is_sampled_as_its_model_recommends() -> None:
    """Recommended guidance needs labels, and does not replace that of a view; settings that are given do."""
    flow, labels, z = copy.copy(make_flow(**CLASSES)), torch.tensor([0, 2]), latents(make_flow(**CLASSES), 2)
    flow.recommended = jf.SamplingSettings(jf.Guidance(0.5), denoise=0.7)
    own, other = jf.Guidance(0.2), jf.SamplingSettings(jf.Guidance(1))

    def drawn(view: Any, labels: Tensor | None, **settings: Any) -> Tensor:
        return jf.sample(view, latents=z, labels=labels, strategy="sequential", **settings).images

    def by_hand(guidance: jf.Guidance | None, labels: Tensor | None, rate: float) -> Tensor:
        images = drawn(flow.guided(guidance), labels, settings=None)
        return jf.denoise(flow, images, labels, rate) if rate else images

    for view, classes, settings, want in (
        (flow, labels, {}, by_hand(jf.Guidance(0.5), labels, 0.7)),
        (flow, None, {}, by_hand(None, None, 0.7)),
        (flow.guided(own), labels, {}, by_hand(own, labels, 0.7)),
        (flow.guided(own), labels, {"settings": None}, by_hand(own, labels, 0.0)),
        (flow.guided(own), labels, {"settings": other}, by_hand(other.guidance, labels, 0.0)),
        (flow, labels, {"settings": jf.SamplingSettings(denoise=1.0)}, by_hand(None, labels, 1.0)),
    ):
        torch.testing.assert_close(drawn(view, classes, **settings), want, rtol=0, atol=EXACT)
    out = jf.sample(flow, latents=z, labels=labels, strategy="sequential", return_intermediates=True)
    assert torch.equal(out.intermediates[-1], out.images) and out.seconds > 0 < out.denoise_seconds
    torch.testing.assert_close(out.images, jf.denoise(flow, out.intermediates[-2], labels, 0.7), rtol=0, atol=EXACT)
    with pytest.raises(ValueError, match="log_prob=True: guided or denoised samples are of another density"):
        drawn(flow, labels, log_prob=True)
    with pytest.raises(ValueError, match="settings"):
        drawn(flow, labels, settings="best")


def test_samples_are_saved_and_shown(tmp_path: Path) -> None:
    flow, labels = make_flow(**CLASSES), torch.tensor([0, 2])
    out = jf.sample(flow, 2, labels, strategy="sequential", certify="always")
    assert repr(out).startswith(
        "Samples((2, 1, 8, 8); 2 samples: 2 exact, since every block was solved token by token; "
    )
    out.save(tmp_path / "new" / "folder")
    with np.load(tmp_path / "new" / "folder" / "samples.npz") as arrays:
        assert set(arrays) == {"x", "latents", "labels", "residual", "status", "exact"}
        assert np.array_equal(arrays["x"], out.images) and np.array_equal(arrays["labels"], labels)
    sheet = np.asarray(out.grid())
    for i in range(2):
        with Image.open(tmp_path / "new" / "folder" / f"0000{i}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape == (8, 8)
        assert np.array_equal(sheet[4:-4, 4:, 0][:, i * 340 : i * 340 + 336][::42, ::42], pixels)
    with killed(2), pytest.raises(Killed):
        out.save(tmp_path / "stopped")
    assert sorted(path.name for path in (tmp_path / "stopped").glob("[!.]*")) == ["samples.npz"]
