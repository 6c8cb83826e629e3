"""What a block of one's own may get wrong: its shapes are refused, and broken rules leave no sample called exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.models import Flow, FlowBlock, Permutation

Parameters = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    num_tokens: int = 6
    token_dim: int = 3
    num_blocks: int = 2
    num_classes: int = 0
    noise_std: float = 0.0


class Sums(FlowBlock):
    """Log-scale and shift of a token are linear in the sum of the tokens before it."""

    def __init__(self, config: Config, permutation: Permutation) -> None:
        super().__init__()
        self.permutation, self.out = permutation, nn.Linear(config.token_dim, 2 * config.token_dim)

    def init_cache(self, z: Tensor, context: Any = None) -> None:
        return None

    def affine(self, x: Tensor, start: int, stop: int, cache: None) -> Parameters:
        log_scale, shift = self.out(x.cumsum(dim=1) - x)[:, start:stop].chunk(2, dim=-1)
        return 0.3 * log_scale.tanh(), shift


class Shared(Sums):
    """All values of a token share a log-scale, without being expanded."""

    def affine(self, x: Tensor, start: int, stop: int, cache: None) -> Parameters:
        log_scale, shift = super().affine(x, start, stop, cache)
        return log_scale[..., :1], shift


class Reading(Sums):
    """A token reads itself."""

    def affine(self, x: Tensor, start: int, stop: int, cache: None) -> Parameters:
        log_scale, shift = self.out(x.cumsum(dim=1))[:, start:stop].chunk(2, dim=-1)
        return 0.3 * log_scale.tanh(), shift


class Random(Sums):
    """Dropout in training."""

    def affine(self, x: Tensor, start: int, stop: int, cache: None) -> Parameters:
        log_scale, shift = super().affine(x, start, stop, cache)
        return log_scale, nn.functional.dropout(shift, 0.3, self.training)


class Deaf(Sums):
    """The start of the run is ignored."""

    def affine(self, x: Tensor, start: int, stop: int, cache: None) -> Parameters:
        return super().affine(x, 0, stop - start, cache)


def flow_of(block: type[FlowBlock]) -> Any:
    kind = type("Kind", (Flow,), {"model_type": "kind", "config_types": (Config,), "block_type": block})
    torch.manual_seed(0)
    return kind(Config()).double()


def test_samples_of_a_block_that_keeps_the_rules_are_exact() -> None:
    flow = flow_of(Sums)
    out = jf.sample(flow, 8, strategy="sequential")
    assert out.outcome.is_exact and not out.outcome.has_shortfall and out.residual.max() < 1e-12  # type: ignore
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: flow.encode(x[None])[0][0], out.tokens[0])
    base = torch.distributions.Normal(0.0, 1.0).log_prob(out.latents[0]).sum()
    torch.testing.assert_close(out.log_prob[0], base + jacobian.reshape(18, 18).slogdet()[1])  # type: ignore


@pytest.mark.parametrize("strategy", ["window:2", "sequential"])
@pytest.mark.parametrize("block", [Reading, Random, Deaf])
def test_samples_of_a_block_that_breaks_a_rule_are_above_the_tolerance(block: type[FlowBlock], strategy: str) -> None:
    with pytest.warns(UserWarning, match="or by a block of your own that is not causal or is random"):
        out = jf.sample(flow_of(block), 8, strategy=strategy)
    assert out.outcome.num_above > 0
    with pytest.raises(jf.InputError, match="no weights"):
        jf.importance(out, torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize(
    "call", [lambda flow: jf.sample(flow, 2), lambda flow: flow.encode(torch.zeros(2, 6, 3).double())]
)
def test_a_log_scale_that_channels_share_must_be_expanded(call: Any) -> None:
    with pytest.raises(jf.InputError, match=r"one of each for each entry.*expand them"):
        call(flow_of(Shared))


def test_an_update_of_other_channels_is_refused() -> None:
    class Narrow:
        def init_cache(self, z: Tensor, context: Any) -> None:
            return None

        def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: None) -> Tensor:
            return z[:, start:stop, :1]

    with pytest.raises(jf.InputError, match="g of each entry"):
        jf.solve(Narrow(), torch.ones(2, 6, 3), jf.Solver(jf.Whole()))
