"""Denoising against the score of the oracle's log-density, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models.memory import memory_needs
from jacobiflow.sampling import denoise as denoising
from tests.helpers import oracle
from tests.helpers.problems import make_flow

pytestmark = pytest.mark.usefixtures("one_thread")

FLOWS: dict[str, dict[str, Any]] = {
    "scales": {"image_size": 4, "patch_size": 2, "num_classes": 3, "noise_std": 0.1},
    "no classes": {"image_size": 3, "patch_size": 1, "noise_std": 0.3},
    "shifts only": {"image_size": 4, "patch_size": 2, "num_classes": 3, "nvp": False, "noise_std": 0.2},
}


def images_of(flow: jf.TarFlow, num: int) -> Tensor:
    shape = (num, flow.config.in_channels, flow.config.image_size, flow.config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", FLOWS)
def test_denoising_is_a_step_along_the_score(name: str) -> None:
    """The score by central differences of the oracle's log-density, whose error is about 1e-8 of its size."""
    flow, rate, step = make_flow(**FLOWS[name]), 0.4, 1e-5
    images, labels = images_of(flow, 2), torch.tensor([2, -1]) if flow.config.num_classes else None
    reference, size = oracle.Oracle(flow), images[0].numel()

    def log_density(x: Tensor) -> Tensor:
        z, log_det = reference.encode(x, None if labels is None else labels.repeat_interleave(size))
        return log_det - 0.5 * z.square().flatten(1).sum(dim=1)

    moves = step * torch.eye(size, dtype=torch.float64).view(1, size, *images.shape[1:])
    up, down = (log_density((images[:, None] + sign * moves).flatten(0, 1)) for sign in (1, -1))
    score = ((up - down) / (2 * step)).view_as(images)
    kept = images.clone()
    denoised = jf.denoise(flow, images, labels, rate)
    assert (denoised - images).abs().max() > 1e-3
    torch.testing.assert_close(denoised, images + rate * flow.config.noise_std**2 * score, rtol=1e-6, atol=1e-6)
    assert torch.equal(images, kept)
    assert not denoised.requires_grad
    assert all(parameter.grad is None for parameter in flow.parameters())


@pytest.mark.parametrize(("layers", "is_trained"), [(1, False), (8, False), (8, True)])
def test_a_pass_keeps_no_more_than_its_formula_says(layers: int, is_trained: bool) -> None:
    """The formula also allows for what the backward pass computes; so it is up to twice what the forward pass keeps."""
    config = jf.TarFlowConfig(1, 16, 2, width=64, num_blocks=3, layers_per_block=layers, noise_std=0.1)
    flow = jf.TarFlow(config).requires_grad_(is_trained)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = flow.log_prob(torch.zeros(4, 1, 16, 16, requires_grad=True)).sum()
    weights = {parameter.untyped_storage()._cdata for parameter in flow.parameters()}
    measured = sum(num for storage, num in kept.items() if storage not in weights) / 4
    limit = memory_needs(flow).gradient
    assert total.requires_grad and limit is not None
    assert measured < limit < 2 * measured
    limit_offloaded = memory_needs(flow.offloaded("cpu")).gradient
    assert limit_offloaded is not None and limit / 3 < limit_offloaded < limit


def test_passes_are_bounded_by_memory_and_by_the_speed_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, sizes = make_flow(**FLOWS["no classes"]), list[int]()
    score = denoising.score
    monkeypatch.setattr(denoising, "score", lambda *args: sizes.append(len(args[1])) or score(*args))
    images = images_of(flow, 9)
    for name, value in (("_TOKENS_PER_THREAD", 4 * 9), ("_MAX_BACKWARD_BYTES", 1)):
        monkeypatch.setattr(denoising, name, value)
        jf.denoise(flow, images)
    assert sizes == [3, 3, 3, *[1] * 9]


def test_in_bfloat16_images_change_by_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = copy.deepcopy(make_flow(**FLOWS["scales"])).float()
    settings = [jf.SamplingSettings(denoise=1.0, denoise_dtype=dtype) for dtype in (None, "bfloat16")]
    monkeypatch.setattr(denoising, "has_bf16_products", lambda: True)
    exact, rounded = (jf.sample(flow, 128, 1, settings=each) for each in settings)
    change = (rounded.x - exact.x).abs()
    assert 0 < change.max() < 2e-2
    assert rounded.denoise_change == pytest.approx((float(change[:2].mean()), float(change[:2].max())), rel=1e-3)
    assert rounded.outcome.denoise_change == rounded.denoise_change
    assert jf.sample(flow, 63, 1, settings=settings[1]).denoise_change is None  # The comparison would take too long.
    monkeypatch.setattr(denoising, "has_bf16_products", lambda: False)
    with pytest.warns(UserWarning, match="this processor has no such products, so float32 is used"):
        in_float32 = jf.sample(flow, 128, 1, settings=settings[1])
    assert torch.equal(in_float32.x, exact.x) and in_float32.denoise_change is None
    assert rounded.x.dtype == torch.float32 and exact.denoise_change is None
    with pytest.raises(jf.InputError, match="the flow is in float64; give None"):
        jf.sample(flow.double(), 1, 1, settings=settings[1])


def test_an_image_s_step_depends_on_no_batch_and_no_gradient_mode() -> None:
    flow = make_flow(**FLOWS["scales"])
    images, labels = images_of(flow, 5), torch.tensor([0, 1, 2, -1, 0])
    all_at_once = jf.denoise(flow, images, labels)
    with torch.no_grad():
        in_twos = jf.denoise(flow, images, labels, batch_size=2)
    torch.testing.assert_close(in_twos, all_at_once, rtol=0, atol=1e-10)
    with torch.inference_mode():
        images[2, 0, 0, 0] = torch.nan
        with pytest.warns(UserWarning, match="1 of 5 images hold a NaN or an infinity: they are NaN"):
            beside_a_lost_one = jf.denoise(flow, images, labels)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(beside_a_lost_one[others], all_at_once[others], rtol=0, atol=1e-10)
    assert beside_a_lost_one[2].isnan().all()
