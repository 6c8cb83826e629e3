"""The loop that a flow is compared with, and that each is exact."""

from __future__ import annotations

import oracle
import pytest
import torch
from problems import latents, make_flow, make_identity, make_maf
from torch import Tensor

import jacobiflow as jf
from jacobiflow.baselines import FULL_PASSES, GROWING_CACHE, SEQUENTIAL, original_loop, register_original_loop
from jacobiflow.baselines.full_passes import full_passes_sample
from jacobiflow.experiments.speed import compare
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.tarflow import TarFlowBlock

LABELS = torch.tensor([0, 2, -1])

pytestmark = pytest.mark.usefixtures("one_thread")


class Outside(ImageFlow):
    """A flow of another package, of TarFlow's blocks so that the oracle applies."""

    model_type, block_type = "outside", TarFlowBlock
    to_tokens, to_images = jf.TarFlow.to_tokens, jf.TarFlow.to_images
    patchify, unpatchify = jf.TarFlow.patchify, jf.TarFlow.unpatchify
    config_type, config_from_options = jf.TarFlowConfig, jf.TarFlow.config_from_options


def outside() -> Outside:
    inner = make_flow(num_classes=3)
    flow = Outside(inner.config).double().eval()
    flow.load_state_dict(inner.state_dict())
    return flow


def test_the_growing_cache_is_exact() -> None:
    flow = make_flow(num_classes=3)
    name, loop = original_loop(flow)
    assert name == GROWING_CACHE
    z = latents(flow, 3)
    for guidance, guide in (
        (None, None),
        (jf.Guidance(0.6, attn_temperature=1.5), oracle.Guide(0.6, True, "both", 1.5)),
        (jf.Guidance(0.4, annealed=False, on="scale"), oracle.Guide(0.4, False, "scale", 1.0)),
    ):
        exact = oracle.Oracle(flow).decode(z, LABELS, guide)
        torch.testing.assert_close(loop(flow, z, LABELS, guidance), exact, rtol=0, atol=1e-10)
    assert torch.equal(z, latents(flow, 3))
    assert torch.equal(loop(flow, z, LABELS, jf.Guidance(0.0)), loop(flow, z, LABELS, None))
    assert original_loop(make_maf()) == (FULL_PASSES, full_passes_sample)


def test_a_flow_in_bfloat16_keeps_its_state_in_float32() -> None:
    flow, z = make_identity(torch.bfloat16), latents(make_identity(torch.float32), 2)
    _, loop = original_loop(flow)
    assert torch.equal(loop(flow, z, None, None), flow.to_images(z * torch.tensor(0.5).sqrt()))


def test_any_other_flow_has_the_sequential_loop() -> None:
    flow = outside()
    name, loop = original_loop(flow)
    assert name == SEQUENTIAL
    z = latents(flow, 3)
    exact = oracle.Oracle(flow).decode(z, LABELS)
    torch.testing.assert_close(loop(flow, z, LABELS, None), exact, rtol=0, atol=1e-10)
    found = compare(flow, z, LABELS, {"few": lambda: jf.sample(flow, latents=z, strategy="jacobi-2")}, repeats=1)
    assert [row.strategy for row in found.rows] == [SEQUENTIAL, "few"]
    assert (found.original, found.baselines) == (SEQUENTIAL, (SEQUENTIAL,))
    assert [row.strategy for row in found.others] == ["few"]
    assert set(found.to_json()["rows"][1]["speed_up"]) == {SEQUENTIAL}


def test_a_loop_is_registered_in_one_line() -> None:
    class Mine(Outside):
        pass

    class Derived(Mine):
        pass

    seen = []

    def half(flow: ImageFlow, z: Tensor, labels: Tensor | None, guidance: jf.Guidance | None) -> Tensor:
        seen.append((labels, guidance))
        return flow.to_images(z / 2)

    register_original_loop(Mine, "half", half)
    identity = make_identity(torch.float32)
    flow = Derived(identity.config).eval()
    flow.load_state_dict(identity.state_dict())
    z, guidance = latents(flow, 3), jf.Guidance(1.0, attn_temperature=2.0)
    found = compare(flow, z, None, {}, guidance=guidance, repeats=1)
    assert [row.strategy for row in found.rows] == ["half", SEQUENTIAL]
    assert found.baselines == ("half", SEQUENTIAL)
    assert found.rows[0].error.max == pytest.approx(float(z.abs().max()) * (0.5**0.5 - 0.5), rel=1e-6)
    assert seen == [(None, guidance)] * 2  # a warm-up and a round
    assert original_loop(outside())[0] == SEQUENTIAL
