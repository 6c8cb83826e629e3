"""The inverses of the MAF's table lead back to the pixels."""

from __future__ import annotations

import torch

import jacobiflow as jf
from benchmarks.maf import inverses_of


def test_every_inverse_of_the_table_leads_back_to_the_pixels():
    flow = jf.MAF(jf.MAFConfig(1, 4, hidden_features=8, num_blocks=2)).requires_grad_(False)
    images = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-0.9, 0.9)
    latents, _ = flow.encode(images)
    for name, inverse in inverses_of(flow).items():
        assert (inverse(latents) - images.flatten(1)).abs().max() < 1e-2, name
