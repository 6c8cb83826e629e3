"""The loop of a MAF's own codes, against the oracle."""

from __future__ import annotations

import pytest
import torch
from oracle import Guide, MAFOracle
from problems import latents, make_maf

import jacobiflow as jf
from jacobiflow.baselines.full_passes import full_passes_sample

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [{}, {"in_channels": 3, "image_size": 2, "num_classes": 0}, {"image_size": 1}])
def test_full_passes_are_the_oracle_s_inverse(shape: dict[str, int]) -> None:
    flow = make_maf(**shape)
    z, labels = latents(flow, 4), torch.tensor([0, -1, 2, 1]) if flow.config.num_classes else None
    kept = z.clone()
    images = full_passes_sample(flow, z, labels)
    torch.testing.assert_close(images, MAFOracle(flow).decode(z, labels), rtol=0, atol=1e-10)
    assert torch.equal(z, kept)
    assert not images.requires_grad


@pytest.mark.parametrize("on", ["both", "scale", "shift"])
@pytest.mark.parametrize("annealed", [True, False])
def test_guided_full_passes_are_the_oracle_s_inverse(annealed: bool, on: str) -> None:
    flow, labels = make_maf(), torch.tensor([0, -1, 2, 1])
    z = latents(flow, 4)
    want = MAFOracle(flow).decode(z, labels, Guide(0.5, annealed, on, 1.0))
    found = full_passes_sample(flow, z, labels, jf.Guidance(0.5, annealed, on))  # type: ignore[arg-type]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


def test_an_attention_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="a MAF has no attention; leave it at 1"):
        full_passes_sample(make_maf(), latents(make_maf(), 1), guidance=jf.Guidance(1.0, attn_temperature=0.8))
