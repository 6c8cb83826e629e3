"""Flows whose blocks are brought to the device one at a time: the same bits, and the memory of one block."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.latents import draw_latents
from jacobiflow.models.offload import BlockLoader
from tests.helpers.checkpoints import assert_same
from tests.helpers.fake_device import FakeDevice
from tests.helpers.problems import make_flow, make_maf, make_star, texts, to_float32
from tests.models import test_prose

pytestmark = pytest.mark.usefixtures("one_thread")

BY_DENSITY = jf.Guidance(2.0, annealed=False, rule="density")


def make_peptide() -> Any:
    return test_prose.make(True).for_peptide(test_prose.ENCODINGS, test_prose.ORDERS)


FLOWS: dict[str, Any] = {
    "TarFlow": lambda: to_float32(make_flow(num_classes=3, noise_std=0.1)).guided(jf.Guidance(1.0)),
    "STARFlow": lambda: to_float32(make_star()).guided(BY_DENSITY),
    "MAF": lambda: to_float32(make_maf()),
    "Prose": make_peptide,
}


def of_batch(flow: Any, num: int = 3) -> tuple[Tensor, Any]:
    """Latents, and a context for them."""
    z = draw_latents(num, flow.config.num_tokens, flow.config.token_dim)
    if isinstance(flow, jf.STARFlow):
        return z, texts(flow, num).float()
    return z, torch.arange(num) % 3 if flow.config.num_classes else None


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("strategy", ["sequential", "window:4", "auto"])
def test_results_are_those_of_the_whole_flow(name: str, strategy: str) -> None:
    flow = FLOWS[name]().requires_grad_(False)
    view, (z, context) = flow.offloaded("cpu"), of_batch(flow)
    strategy = jf.plan(flow, batch_size=3) if strategy == "auto" else strategy
    has_density = None if flow.guidance else True
    want, got = (
        jf.sample(each, latents=z, context=context, strategy=strategy, settings=None, log_prob=has_density)
        for each in (flow, view)
    )
    assert torch.equal(want.x, got.x) and torch.equal(want.residual, got.residual)
    assert has_density is None or torch.equal(want.log_prob, got.log_prob)
    assert all(map(torch.equal, flow.encode(want.x, context), view.encode(want.x, context)))
    if flow.config.noise_std:
        assert torch.equal(jf.denoise(flow, want.images, context), jf.denoise(view, want.images, context))


@pytest.mark.parametrize("name", FLOWS)
def test_densities_and_inverses_have_the_gradients_of_the_whole_flow(name: str) -> None:
    flow = FLOWS[name]().requires_grad_(False)
    gradients = []
    for each in (flow, flow.offloaded("cpu")):
        z, context = of_batch(flow)
        z.requires_grad_()
        x = jf.decode(each, z, context)
        (of_inverse,) = torch.autograd.grad(x.square().sum(), z)
        x = x.detach().requires_grad_()
        gradients.append((of_inverse, *torch.autograd.grad(each.log_prob(x, context).sum(), x)))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_loaded_flow_reads_its_blocks_from_the_files(tmp_path: Path, dtype: str | None) -> None:
    to_float32(make_star()).save_pretrained(tmp_path / "model", dtype="bfloat16")
    flow, view = jf.load(tmp_path / "model", dtype=dtype), jf.load(tmp_path / "model", dtype=dtype, offload=True)
    assert (view.precision, view.var.dtype) == (flow.precision, flow.var.dtype)
    assert {tensor.dtype for tensor in view.blocks.state_dict().values()} == {torch.bfloat16}  # type: ignore[attr-defined]
    z, context = of_batch(flow)
    for strategy in ("sequential", "jacobi"):
        want, got = (jf.decode(each, z, context, strategy=strategy) for each in (flow, view))
        assert torch.equal(want, got)
    assert fingerprint(view) == fingerprint(flow)
    view.save_pretrained(tmp_path / "copy", dtype="bfloat16")
    assert_same(jf.load(tmp_path / "copy").state_dict(), jf.load(tmp_path / "model").state_dict())


def test_one_block_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is done with the flow: nothing else keeps a copy when the next is made."""
    make_copy, copies = BlockLoader._copy, list[weakref.ref[Any]]()

    def copy_alone(loader: BlockLoader, index: int) -> Any:
        gc.collect()  # of what is younger than `freeze`, which takes no time
        assert not any(copy() is not None for copy in copies), index
        copied = make_copy(loader, index)
        copies.append(weakref.ref(copied))
        return copied

    monkeypatch.setattr(BlockLoader, "_copy", copy_alone)
    view = FLOWS["TarFlow"]().requires_grad_(False).offloaded("cpu")
    z, context = of_batch(view)
    gc.freeze()
    images = jf.sample(view, latents=z, context=context, settings=None, sensitivity=True).images
    jf.sample(view.guided(None), latents=z, context=context, settings=None, log_prob=True, strategy="window:4")
    jf.denoise(view, images, context)
    jf.plan(view, batch_size=2)
    jf.calibrate(view, images, context)
    gc.unfreeze()
    assert len(copies) > 20


def test_a_gpu_copies_the_next_block_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[int]()
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    config = jf.TokenConfig(8, 2, (64, 16, 16, 64), num_blocks=4, layers_per_block=2, head_dim=16)
    flow = jf.TarFlow(config).requires_grad_(False)
    sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in flow.blocks]
    make_copy = BlockLoader._copy
    monkeypatch.setattr(BlockLoader, "_copy", lambda loader, i: (started.append(i), make_copy(loader, i))[1])
    with FakeDevice() as device, device.counting() as counts:
        view = flow.offloaded("cuda")
        x = jf.sample(view, 2, strategy="sequential", log_prob=False).x
        assert started == [3, 2, 1, 0]  # each of them once
        assert counts.peak < sizes[0] + sizes[1] + 2**16
        view.log_prob(x)
        assert started[-1] == 3 and set(view.block_loader.copies) == {3}  # type: ignore[union-attr]
        whole = copy.deepcopy(flow).to("cuda")
        assert torch.equal(whole.log_prob(x).cpu(), view.log_prob(x).cpu())
    assert all(parameter.device.type == "cpu" for parameter in flow.parameters())


def test_threads_share_an_offloaded_flow() -> None:
    flow = FLOWS["TarFlow"]().requires_grad_(False)
    view, (z, context) = flow.offloaded("cpu"), of_batch(flow)
    want = jf.decode(flow, z, context, strategy="sequential")
    with ThreadPoolExecutor(4) as threads:
        for got in threads.map(lambda _: jf.decode(view, z, context, strategy="sequential"), range(8)):
            assert torch.equal(got, want)


def test_a_flow_with_new_weights_is_offloaded_again() -> None:
    flow = FLOWS["MAF"]()
    view, (z, context) = flow.offloaded("cpu"), of_batch(flow)
    view.log_prob(view.from_tokens(z), context)
    with torch.no_grad():
        next(flow.parameters()).add_(1)
    with pytest.raises(jf.InputError, match="its weights have changed since it was offloaded"):
        view.log_prob(view.from_tokens(z), context)
