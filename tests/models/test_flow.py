"""Encoding, likelihood and inverse of every flow, against oracles and dense Jacobians, in float64; flows by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models import Flow
from tests.helpers.oracle import MAFOracle, Oracle, StarOracle
from tests.helpers.problems import latents, make_flow, make_maf, make_star, texts

pytestmark = pytest.mark.usefixtures("one_thread")

FLOWS: dict[str, Callable[[], Any]] = {
    "TarFlow": lambda: make_flow(image_size=4, num_classes=3),
    "TarFlow in colour, without classes": lambda: make_flow(image_size=4, in_channels=3),
    "TarFlow of shifts": lambda: make_flow(image_size=4, num_classes=2, nvp=False),
    "TarFlow of pixels": lambda: make_flow(image_size=3, patch_size=1),
    "STARFlow": make_star,
    "MAF": make_maf,
    "MAF in colour": lambda: make_maf(in_channels=3, image_size=2, hidden_features=33, hidden_layers=3),
    "MAF of one layer and few units": lambda: make_maf(hidden_features=7, hidden_layers=1, num_blocks=3, num_classes=0),
}


HALVES = (torch.float32, torch.float16, torch.bfloat16)


def images_of(flow: Flow, num: int = 3) -> Tensor:
    config = flow.config
    shape = (num, config.in_channels, config.image_size, config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1


def labels_of(flow: Flow) -> Tensor | None:
    """The first class, none, the last class; or the states of texts."""
    if isinstance(flow, jf.STARFlow):
        return texts(flow, 3)
    return torch.tensor([0, -1, flow.config.num_classes - 1]) if flow.config.num_classes else None


@pytest.mark.parametrize("name", FLOWS)
def test_encoding_is_the_oracle_s_with_the_determinant_of_the_dense_jacobian_and_is_decoded_again(name: str) -> None:
    flow = FLOWS[name]()
    reference = {jf.MAF: MAFOracle, jf.STARFlow: StarOracle}.get(type(flow), Oracle)(flow)
    images, labels = images_of(flow), labels_of(flow)
    copied, (z, log_det) = images.clone(), flow.encode(images, labels)
    expected_z, expected_log_det = reference.encode(images, labels)
    torch.testing.assert_close(z, expected_z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-10, atol=1e-9)
    for n in range(len(images)):
        row = None if labels is None else labels[n : n + 1]
        encode = partial(lambda row, image: flow.encode(image.unsqueeze(0), row)[0].flatten(), row)
        dense = torch.autograd.functional.jacobian(encode, images[n])
        assert abs(log_det[n] - torch.linalg.slogdet(dense.reshape(images[n].numel(), -1)).logabsdet) < 1e-9
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(expected_z).sum(dim=(1, 2)) + expected_log_det
    torch.testing.assert_close(flow.log_prob(images, labels), log_prob, rtol=1e-10, atol=1e-9)
    decoded, density = jf.decode(flow, z.detach(), labels, strategy="sequential", log_prob=True)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-8)
    torch.testing.assert_close(density, log_prob, rtol=1e-10, atol=1e-8)
    assert torch.equal(images, copied)


@pytest.mark.parametrize("name", ["TarFlow of shifts", "STARFlow", "MAF"])
def test_a_network_in_bfloat16_keeps_tokens_in_float32(name: str) -> None:
    wide = FLOWS[name]()
    low = copy.deepcopy(wide).bfloat16()
    assert (wide.state_dtype, low.state_dtype) == (torch.float64, torch.float32)
    images, labels = images_of(wide), labels_of(wide)
    wide.load_state_dict(low.state_dict())  # the rounded weights
    for batch in (images.float(), images.bfloat16()):
        z, log_det = low.encode(batch, labels)
        assert z.dtype == log_det.dtype == torch.float32
        expected_z, expected_log_det = wide.encode(batch.double(), labels)
        assert (z - expected_z).abs().mean() < 0.05
        assert (log_det - expected_log_det).abs().max() < 0.25


@pytest.mark.parametrize("guidance", [None, jf.Guidance(1.5)], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("flow", "dtype"),
    [*((make_flow(image_size=10, num_classes=3), dtype) for dtype in HALVES), (make_star(), torch.float32)],
)
def test_no_entry_depends_on_later_tokens(flow: Any, dtype: torch.dtype, guidance: jf.Guidance | None) -> None:
    """Nor if they overflow in the network; the entry after one that does so is not finite."""
    block, z = copy.deepcopy(flow).to(dtype).guided(guidance).inverse_block(1), latents(flow, 3).float()
    context = jf.Context(texts(flow, 3).float() if isinstance(flow, jf.STARFlow) else torch.arange(3))
    length = z.shape[1]
    k, cut = length // 2, length // 3

    def entries(x: Tensor) -> list[tuple[Tensor, int]]:
        """By all calls that give them, each with the entry that it begins at."""
        cache = block.init_cache(z, context)
        first, second = (block.update(x, z, *run, cache) for run in ((0, cut), (cut, length)))
        at = block.update_at(x, z, torch.full((3,), cut), length - cut, length, cache)
        whole = jf.Problem(block, z, context).evaluate(x)[0], block.update(x, z, 0, length, cache)
        return [(first, 0), (second, cut), (at, cut), (whole[0], 0), (whole[1], 0)]

    with torch.no_grad():
        for value in (1e5, 3e38, torch.inf, torch.nan):
            overflowing = torch.cat((z[:, :k], torch.full_like(z[:, k:], value)), dim=1)
            for (want, start), (have, _) in zip(entries(z), entries(overflowing), strict=True):
                torch.testing.assert_close(have[:, : k + 1 - start], want[:, : k + 1 - start], rtol=0, atol=0)
                if not value < 1e38 and start + have.shape[1] > k + 1:
                    assert not have[:, k + 1 - start].isfinite().any()
