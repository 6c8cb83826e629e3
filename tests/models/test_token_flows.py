"""Flows over tokens against the oracle: orders, contexts, depths and widths of blocks, and densities."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from tests.helpers.oracle import TokenOracle

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "orders": {"orders": ((3, 1, 0, 4, 2), "flip", "identity"), "num_blocks": 3},
    "classes": {"num_classes": 3},
    "context": {"context_dim": 4, "orders": ((3, 1, 0, 4, 2),)},
    "sizes": {"width": (8, 16), "layers_per_block": (2, 1), "nvp": False},
    "one token": {"num_tokens": 1},
}
CONTEXTS = {"classes": lambda: torch.tensor([0, 2, -1]), "context": lambda: randn(3, 4), "rows": lambda: randn(3, 5, 4)}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@cache
def make(name: str) -> jf.TarFlow:
    """A flow in float64 in which every weight matters."""
    sizes = {"num_tokens": 5, "token_dim": 2, "width": 8, "num_blocks": 2, "layers_per_block": 1, "head_dim": 4}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        flow = jf.TarFlow(jf.TokenConfig(**sizes | CONFIGS[name])).double().eval()
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow


def case(name: str) -> tuple[jf.TarFlow, Tensor | None, Tensor]:
    flow = make("context" if name == "rows" else name)
    context = CONTEXTS[name]() if name in CONTEXTS else None
    return flow, context, randn(3, flow.config.num_tokens, 2)


@pytest.mark.parametrize("name", [*CONFIGS, "rows"])
@pytest.mark.parametrize("strategy", ["sequential", "jacobi"])
def test_samples_and_their_densities_are_the_oracle_s(name: str, strategy: str) -> None:
    flow, context, z = case(name)
    reference = TokenOracle(flow)
    out = jf.sample(flow, context=context, latents=z, strategy=strategy, tolerance=1e-6)
    exact = reference.decode(z, context)
    assert (out.tokens - exact).abs().max() < (1e-9 if strategy == "sequential" else 1e-4)
    # The density is that of the tokens returned, to rounding, whatever the tolerance.
    latents, log_det = reference.encode(out.tokens, context)
    want = torch.distributions.Normal(0.0, 1.0).log_prob(latents).sum(dim=(1, 2)) + log_det
    torch.testing.assert_close(out.log_prob, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.log_prob(out.tokens, context), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["plain", "context", "rows", "classes"])
def test_native_samples_and_densities_are_those_in_float64(name: str) -> None:
    flow, context, z = case(name)
    config = flow.config
    low = jf.TarFlow(config)
    low.load_state_dict(flow.state_dict())
    out = jf.sample(low.eval(), context=context if name == "classes" or context is None else context.float(), latents=z)
    exact = jf.sample(flow, context=context, latents=z, strategy="sequential")
    torch.testing.assert_close(out.tokens.double(), exact.tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.log_prob.double(), exact.log_prob, rtol=1e-5, atol=1e-4)


def test_a_sample_and_its_density_do_not_depend_on_the_batch() -> None:
    flow, context, z = case("rows")
    together = jf.sample(flow, context=context, latents=z, strategy="jacobi", tolerance=1e-10, batch_size=2)
    for n in range(3):
        alone = jf.sample(flow, context=context[n : n + 1], latents=z[n : n + 1], strategy="jacobi", tolerance=1e-10)
        torch.testing.assert_close(alone.tokens[0], together.tokens[n], rtol=0, atol=1e-8)
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[n], rtol=0, atol=1e-8)


def test_a_context_that_does_not_fit_is_named() -> None:
    flow, _, z = case("rows")
    for context in (
        None,
        torch.zeros(3, 5),
        torch.zeros(3, 4, 4),
        torch.zeros(3, 4).long(),
        [1, 2, 3],
        torch.zeros(3, 4).to(torch.float8_e5m2),
    ):
        with pytest.raises((ValueError, TypeError), match=r"^context="):
            jf.sample(flow, context=context, latents=z)
    with pytest.raises(ValueError, match="context"):
        jf.sample(flow, context=torch.zeros(2, 4), latents=z)
    with pytest.raises(ValueError, match="this flow takes none: leave them out"):
        jf.sample(make("plain"), context=torch.zeros(3, 4), latents=z)
    with pytest.raises(ValueError, match="for classes and texts only"):
        flow.guided(jf.Guidance(1.0))
