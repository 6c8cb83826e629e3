"""The bundled TarFlows, on real images: what they encode they decode, and what they draw is certified."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import Noise, add_noise, bundled_emoji, bundled_fashion, digits

IMAGES = {"digits-p1": digits, "emoji-p2": bundled_emoji, "fashion-p2": bundled_fashion}


@cache
def model(name: str) -> tuple[jf.TarFlow, Tensor, Tensor, Tensor]:
    """A flow in float32, images with the noise of its training, labels, and the images without."""
    flow = jf.load(name)
    clean, labels = IMAGES[name]().batch(slice(0, 3))
    noise = Noise("gaussian", flow.config.noise_std)
    return flow, add_noise(clean, noise, torch.Generator().manual_seed(0)), labels, clean


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("digits-p1", "auto"), ("digits-p1", "jacobi"), ("emoji-p2", "jacobi"), ("fashion-p2", "jacobi")],
)
def test_decoding_an_encoded_image_returns_it(name: str, strategy: str) -> None:
    flow, images, labels, _ = model(name)
    z, _ = flow.encode(images, labels)
    out = jf.decode(flow, z, labels, strategy=strategy, tolerance=1e-4)
    assert (out.images - images).abs().max() <= 2e-3
    assert (out.certificate <= 1e-4).all()
    assert (out.status == jf.Status.CONVERGED).all()
    if strategy == "jacobi":  # the last block is tough and the first is not
        sweeps = [block.sweeps for block in out.stats]
        assert max(sweeps) == sweeps[-1] > flow.config.num_tokens / 8 > sweeps[0]


@pytest.mark.parametrize(
    ("name", "weight"), [("digits-p1", 0.0), ("digits-p1", 0.5), ("emoji-p2", 0.5), ("fashion-p2", 0.5)]
)
def test_samples_are_certified_and_near_the_sequential_ones(name: str, weight: float) -> None:
    flow, _, labels, _ = model(name)
    guidance = jf.Guidance(weight, annealed=False, attn_temperature=0.8)
    settings = {"num": 3, "labels": labels, "seed": 3, "guidance": guidance, "progress": False}
    exact = jf.sample(flow, strategy="sequential", certify=False, **settings)
    out = jf.sample(flow, strategy="window:32", tolerance=1e-3, **settings)
    assert (out.certificate <= 1e-3).all()
    assert max(float(block.residual.max()) for block in out.stats) == float(out.certificate.max())
    # Residuals are amplified by (I - Gamma)^-1 and by later blocks: measured at up to 20 times on these models.
    assert (out.images - exact.images).abs().max() <= 5e-2
    assert out.network_calls < exact.network_calls


@pytest.mark.parametrize("name", ["digits-p1", "fashion-p2", "emoji-p2", "digits-maf"])
def test_recommended_settings_are_planned_by_a_bundled_report(name: str) -> None:
    flow = jf.load(name)
    file = jf.find_report(flow, flow.recommended.guidance)
    assert file is not None
    report = jf.Report.load(file)
    report.check(flow)
    assert report.tuning is not None
    assert report.settings.guidance == report.tuning.guidance == flow.recommended.guidance


@pytest.mark.parametrize("name", IMAGES)
def test_denoising_moves_towards_the_data(name: str) -> None:
    flow, images, labels, clean = model(name)
    denoised = jf.denoise(flow, images, labels)
    assert (denoised - clean).square().mean() < (images - clean).square().mean()
    assert (flow.log_prob(denoised, labels) > flow.log_prob(images, labels)).all()
