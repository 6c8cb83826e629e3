"""Guided parameters, likelihood and denoising, against the oracle and dense Jacobians, in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import latents, make_flow
from torch import Tensor

import jacobiflow as jf
from jacobiflow.guidance import GuidedBlock

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10

CLASSES: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_classes": 3}
CLASSLESS: dict[str, Any] = {"image_size": 6, "patch_size": 2, "in_channels": 3}
SHIFTS: dict[str, Any] = {"image_size": 6, "patch_size": 2, "num_classes": 2, "nvp": False, "noise_std": 0.2}
SCALES: dict[str, Any] = {"image_size": 6, "patch_size": 2, "num_classes": 3, "noise_std": 0.1}
TINY: dict[str, Any] = {"image_size": 3, "patch_size": 1, "noise_std": 0.3}
CONFIGS = {"nvp, classes": CLASSES, "nvp, no classes": CLASSLESS, "vp, classes": SHIFTS}
DENSITIES = {"nvp, classes": SCALES, "nvp, no classes": TINY, "vp, classes": SHIFTS}


def some_labels(flow: jf.TarFlow) -> Tensor | None:
    classes = flow.config.num_classes
    return torch.tensor([0, -1, classes - 1]) if classes else None


def some_images(flow: jf.TarFlow, num: int = 3, seed: int = 2) -> Tensor:
    config = flow.config
    shape = (num, config.in_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ guidance


@given(
    config=st.sampled_from([CLASSES, CLASSLESS, SHIFTS]),
    i=st.integers(0, 1),
    weight=st.floats(0.1, 3),
    annealed=st.booleans(),
    on=st.sampled_from(["both", "scale", "shift"]),
    temperature=st.sampled_from([1.0, 0.7, 1.6]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_guided_map_is_the_formula_s(
    config: dict[str, Any], i: int, weight: float, annealed: bool, on: Any, temperature: float, data: st.DataObject
) -> None:
    """In one pass, and in runs of tokens over a cache."""
    flow = make_flow(**config)
    x, z, labels = latents(flow, 3, seed=1), latents(flow, 3, seed=2), some_labels(flow)
    block = GuidedBlock(flow.blocks[i], jf.Guidance(weight, annealed, on, temperature))
    guide = oracle.Guide(weight, annealed, on, temperature)
    expected = oracle.Oracle(flow).g(i, x, z, labels, guide)
    length = z.shape[1]

    with torch.no_grad():
        whole = block.update(x, z, 0, length, block.init_cache(z, labels))
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))), length]
        cache = block.init_cache(z, labels)
        runs = [block.update(x, z, a, b, cache) for a, b in pairwise(cuts)]
    assert torch.allclose(whole, expected, rtol=EXACT, atol=EXACT)
    assert torch.allclose(torch.cat(runs, dim=1), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_annealed_weight_rises_from_0_at_the_first_token_to_the_whole_at_the_last(config: dict[str, Any]) -> None:
    flow = make_flow(**config)
    x, z, labels = latents(flow, 3, seed=1), latents(flow, 3, seed=2), some_labels(flow)
    plain, annealed, constant = (
        block.affine(x, 0, z.shape[1], block.init_cache(z, labels))[1]
        for block in (
            flow.blocks[0],
            GuidedBlock(flow.blocks[0], jf.Guidance(2.0, annealed=True, attn_temperature=0.5)),
            GuidedBlock(flow.blocks[0], jf.Guidance(2.0, annealed=False, attn_temperature=0.5)),
        )
    )
    share = torch.linspace(0, 1, z.shape[1], dtype=torch.float64).view(1, -1, 1)
    assert torch.allclose(annealed - plain, share * (constant - plain), atol=EXACT)
    assert (constant[:, 1:] - plain[:, 1:]).abs().amax(dim=(1, 2)).min() > 1e-3  # guidance does something


def test_guidance_of_a_row_without_a_label_does_nothing_at_temperature_1() -> None:
    flow = make_flow(**CLASSES)
    x, z, labels = latents(flow, 3, seed=1), latents(flow, 3, seed=2), some_labels(flow)
    guided = GuidedBlock(flow.blocks[1], jf.Guidance(2.0, annealed=False))
    difference = guided.update(x, z, 0, 16, guided.init_cache(z, labels)) - flow.blocks[1].update(
        x, z, 0, 16, flow.blocks[1].init_cache(z, labels)
    )
    assert difference[1].abs().max() < EXACT
    assert difference[[0, 2]].abs().amax(dim=(1, 2)).min() > 1e-3


def test_temperature_reaches_the_unconditional_row_only() -> None:
    """As the weight falls to 0, so does what the temperature does."""
    flow = make_flow(**CLASSES)
    x, z, labels = latents(flow, 3, seed=1), latents(flow, 3, seed=2), some_labels(flow)
    blocks = [flow.blocks[0], GuidedBlock(flow.blocks[0], jf.Guidance(1e-12, attn_temperature=0.2))]
    plain, guided = (block.update(x, z, 0, 16, block.init_cache(z, labels)) for block in blocks)
    assert torch.allclose(plain, guided, atol=1e-9)


def test_guidance_of_guidance_is_refused_where_its_temperature_would_be_lost() -> None:
    flow = make_flow(**CLASSES)
    inner = GuidedBlock(flow.blocks[0], jf.Guidance(1.0))
    z = latents(flow, 2)
    with pytest.raises(ValueError, match="attn_temperature"):
        GuidedBlock(inner, jf.Guidance(1.0, attn_temperature=0.5)).init_cache(z, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("settings_", "names"),
    [
        ({"weight": -1.0}, "-1.0"),
        ({"weight": math.nan}, "nan"),
        ({"weight": math.inf}, "inf"),
        ({"weight": 1.0, "attn_temperature": 0.0}, "0.0"),
        ({"weight": 1.0, "attn_temperature": -2.0}, "-2.0"),
        ({"weight": 1.0, "attn_temperature": math.nan}, "nan"),
        ({"weight": 1.0, "on": "mean"}, "mean"),
    ],
)
def test_guidance_refuses_what_makes_no_sense(settings_: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        jf.Guidance(**settings_)


# ---------------------------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("config", [*CONFIGS.values(), TINY], ids=[*CONFIGS, "one channel"])
def test_encodes_as_the_oracle(config: dict[str, Any]) -> None:
    flow = make_flow(**config)
    images, labels = some_images(flow), some_labels(flow)
    z, log_det = flow.encode(images, labels)
    expected_z, expected_log_det = oracle.Oracle(flow).encode(images, labels)
    assert torch.allclose(z, expected_z, rtol=EXACT, atol=EXACT)
    assert torch.allclose(log_det, expected_log_det, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_labels_are_labels_below_0(config: dict[str, Any]) -> None:
    flow = make_flow(**config)
    images = some_images(flow)
    if flow.config.num_classes:
        none, below = flow.encode(images)[0], flow.encode(images, torch.tensor([-1, -1, -7]))[0]
        assert torch.equal(none, below)
        assert not torch.allclose(none, flow.encode(images, torch.tensor([0, 1, 1]))[0], atol=1e-3)


@pytest.mark.parametrize("config", DENSITIES.values(), ids=DENSITIES)
def test_log_det_is_that_of_the_dense_jacobian(config: dict[str, Any]) -> None:
    flow = make_flow(**config)
    images, labels = some_images(flow), some_labels(flow)
    log_det = flow.encode(images, labels)[1]
    for n in range(len(images)):
        row = None if labels is None else labels[n : n + 1]

        def encode(x: Tensor, n: int = n, row: Tensor | None = row) -> Tensor:
            return flow.encode(x.view_as(images[n : n + 1]), row)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(encode, images[n].flatten(), vectorize=True)
        assert abs(log_det[n] - torch.linalg.slogdet(jacobian).logabsdet) < 1e-9


@pytest.mark.parametrize("config", DENSITIES.values(), ids=DENSITIES)
def test_log_prob_is_the_normal_density_of_the_encoding(config: dict[str, Any]) -> None:
    flow = make_flow(**config)
    images, labels = some_images(flow), some_labels(flow)
    z, log_det = oracle.Oracle(flow).encode(images, labels)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=(1, 2))
    assert torch.allclose(flow.log_prob(images, labels), normal + log_det, rtol=EXACT)
    bits = -flow.log_prob(images, labels) / math.log(2) / images[0].numel() + 7
    assert torch.allclose(flow.bits_per_dim(images, labels), bits, rtol=EXACT)


# ----------------------------------------------------------------------------------------------------------- denoising


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("config", DENSITIES.values(), ids=DENSITIES)
def test_denoising_is_a_step_along_the_score(config: dict[str, Any], rate: float) -> None:
    """The score by central differences of the oracle's log-density, whose error is about 1e-8 of its size."""
    flow = make_flow(**config)
    images, labels = some_images(flow), some_labels(flow)
    reference, step = oracle.Oracle(flow), 1e-5

    def log_density(x: Tensor) -> Tensor:
        rows = None if labels is None else labels.repeat_interleave(len(x) // len(images))
        z, log_det = reference.encode(x, rows)
        return log_det - 0.5 * z.square().flatten(1).sum(dim=1)

    size = images[0].numel()
    moves = step * torch.eye(size, dtype=torch.float64).view(1, size, *images.shape[1:])
    up, down = ((images[:, None] + sign * moves).flatten(0, 1) for sign in (1, -1))
    score = ((log_density(up) - log_density(down)) / (2 * step)).view_as(images)

    denoised = jf.denoise(flow, images, labels, rate)
    expected = images + rate * flow.config.noise_std**2 * score
    assert (denoised - images).abs().max() > 1e-3
    assert torch.allclose(denoised, expected, rtol=1e-6, atol=1e-6)


def test_denoising_does_not_depend_on_the_batch_size_nor_on_other_images() -> None:
    flow = make_flow(**SCALES)
    images, labels = some_images(flow, 7), torch.tensor([0, 1, 2, -1, 0, 1, 2])
    all_at_once = jf.denoise(flow, images, labels)
    for batch_size in (1, 3, 7):
        assert torch.allclose(jf.denoise(flow, images, labels, batch_size=batch_size), all_at_once, atol=EXACT)
    lost = images.clone()
    lost[2] = torch.nan
    others = [0, 1, 3, 4, 5, 6]
    assert torch.allclose(jf.denoise(flow, lost, labels)[others], all_at_once[others], atol=EXACT)
    assert jf.denoise(flow, lost, labels)[2].isnan().all()


def test_denoising_leaves_its_inputs_and_no_gradients() -> None:
    flow = make_flow(**SCALES)
    images, labels = some_images(flow), torch.tensor([0, 1, 2])
    kept = images.clone()
    denoised = jf.denoise(flow, images, labels)
    assert torch.equal(images, kept)
    assert not images.requires_grad
    assert not denoised.requires_grad
    assert all(parameter.grad is None for parameter in flow.parameters())
    with torch.no_grad():
        assert torch.equal(jf.denoise(flow, images, labels), denoised)


@pytest.mark.parametrize("rate", [-0.5, math.nan, math.inf])
def test_denoising_refuses_a_rate_that_makes_no_sense(rate: float) -> None:
    flow = make_flow(**SCALES)
    with pytest.raises(ValueError, match=str(rate)):
        jf.denoise(flow, some_images(flow), rate=rate)


def test_denoising_needs_the_noise_that_was_trained_on() -> None:
    flow = make_flow(**CLASSES)
    with pytest.raises(ValueError, match="noise_std"):
        jf.denoise(flow, some_images(flow))
    assert torch.equal(jf.denoise(flow, some_images(flow), rate=0.0), some_images(flow))
