"""The chain of blocks, backwards, and where it starts."""

from __future__ import annotations

import pytest
import torch

from jacobiflow.inversion import invert, prior_tokens
from tests.helpers.oracle import Oracle
from tests.helpers.problems import latents, make_flow, to_float32


def test_blocks_are_inverted_last_first_each_in_its_causal_order() -> None:
    flow = make_flow(image_size=6, num_blocks=3)
    reference, x = Oracle(flow), latents(flow, 2)
    tokens = invert(flow, x, reference.invert_block)
    for i in (2, 1, 0):
        x = reference.flip(i, reference.invert_block(i, reference.flip(i, x)))
    assert torch.equal(tokens, x)
    # Later blocks are inverted at as many rows as a block returns.
    assert torch.equal(invert(flow, latents(flow, 1), lambda i, z: torch.cat((z, z)))[7], latents(flow, 1)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_chain_starts_at_latents_of_the_prior_s_scale(dtype: torch.dtype) -> None:
    """In the dtype of the state, which is float32 where the network runs in less."""
    flow = make_flow(image_size=6, nvp=False)
    z = latents(flow, 2)
    expected = z * Oracle(flow).var.sqrt()
    if dtype != torch.float64:
        flow = to_float32(flow).to(dtype)
    tokens = prior_tokens(flow, z)
    assert tokens.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (tokens - expected).abs().max() < (1e-2 if dtype == torch.bfloat16 else 1e-5)
