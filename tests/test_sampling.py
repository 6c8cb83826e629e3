"""Images end to end: against the oracle's token-by-token inverse, back through the encoding, and with bad input."""

from __future__ import annotations

import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from problems import latents, make_flow, to_float32
from torch import Tensor

import jacobiflow as jf
from jacobiflow.latents import draw_latents

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10
# A tolerance of 1e-12 in each of two or three blocks, amplified by at most 1e3.
SOLVED = 1e-8

FLOWS: dict[str, dict[str, Any]] = {
    "nvp, classes": {"image_size": 8, "patch_size": 2, "num_classes": 3, "num_blocks": 3},
    "nvp": {"image_size": 5, "patch_size": 1},
    "vp, classes": {"image_size": 6, "patch_size": 2, "in_channels": 3, "num_classes": 2, "nvp": False},
    "vp": {"image_size": 8, "patch_size": 2, "nvp": False},
}
CLASSES = FLOWS["nvp, classes"]
GUIDES = {
    "none": None,
    "annealed": oracle.Guide(0.8, annealed=True, on="both", temperature=0.7),
    "constant": oracle.Guide(0.5, annealed=False, on="both", temperature=1.3),
}
STRATEGIES = ["auto", "sequential", "jacobi", "gs-jacobi:3", "window:4"]


def some_labels(flow: jf.TarFlow, num: int = 4) -> Tensor | None:
    classes = flow.config.num_classes
    return torch.arange(num) % (classes + 1) - 1 if classes else None


def as_guidance(guide: oracle.Guide | None) -> jf.Guidance | None:
    return None if guide is None else jf.Guidance(guide.weight, guide.annealed, guide.on, guide.temperature)  # type: ignore[arg-type]


@cache
def answer(name: str, guide: str) -> Tensor:
    flow = make_flow(**FLOWS[name])
    return oracle.Oracle(flow).decode(latents(flow, 4), some_labels(flow), GUIDES[guide])


def quiet(flow: jf.TarFlow, **arguments: Any) -> jf.Samples:
    return jf.sample(flow, **{"progress": False, **arguments})


# --------------------------------------------------------------------------------------------------- the right images


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("name", FLOWS)
def test_samples_are_the_oracle_s(name: str, guide: str, strategy: str) -> None:
    flow = make_flow(**FLOWS[name])
    z, labels = latents(flow, 4), some_labels(flow)
    guidance = as_guidance(GUIDES[guide])
    out = quiet(flow, latents=z, labels=labels, strategy=strategy, guidance=guidance, tolerance=1e-12)
    assert (out.images - answer(name, guide)).abs().max() < SOLVED
    assert (out.status == jf.Status.CONVERGED).all()
    assert out.certificate is not None
    assert (out.certificate <= 1e-12).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", FLOWS)
def test_decoding_inverts_encoding(name: str, strategy: str) -> None:
    flow = make_flow(**FLOWS[name])
    z, labels = latents(flow, 4, seed=3), some_labels(flow)
    out = jf.decode(flow, z, labels, strategy=strategy, tolerance=1e-12)
    assert (flow.encode(out.images, labels)[0] - z).abs().max() < SOLVED
    images = torch.randn(out.images.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    codes = flow.encode(images, labels)[0]
    assert (jf.decode(flow, codes, labels, strategy=strategy, tolerance=1e-12).images - images).abs().max() < SOLVED


@pytest.mark.parametrize("name", ["nvp, classes", "vp, classes"])
def test_no_labels_are_labels_below_0(name: str) -> None:
    flow = make_flow(**FLOWS[name])
    z = latents(flow, 4)
    none, below, some = (
        quiet(flow, latents=z, labels=labels, tolerance=1e-12).images
        for labels in (None, torch.tensor([-1, -1, -9, -1]), torch.tensor([0, 1, 0, 1]))
    )
    assert torch.equal(none, below)
    assert (none - some).flatten(1).abs().amax(dim=1).min() > 1e-3


def first_order_amplification(flow: jf.TarFlow, latent: Tensor, label: Tensor | None) -> float:
    """Bound, to first order, on an image's largest error over a residual of at most 1 in each block of one sample.

    An error e of a block's input z and a residual r leave (I - dg/dx)^-1 (dg/dz e + r) in its answer. So each block's
    residual reaches the image by a matrix, and these have row sums.
    """
    reference = oracle.Oracle(flow)
    x = latent * reference.var.sqrt()
    shape = latent.shape[1:]
    reach: list[Tensor] = []  # by which matrix the residual of each block so far reaches x
    for i in reversed(range(reference.num_blocks)):
        z = reference.flip(i, x)
        solved = reference.invert_block(i, z, label)

        def g(flat: Tensor, i: int = i, z: Tensor = z) -> Tensor:
            return reference.g(i, flat.view_as(z), z, label).flatten()

        gamma = torch.autograd.functional.jacobian(g, solved.flatten(), vectorize=True)
        inverse = torch.linalg.inv(torch.eye(len(gamma), dtype=torch.float64) - gamma)
        scale = reference.parameters(i, solved, label)[0].exp().view(-1, 1)
        order = reference.flip(i, torch.arange(len(gamma)).view(1, *shape)).flatten()
        reach = [(inverse @ (scale * matrix[order]))[order] for matrix in reach] + [inverse[order]]
        x = reference.flip(i, solved)
    return float(sum(matrix.abs().sum(dim=1) for matrix in reach).max())  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
@pytest.mark.parametrize("name", FLOWS)
def test_the_paired_error_is_the_residual_amplified(name: str, tolerance: float, strategy: str) -> None:
    flow = make_flow(**FLOWS[name])
    z, labels = latents(flow, 4), some_labels(flow)
    out = quiet(flow, latents=z, labels=labels, strategy=strategy, tolerance=tolerance)
    assert out.certificate is not None
    assert (out.certificate <= tolerance).all()
    paired = (out.images - answer(name, "none")).abs().flatten(1).amax(dim=1)
    # A half more for what is not of first order.
    assert (paired <= 1.5 * tolerance * amplifications(name) + EXACT).all()


@cache
def amplifications(name: str) -> Tensor:
    flow = make_flow(**FLOWS[name])
    z, labels = latents(flow, 4), some_labels(flow)
    rows = [slice(n, n + 1) for n in range(len(z))]
    found = [first_order_amplification(flow, z[row], None if labels is None else labels[row]) for row in rows]
    return torch.tensor(found, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- what is said of them


@pytest.mark.parametrize("strategy", ["jacobi-2", "[0/2-4-2-3]", "jacobi", "window:3"])
@pytest.mark.parametrize("guide", GUIDES)
def test_the_certificate_is_the_largest_residual_of_any_block(guide: str, strategy: str) -> None:
    """Computed by the oracle, from the trace."""
    flow = make_flow(**CLASSES)
    reference, labels = oracle.Oracle(flow), some_labels(flow)
    out = quiet(
        flow, latents=latents(flow, 4), labels=labels, guidance=as_guidance(GUIDES[guide]), strategy=strategy,
        return_trace=True,
    )  # fmt: skip
    assert out.trace is not None
    assert out.certificate is not None
    assert len(out.trace) == 4
    assert torch.equal(out.trace[-1], out.images)
    residuals = []
    for step, i in enumerate(reversed(range(3))):
        z, x = (reference.flip(i, reference.patches(out.trace[step + k])) for k in (0, 1))
        residuals.append((reference.g(i, x, z, labels, GUIDES[guide]) - x).abs().amax(dim=(1, 2)))
        assert torch.allclose(out.stats[i].residual, residuals[-1], rtol=1e-6, atol=1e-12)
    assert torch.allclose(out.certificate, torch.stack(residuals).amax(dim=0), rtol=1e-6, atol=1e-12)
    assert torch.allclose(reference.patches(out.trace[0]), latents(flow, 4) * reference.var.sqrt())


def test_the_trace_ends_with_the_denoised_images() -> None:
    flow = make_flow(**{**CLASSES, "noise_std": 0.1})
    labels = some_labels(flow)
    out = quiet(flow, latents=latents(flow, 4), labels=labels, denoise=0.5, return_trace=True, batch_size=3)
    assert out.trace is not None
    assert len(out.trace) == 3 + 2
    assert torch.equal(out.trace[-1], out.images)
    assert torch.allclose(out.images, jf.denoise(flow, out.trace[-2], labels, 0.5), atol=EXACT)
    assert (out.trace[-1] - out.trace[-2]).abs().max() > 1e-4


def test_statistics_add_up() -> None:
    flow = make_flow(**CLASSES)
    out = quiet(flow, num=5, strategy="sequential", certify=False, batch_size=2)
    for block in out.stats:
        assert block.sweeps == block.network_calls == 3 * 16
        assert block.token_evaluations == 5 * 16
        assert block.status.shape == block.residual.shape == block.resolved_sequentially.shape == (5,)
    assert out.network_calls == 3 * 3 * 16
    assert out.token_evaluations == 3 * 5 * 16
    assert out.certificate is None
    certified = quiet(flow, num=5, strategy="sequential", batch_size=2)
    assert certified.network_calls == out.network_calls + 3 * 3
    assert certified.token_evaluations == 2 * out.token_evaluations
    assert torch.equal(certified.images, out.images)
    assert certified.images.shape == (5, 1, 8, 8)
    assert certified.latents.shape == (5, 16, 4)


def test_max_sweeps_is_a_legitimate_end_and_said() -> None:
    flow = make_flow(**CLASSES)
    out = quiet(flow, num=3, strategy="jacobi-2")
    assert (out.status == jf.Status.MAX_SWEEPS).all()
    assert out.resolved_sequentially == 0
    assert all(block.sweeps == 2 for block in out.stats)
    x = out.latents.double() * flow.var.sqrt()
    reference = oracle.Oracle(flow)
    for i in (2, 1, 0):
        z = reference.flip(i, x)
        x = reference.flip(i, oracle.jacobi(lambda x, i=i, z=z: reference.g(i, x, z), z, 2))  # type: ignore[misc]
    assert (out.images - reference.images(x)).abs().max() < EXACT


def test_samples_that_miss_are_solved_again_and_counted() -> None:
    flow = make_flow(**CLASSES)
    strategy = jf.Strategy.uniform(jf.Solver(stopping=jf.Tolerance(1e-10) | jf.MaxSweeps(3)), 3)
    labels = some_labels(flow)
    out = quiet(flow, latents=latents(flow, 4), labels=labels, strategy=strategy)
    assert out.resolved_sequentially == 4
    assert (out.status == jf.Status.CONVERGED).all()
    assert (out.images - answer("nvp, classes", "none")).abs().max() < SOLVED


# --------------------------------------------------------------------------------------------------------- randomness


def test_a_seed_fixes_the_samples() -> None:
    flow = make_flow(**CLASSES)
    one, again, other = (quiet(flow, num=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.images, again.images)
    assert (one.images - other.images).abs().max() > 0.1
    assert torch.equal(one.latents, draw_latents(3, 16, 4, seed=1).double())
    more = quiet(flow, num=5, seed=1, tolerance=1e-12).images
    assert (more[:3] - quiet(flow, num=3, seed=1, tolerance=1e-12).images).abs().max() < SOLVED


@pytest.mark.parametrize("strategy", ["sequential", "jacobi-3", "[2-5-2-4]", "jacobi", "auto"])
@pytest.mark.parametrize("guide", ["none", "annealed"])
def test_batches_change_rounding_only(guide: str, strategy: str) -> None:
    flow = make_flow(**CLASSES)
    labels = torch.arange(7) % 4 - 1
    images, certificates = [], []
    for batch_size in (None, 1, 3, 100):
        out = quiet(
            flow, num=7, labels=labels, batch_size=batch_size, strategy=strategy, guidance=as_guidance(GUIDES[guide]),
            tolerance=None if strategy in ("jacobi-3", "[2-5-2-4]") else 1e-12,
        )  # fmt: skip
        images.append(out.images)
        certificates.append(out.certificate)
    for other, certificate in zip(images[1:], certificates[1:], strict=True):
        assert (other - images[0]).abs().max() < SOLVED
        assert torch.allclose(certificate, certificates[0], rtol=1e-6, atol=1e-11)


def test_float32_batches_agree() -> None:
    flow = to_float32(make_flow(**CLASSES))
    images = [quiet(flow, num=7, batch_size=size, strategy="sequential").images for size in (None, 1, 3)]
    assert images[0].dtype == torch.float32
    for other in images[1:]:
        assert (other - images[0]).abs().max() < 1e-3


def test_inputs_and_weights_stay() -> None:
    flow = make_flow(**{**CLASSES, "noise_std": 0.1})
    z, labels = latents(flow, 4), some_labels(flow)
    assert labels is not None
    kept_z, kept_labels = z.clone(), labels.clone()
    weights = {name: value.clone() for name, value in flow.state_dict().items()}
    for strategy in (*STRATEGIES, "[0-3-2-4]"):
        quiet(
            flow, latents=z, labels=labels, strategy=strategy, guidance=jf.Guidance(0.5), denoise=1.0,
            return_trace=True,
        )  # fmt: skip
    assert torch.equal(z, kept_z)
    assert torch.equal(labels, kept_labels)
    assert all(torch.equal(value, weights[name]) for name, value in flow.state_dict().items())
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_images_are_ordinary_tensors_without_a_history() -> None:
    flow = make_flow(**CLASSES)
    z = latents(flow, 2).requires_grad_()
    out = quiet(flow, latents=z)
    assert not out.images.requires_grad
    images = out.images.requires_grad_()
    (score,) = torch.autograd.grad(flow.log_prob(images).sum(), images)
    assert score.isfinite().all()


def test_denoising_works_in_inference_mode() -> None:
    flow = make_flow(**{**CLASSES, "noise_std": 0.1})
    expected = quiet(flow, num=2, denoise=1.0).images
    with torch.inference_mode():
        assert torch.equal(quiet(flow, num=2, denoise=1.0).images, expected)


# ----------------------------------------------------------------------------------------------------------- overflow


def steep_flow() -> tuple[jf.TarFlow, Tensor]:
    """A float32 TarFlow x_t = exp(30 x_(t-1)) z_t - 1/2 and three latents; plain sweeps of the first and last overflow.

    Their exact images are about -1/2 everywhere: z = (-1/2, 10, 10, ...) makes x_(t-1) = -1/2 and the scale e^-15.
    From z, or from zeros, the scale is e^300.
    """
    flow = jf.TarFlow(jf.TarFlowConfig(1, 3, 1, channels=8, num_blocks=1, layers_per_block=1, head_dim=8)).eval()
    block = flow.blocks[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.proj_in.weight[0] = 1
        block.proj_out.weight[0, 0] = 30
        block.proj_out.bias[1] = -0.5
    z = torch.full((3, 9, 1), 10.0)
    z[:, 0] = -0.5
    z[1] = -0.4
    return flow, z


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize(
    ("strategy", "gives_up"),
    [
        ("jacobi", False), ("jacobi-3", True), ("[0-2-2-9]", True), ("gs-jacobi:2", False), ("window:4", False),
        (jf.Strategy.uniform(jf.Solver(jf.Whole(), jf.Zeros(), jf.MaxSweeps(4)), 1), True),
        (jf.Strategy.uniform(jf.Solver(jf.Window(5), jf.Zeros(), jf.Tolerance(1e-5) | jf.MaxSweeps(3)), 1), True),
    ],
)  # fmt: skip
def test_sweeps_that_overflow_give_the_sequential_images(strategy: Any, gives_up: bool, certify: bool) -> None:
    flow, z = steep_flow()
    block = flow.blocks[0]
    first = block.update(z, z, 0, 9, block.init_cache(z)).detach()
    assert not first[[0, 2]].isfinite().all()
    assert first[1].isfinite().all()
    expected = oracle.Oracle(flow).decode(z)
    assert (expected[[0, 2]] + 0.5).abs().max() < 1e-4
    out = quiet(flow, latents=z, strategy=strategy, certify=certify)
    assert (out.images[[0, 2]] - expected[[0, 2]]).abs().max() < 1e-4
    assert (out.status[[0, 2]] == jf.Status.CONVERGED).all()
    assert out.stats[0].resolved_sequentially.tolist() == [gives_up, False, gives_up]
    assert out.resolved_sequentially == 2 * gives_up
    alone = quiet(flow, latents=z[1:2], strategy=strategy, certify=certify)
    assert (out.images[1] - alone.images[0]).abs().max() < 1e-4


LOST = r"1 of 3 samples.*NaN"


@pytest.mark.parametrize("strategy", ["sequential", "jacobi", "jacobi-3", "[1-4-2-3]", "window:3"])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_an_image_that_overflows_exactly_is_nan_with_a_warning(strategy: str, batch_size: int | None) -> None:
    flow = to_float32(make_flow(**CLASSES))
    z = latents(flow, 3)
    z[1] = 3.4e38
    with pytest.warns(UserWarning, match=LOST):
        out = quiet(flow, latents=z, strategy=strategy, batch_size=batch_size)
    assert out.images[1].isnan().all()
    assert out.status[1] == jf.Status.NONFINITE
    assert out.certificate is not None
    assert out.certificate[1] == torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = quiet(flow, latents=z[[0, 2]], strategy=strategy, batch_size=batch_size)
    assert (out.images[[0, 2]] - alone.images).abs().max() < 0.05
    assert (out.status[[0, 2]] == alone.status).all()
    assert (alone.status != jf.Status.NONFINITE).all()


def test_the_trace_of_a_lost_image_is_nan_too() -> None:
    flow = to_float32(make_flow(**CLASSES))
    z = latents(flow, 3)
    z[1] = 3.4e38
    with pytest.warns(UserWarning, match=LOST):
        out = quiet(flow, latents=z, return_trace=True)
    assert out.trace is not None
    assert torch.equal(out.trace[-1].isnan(), out.images.isnan())


def test_latents_that_overflow_in_the_prior_are_lost_images_too() -> None:
    flow = to_float32(make_flow(**FLOWS["vp"]))
    z = latents(flow, 3)
    z[1] = 3.4e38
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = quiet(flow, latents=z)
    assert out.images[1].isnan().all()
    assert out.certificate is not None
    assert out.certificate.isinf().tolist() == [False, True, False]
    for block in out.stats:  # lost before the first block, so lost in all
        assert (block.status == jf.Status.NONFINITE).tolist() == [False, True, False]
        assert block.residual.isinf().tolist() == [False, True, False]
    assert out.images[[0, 2]].isfinite().all()


def test_a_lost_image_does_not_spoil_the_denoising_of_the_others() -> None:
    flow = to_float32(make_flow(**{**CLASSES, "noise_std": 0.1}))
    z = latents(flow, 3)
    z[1] = 3.4e38
    with pytest.warns(UserWarning, match=LOST):
        out = quiet(flow, latents=z, strategy="sequential", denoise=1.0)
    assert out.images[1].isnan().all()
    assert (
        out.images[[0, 2]] - quiet(flow, latents=z[[0, 2]], strategy="sequential", denoise=1.0).images
    ).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "label too large": ({"num": 2, "labels": torch.tensor([0, 3])}, "label 3"),
    "too few labels": ({"num": 2, "labels": torch.tensor([0])}, r"\(1,\)"),
    "labels of floats": ({"num": 2, "labels": torch.tensor([0.0, 1.0])}, "float32"),
    "latents of a wrong shape": ({"latents": torch.zeros(2, 9, 4)}, r"\(2, 9, 4\)"),
    "latents without a batch": ({"latents": torch.zeros(16, 4)}, r"\(16, 4\)"),
    "no latents": ({"latents": torch.zeros(0, 16, 4)}, r"\(0, 16, 4\)"),
    "a NaN among the latents": ({"latents": torch.full((2, 16, 4), math.nan)}, "NaN"),
    "an infinity among the latents": ({"latents": torch.full((2, 16, 4), math.inf)}, "infinity"),
    "neither num nor latents": ({}, "num.*latents"),
    "both num and latents": ({"num": 2, "latents": torch.zeros(2, 16, 4)}, "num.*latents"),
    "num 0": ({"num": 0}, "num=0"),
    "num -1": ({"num": -1}, "num=-1"),
    "batch_size 0": ({"num": 2, "batch_size": 0}, "batch_size=0"),
    "batch_size -3": ({"num": 2, "batch_size": -3}, "batch_size=-3"),
    "negative tolerance": ({"num": 2, "tolerance": -0.5}, "-0.5"),
    "negative tolerance, swept": ({"num": 2, "tolerance": -0.5, "strategy": "jacobi-3"}, "-0.5"),
    "tolerance nan": ({"num": 2, "tolerance": math.nan}, "nan"),
    "more segments than tokens": ({"num": 2, "strategy": "gs-jacobi:17"}, "17"),
    "more segments than tokens, stacked": ({"num": 2, "strategy": "[2-17-1-3]"}, "17"),
    "window 0": ({"num": 2, "strategy": "window:0"}, "0"),
    "no segments": ({"num": 2, "strategy": "gs-jacobi:0"}, "0"),
    "no sweeps": ({"num": 2, "strategy": "jacobi-0"}, "0"),
    "unknown strategy": ({"num": 2, "strategy": "newton"}, "newton"),
    "missing file": ({"num": 2, "strategy": "nowhere/none.json"}, "none.json"),
    "missing path": ({"num": 2, "strategy": Path("nowhere")}, "nowhere"),
    "too many blocks": ({"num": 2, "strategy": jf.Strategy.uniform(jf.Solver(), 4)}, "4.*3"),
    "a block that is not there": ({"num": 2, "strategy": "[3-2-2-3]"}, "block 3"),
    "denoising without noise": ({"num": 2, "denoise": 1.0}, "noise_std"),
    "negative denoising": ({"num": 2, "denoise": -1.0}, "-1.0"),
}


@pytest.mark.parametrize(("arguments", "names"), BAD.values(), ids=BAD)
def test_bad_input_is_a_value_error_that_names_it_before_any_work(
    arguments: dict[str, Any], names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = make_flow(**CLASSES)

    def work(*_: Any) -> None:
        raise AssertionError("a block was evaluated")

    monkeypatch.setattr(type(flow.blocks[0]), "affine", work)
    with pytest.raises(ValueError, match=names):
        quiet(flow, **arguments)


def test_a_tolerance_is_checked_whatever_the_strategy() -> None:
    strategy = jf.Strategy.uniform(jf.Solver(stopping=jf.MaxSweeps(2)), 3)
    with pytest.raises(ValueError, match=r"-0\.5"):
        quiet(make_flow(**CLASSES), num=2, strategy=strategy, tolerance=-0.5)


def test_an_unconditional_flow_takes_no_labels() -> None:
    flow = make_flow(**FLOWS["nvp"])
    with pytest.raises(ValueError, match="unconditional"):
        quiet(flow, num=2, labels=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="unconditional"):
        jf.decode(flow, latents(flow, 2), torch.tensor([0, 0]))


def test_guidance_without_labels_or_temperature_warns() -> None:
    flow = make_flow(**CLASSES)
    with pytest.warns(UserWarning, match="changes nothing"):
        out = quiet(flow, num=2, guidance=jf.Guidance(2.0), tolerance=1e-12)
    assert (out.images - quiet(flow, num=2, tolerance=1e-12).images).abs().max() < SOLVED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(flow, num=2, guidance=jf.Guidance(0.5, attn_temperature=0.7))
        quiet(flow, num=2, guidance=jf.Guidance(0.5), labels=torch.tensor([0, 1]))


def test_guidance_of_weight_0_is_off() -> None:
    flow = make_flow(**CLASSES)
    labels = torch.tensor([0, 1])
    off = quiet(flow, num=2, labels=labels, guidance=jf.Guidance(0.0, attn_temperature=0.3))
    assert torch.equal(off.images, quiet(flow, num=2, labels=labels).images)


def test_a_strategy_may_come_from_a_file(tmp_path: Path) -> None:
    flow = make_flow(**CLASSES)
    strategy = jf.Strategy((jf.Solver(jf.Window(4)), jf.Solver(jf.Segments(3)), jf.Solver(jf.Whole())))
    strategy.save(tmp_path / "plan.json")
    images = [
        quiet(flow, num=2, strategy=s).images for s in (strategy, tmp_path / "plan.json", str(tmp_path / "plan.json"))
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_a_tolerance_replaces_those_of_a_strategy() -> None:
    flow = make_flow(**CLASSES)
    strategy = jf.Strategy.uniform(jf.Solver(stopping=jf.Tolerance(0.5)), 3)
    loose, tight = (quiet(flow, num=2, strategy=strategy, tolerance=tolerance) for tolerance in (None, 1e-9))
    assert loose.certificate is not None
    assert tight.certificate is not None
    assert 1e-3 < loose.certificate.max() <= 0.5
    assert tight.certificate.max() <= 1e-9


@pytest.mark.parametrize(
    "strategy", ["jacobi-3", "[2-5-2-4]", jf.Strategy.uniform(jf.Solver(stopping=jf.MaxSweeps(2)), 3)]
)
def test_a_tolerance_that_no_block_would_heed_is_refused(strategy: str | jf.Strategy) -> None:
    with pytest.raises(ValueError, match="would not heed it"):
        quiet(make_flow(**CLASSES), num=2, strategy=strategy, tolerance=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"labels": [0, 1]}, {"num": 2.0}, {"batch_size": 1.5}, {"guidance": 1.5}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_value_of_a_wrong_type_is_a_value_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        quiet(make_flow(**CLASSES), **{"num": 2, **wrong})
