"""Importance weights against their definition, and samples that may have none."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def flow() -> jf.TarFlow:
    """A Gaussian with another mean and scale than N(0, I)."""
    flow = jf.TarFlow(jf.TokenConfig(2, 1, width=8, num_blocks=1, layers_per_block=1, head_dim=8)).double()
    flow.var.fill_(1.5)
    flow.requires_grad_(False).blocks[0].proj_out.bias.zero_()
    return flow


def test_weights_are_those_of_the_definition() -> None:
    """The target is N(0.3, 1) in each of two values, its constant left out."""
    samples = jf.sample(flow(), 5_000)
    energy = (samples.tokens - 0.3).square().sum(dim=(1, 2)) / 2
    weights = jf.importance(samples, energy)
    q = -(samples.tokens.square() / 1.5 + math.log(2 * math.pi * 1.5)).sum(dim=(1, 2)) / 2
    torch.testing.assert_close(weights.log_weights, -energy - q, rtol=0, atol=1e-9)
    w = (-energy - q).exp()
    assert weights.effective_sample_size == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    torch.testing.assert_close(weights.mean(samples.tokens), (w.view(-1, 1, 1) * samples.tokens).sum(0) / w.sum())
    differences = samples.tokens - weights.mean(samples.tokens)
    error = (w.view(-1, 1, 1) * differences).square().sum(0).sqrt() / w.sum()
    torch.testing.assert_close(weights.standard_error(samples.tokens), error)
    assert ((weights.mean(samples.tokens) - 0.3).abs() < 4 * error).all()
    chosen = samples.tokens[weights.resample(20_000, seed=1)]
    assert (chosen.mean(dim=0) - 0.3).abs().max() < 0.05
    assert torch.equal(weights.resample(10, seed=2), weights.resample(10, seed=2))


@pytest.mark.parametrize("num", [50, 100, 1000, 2000])
def test_weights_warn_if_a_few_samples_decide(num: int) -> None:
    samples = jf.sample(flow(), num)
    with pytest.warns(UserWarning, match=r"worth \d.\d samples of the target: a few of them decide every average"):
        jf.importance(samples, 1000 * samples.tokens.square().sum(dim=(1, 2)))


def test_clipping_lowers_the_largest_weights() -> None:
    samples = jf.sample(flow(), 1000)
    energy = 4 * samples.tokens.square().sum(dim=(1, 2))
    plain, clipped = jf.importance(samples, energy), jf.importance(samples, energy, clip=0.01)
    bound = plain.log_weights.sort(descending=True).values[10]
    assert torch.equal(clipped.log_weights, plain.log_weights.clamp(max=float(bound)))


def test_a_folder_has_the_weights_of_its_samples(tmp_path: Path) -> None:
    """Its densities are stored, whole or resumed, to the bit."""
    single = copy.deepcopy(flow()).float()
    whole = jf.sample_to_folder(single, 12, tmp_path / "whole", batch_size=4, shard_size=4, strategy="sequential")
    jf.sample_to_folder(single, 8, tmp_path / "resumed", batch_size=4, shard_size=4, strategy="sequential")
    resumed = jf.sample_to_folder(single, 12, tmp_path / "resumed", batch_size=4, shard_size=4, strategy="sequential")
    assert resumed.num_new == 4
    for i in range(3):
        name = f"shards/{i:05}.npz"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    samples = jf.sample(single, 12, strategy="sequential", batch_size=4)
    assert torch.equal(torch.cat([whole.tokens(i) for i in range(3)]), samples.tokens)
    energy = samples.tokens.square().sum(dim=(1, 2))
    expected = jf.importance(samples, energy).log_weights
    for folder, energies in ((whole, energy), (tmp_path / "whole", energy.numpy())):
        assert torch.equal(jf.importance(folder, energies).log_weights, expected)
    with pytest.raises(ValueError, match=r"take \.tokens"):
        whole.images(0)


@pytest.mark.filterwarnings("ignore:.* samples")
def test_samples_that_are_not_from_the_density_have_no_weights() -> None:
    samples, energy = jf.sample(flow(), 4), torch.zeros(4)
    lost = torch.randn(4, 2, 1, dtype=torch.float64)
    lost[2] = 1.7e308
    (block,), status = samples.stats, torch.tensor([jf.Status.CONVERGED, jf.Status.ROUNDING, 0, 0])
    refused = {
        "not certified, since the strategy stops": jf.sample(flow(), 4, strategy="jacobi-1"),
        "not certified, since certificates were turned off": jf.sample(flow(), 4, strategy="jacobi", certify=False),
        "1 not finite": jf.sample(flow(), latents=lost),
        "1 above the tolerance": replace(samples, stats=(replace(block, status=status),)),
        "1 of 4 samples amplify": replace(samples, sensitivity=torch.tensor([0, 0, 0.1, 0])),
        "without densities": replace(samples, log_prob=None),
    }
    for words, each in refused.items():
        with pytest.raises(ValueError, match=words):
            jf.importance(each, energy)
    for bad, words in (
        (torch.zeros(3), "energy"), (torch.tensor([0, math.nan, -math.inf, 0]), "energy: 2 are NaN or -infinity"),
        (torch.full((4,), math.inf), "all are -infinity, so no sample has a weight"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            jf.importance(samples, bad)
    with pytest.raises(ValueError, match="clip=1"):
        jf.importance(samples, energy, clip=1.0)
    assert jf.importance(samples, torch.tensor([0, 0, torch.inf, 0])).normalized[2] == 0


@pytest.mark.parametrize("log_weights", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf], [], [[0.0]]])
def test_log_weights_without_a_distribution_are_refused(log_weights: list[float]) -> None:
    with pytest.raises(ValueError, match="log_weights"):
        jf.ImportanceWeights(torch.tensor(log_weights))


def test_means_of_other_values_than_floating_point_ones() -> None:
    """A value of a sample without weight does not count, not even an infinite one."""
    weights = jf.ImportanceWeights(torch.tensor([0.0, math.log(3), -math.inf], dtype=torch.float64))
    for values, mean in (
        ([1, 2, 9], 1.75), ([False, True, True], 0.75), ([1.0, 2.0, math.inf], 1.75), ([4.0, 0.0, math.nan], 1.0),
    ):  # fmt: skip
        assert weights.mean(torch.tensor(values)).item() == pytest.approx(mean)
    assert set(weights.resample(50).tolist()) == {0, 1}
    for values in (torch.zeros(2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="a row for each of the 3 samples"):
            weights.mean(values)
