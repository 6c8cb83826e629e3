"""A fingerprint tells changes of a flow."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import jacobiflow as jf
from jacobiflow.models.checkpoints import fingerprint as fingerprint_module
from jacobiflow.models.checkpoints.fingerprint import cached_fingerprint, fingerprint
from tests.helpers.problems import make_flow, to_float32


def make(seed: int = 0) -> jf.TarFlow:
    return to_float32(make_flow(num_classes=3, seed=seed))


def test_every_entry_counts() -> None:
    weight = torch.randn(512, 1024)
    states = [{"weight": weight}, {"weights": weight}, {"weight": weight.view(1024, 512)}, {"weight": weight.flip(0)}]
    for row, column in ((0, 0), (0, 1), (511, 1023)):
        weight = weight.clone()
        weight[row, column] += 1.0
        states.append({"weight": weight})
    flow = make()
    assert len({fingerprint(flow, state) for state in states}) == len(states)


def test_a_config_counts() -> None:
    """Here the weights are the same."""
    flow = make()
    before = fingerprint(flow)
    flow.config = replace(flow.config, head_dim=flow.config.head_dim // 2)
    assert fingerprint(flow) != before


@torch.no_grad()
def one_entry(flow: jf.TarFlow) -> None:
    flow.blocks[1].proj_out.weight[3, 5] += 1


CHANGES: dict[str, Callable[[jf.TarFlow], object]] = {
    "one entry": one_entry,
    "a buffer": lambda flow: flow.var.mul_(2),
    "another block": lambda flow: flow.blocks.__setitem__(1, make(1).blocks[1]),
    "another layer": lambda flow: setattr(flow.blocks[1], "proj_out", make(1).blocks[1].proj_out),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_cached_fingerprint_notices_changes(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not computed again without one."""
    flow = make()
    before = cached_fingerprint(flow)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint_module, "fingerprint", None)
        assert cached_fingerprint(flow.guided(jf.Guidance(1.0))) == before
    CHANGES[change](flow)
    assert cached_fingerprint(flow) == fingerprint(flow) != before


def test_the_cache_does_not_keep_a_flow() -> None:
    flow = make()
    cached_fingerprint(flow)
    blocks = weakref.ref(flow.blocks)
    del flow
    gc.collect()
    assert blocks() is None


@torch.inference_mode()
def test_tensors_whose_changes_pytorch_does_not_count_are_read_each_time() -> None:
    flow = make()
    before = cached_fingerprint(flow)
    flow.blocks[0].proj_out.weight[3, 5] += 1
    assert cached_fingerprint(flow) != before
