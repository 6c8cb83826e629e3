"""The original samplers, against the oracle."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import pytest
import torch

import jacobiflow as jf
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.comparison.compare import compare_samplers
from jacobiflow.models.flow import Flow
from jacobiflow.models.tarflow import TarFlowBlock
from tests.helpers import oracle
from tests.helpers.oracle import Guide, MAFOracle, StarOracle
from tests.helpers.problems import latents, make_flow, make_identity, make_maf, make_star, texts, to_float32

LABELS = torch.tensor([0, 2, -1])
GUIDANCE, GUIDE = jf.Guidance(0.6, attn_temperature=1.5), oracle.Guide(0.6, True, "both", 1.5)

pytestmark = pytest.mark.usefixtures("one_thread")


class Outside(Flow):
    """A flow that is not of this library; its blocks are TarFlow's, so that the oracle applies."""

    model_type, block_type = "outside", TarFlowBlock
    to_tokens, from_tokens = jf.TarFlow.to_tokens, jf.TarFlow.from_tokens
    config_types, config_from_options = (jf.TarFlowConfig,), jf.TarFlow.config_from_options


def test_the_growing_cache_is_exact() -> None:
    flow = make_flow(num_classes=3)
    name, loop = original_sampler(flow)
    assert name == "growing cache"
    z = latents(flow, 3)
    other = jf.Guidance(0.4, annealed=False, on="scale"), Guide(0.4, False, "scale", 1.0)
    density = jf.Guidance(0.4, rule="density"), Guide(0.4, True, "both", 1.0, "density")
    for guidance, guide in ((None, None), (GUIDANCE, GUIDE), other, density):
        exact = oracle.Oracle(flow).decode(z, LABELS, guide)
        torch.testing.assert_close(loop(flow.guided(guidance), z, LABELS), exact, rtol=0, atol=1e-10)
    assert torch.equal(z, latents(flow, 3))
    flow, z = make_identity(torch.bfloat16), latents(make_identity(torch.float32), 2)
    images = original_sampler(flow)[1](flow, z, None)  # the state stays in float32
    assert torch.equal(images, flow.from_tokens(z * torch.tensor(0.5).sqrt()))
    flow = to_float32(make_flow(num_classes=3))  # classes in bfloat16
    z = latents(flow, 3)
    torch.testing.assert_close(loop(deepcopy(flow).bfloat16(), z, LABELS), loop(flow, z, LABELS), rtol=0, atol=0.2)


def test_the_token_loop_is_exact() -> None:
    flow = make_star(layers_per_block=(1, 1, 2))
    name, loop = original_sampler(flow)
    assert name == "token loop"
    z, states = latents(flow, 3), texts(flow, 3)
    density = jf.Guidance(1.5, annealed=False, rule="density"), Guide(1.5, False, "both", 1.0, "density")
    for context, (guidance, guide) in product((states, None), ((None, None), (GUIDANCE, GUIDE), density)):
        exact = StarOracle(flow).decode(z, context, guide)
        torch.testing.assert_close(loop(flow.guided(guidance), z, context), exact, rtol=0, atol=1e-9)
    assert torch.equal(z, latents(flow, 3))


@pytest.mark.parametrize("shape", [{}, {"in_channels": 3, "image_size": 2, "num_classes": 0}, {"image_size": 1}])
def test_full_passes_are_exact(shape: dict[str, int]) -> None:
    flow = make_maf(**shape)
    name, loop = original_sampler(flow)
    assert name == "full passes"
    z, labels = latents(flow, 4), torch.tensor([0, -1, 2, 1]) if flow.config.num_classes else None
    images = loop(flow, z, labels)
    torch.testing.assert_close(images, MAFOracle(flow).decode(z, labels), rtol=0, atol=1e-10)
    assert torch.equal(z, latents(flow, 4))
    assert not images.requires_grad
    for annealed, on in product((True, False), () if shape else ("both", "scale", "shift")):
        images = loop(flow.guided(jf.Guidance(0.5, annealed, on)), z, labels)  # type: ignore[arg-type]
        want = MAFOracle(flow).decode(z, labels, Guide(0.5, annealed, on, 1.0))
        torch.testing.assert_close(images, want, rtol=0, atol=1e-10)


def test_any_other_flow_has_the_sequential_loop() -> None:
    inner = make_flow(num_classes=3)
    flow, z = Outside(inner.config).double().eval(), latents(inner, 3)
    flow.load_state_dict(inner.state_dict())
    images = original_sampler(flow)[1](flow, z, LABELS)
    torch.testing.assert_close(images, oracle.Oracle(flow).decode(z, LABELS), rtol=0, atol=1e-10)
    runs = {"few": lambda: jf.sample(flow, latents=z, strategy="jacobi-2")}
    comparison = compare_samplers(flow, z, LABELS, runs, repeats=1)
    assert [row.strategy for row in comparison.results] == ["sequential", "few"]
    assert (comparison.baselines, comparison.candidates) == (("sequential",), comparison.results[1:])
    assert set(comparison.to_json()["rows"][1]["speed_up"]) == {"sequential"}
