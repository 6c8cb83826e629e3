"""The bundled models: what they encode they decode, and their reports and model cards are theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import jacobiflow as jf
from jacobiflow.data import Noise, digits, load_images
from jacobiflow.evaluation import bits_per_dim
from tests.helpers.running import figures

IMAGES = {
    "digits-p1": ("digits", 8, 1), "emoji-p2": ("emoji-256", 32, 3), "fashion-p2": ("fashion-512", 28, 1),
    "digits-maf": ("digits", 8, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "strategy"), [("digits-p1", "auto"), ("fashion-p2", "jacobi"), ("digits-maf", "window:16")]
)
def test_decoding_an_encoded_image_returns_it(name: str, strategy: str) -> None:
    """With the noise of the flow's training."""
    flow, (clean, labels) = jf.load(name), load_images(*IMAGES[name]).batch(slice(0, 3))
    noise = Noise(flow.config.noise_std)
    images = noise.add(clean, noise.draw(clean.shape, torch.Generator().manual_seed(0)))
    z, _ = flow.encode(images, labels)
    out = jf.sample(flow, latents=z, labels=labels, settings=None, strategy=strategy, tolerance=1e-4)
    assert (out.images - images).abs().max() <= 2e-3
    assert (out.residual <= 1e-4).all()
    assert (out.status == jf.Status.CONVERGED).all()
    if strategy == "jacobi":  # the last block is tough and the first is not
        sweeps = [block.sweeps for block in out.stats]
        assert max(sweeps) == sweeps[-1] > flow.config.num_tokens / 8 > sweeps[0]


@pytest.mark.parametrize("name", IMAGES)
def test_recommended_settings_have_a_bundled_report(name: str) -> None:
    flow = jf.load(name)
    guided = flow.guided(flow.recommended.guidance)
    file = jf.find_report(guided)
    assert file is not None
    report = jf.CalibrationReport.load(file)
    report.check(flow)
    assert report.settings.guidance == flow.recommended.guidance


def test_the_model_card_s_likelihood_is_that_of_the_bundled_weights() -> None:
    card = figures(Path(__file__).parents[2] / "docs/results/digits-maf.json")
    assert bits_per_dim(jf.load("digits-maf"), digits(), Noise()) == pytest.approx(card["bits_per_dim"], abs=1e-3)
