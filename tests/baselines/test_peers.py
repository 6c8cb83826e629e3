"""Samplers of other papers, against their rules written out over the oracle, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from problems import Ledger, latents, make_flow, make_identity
from torch import Tensor

import jacobiflow as jf
from jacobiflow.baselines import GRIDS, PEERS

# Settings at which each rule stops at the exact answer: sweeps suffice, and the threshold is rounding.
TIGHT = {
    "Selective Jacobi Decoding": {"threshold": 1e-12},
    "STARFlow": {"run_length": 5, "threshold": 1e-24, "max_sweeps": 5},
}
LABELS = torch.tensor([0, 2, -1])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PEERS)
def test_tight_settings_reach_the_sequential_answer(name: str) -> None:
    flow, guidance = make_flow(num_classes=3), jf.Guidance(0.6, attn_temperature=1.5)
    z = latents(flow, 3)
    out = PEERS[name](flow, z, LABELS, guidance, **TIGHT[name])
    exact = oracle.Oracle(flow).decode(z, LABELS, oracle.Guide(0.6, True, "both", 1.5))
    torch.testing.assert_close(out.images, exact, rtol=0, atol=1e-9)
    assert torch.equal(z, latents(flow, 3))
    other = make_flow(image_size=12, num_blocks=3, nvp=False)
    z = latents(other, 2)
    out = PEERS[name](other, z, **TIGHT[name])
    torch.testing.assert_close(out.images, oracle.Oracle(other).decode(z), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------ the rules, and what they may cost


def reference_whole(g: oracle.Map, z: Tensor, threshold: float) -> tuple[Tensor, int, int]:
    """Sweeps of all tokens from 0; the answer, sweeps, tokens fed a sample."""
    x, sweeps, change = torch.zeros_like(z), 0, math.inf
    while change >= threshold and sweeps < z.shape[1]:
        new = g(x)
        change, x, sweeps = (new - x).abs().max().item(), new, sweeps + 1
    return x, sweeps, sweeps * z.shape[1]


def reference_runs(
    g: oracle.Map, z: Tensor, run_length: int, threshold: float, max_sweeps: int, fresh_keys: bool
) -> tuple[Tensor, int, int]:
    """Runs of tokens; `read` has each token as it was when it was last fed."""
    x, read, calls, fed = z.clone(), z.clone(), 0, 0
    for start in range(0, z.shape[1], run_length):
        stop, sweeps, change = min(start + run_length, z.shape[1]), 0, math.inf
        while change >= threshold and sweeps < max_sweeps:
            read[:, max(start - 1, 0) :] = x[:, max(start - 1, 0) :]
            new = g(read)[:, start:stop]
            change = (((new - x[:, start:stop]) ** 2).mean() / (new**2).mean()).item()
            x[:, start:stop] = new
            sweeps += 1
        calls, fed = calls + sweeps, fed + sweeps * (stop - start)
        if fresh_keys and stop < z.shape[1]:
            read[:, start:stop] = x[:, start:stop]
            fed += max(stop - start - sweeps, 0)  # the last sweep read the first sweeps - 1 at their final values
    return x, calls, fed


def expected(flow: jf.TarFlow, z: Tensor, solve: Callable[[int, oracle.Map, Tensor], Any]) -> tuple[Tensor, int, int]:
    """Images, network calls and token evaluations of solving every block, last first."""
    reference, calls, fed = oracle.Oracle(flow), 0, 0
    x = z * reference.var.sqrt()
    for i in reversed(range(reference.num_blocks)):
        given = reference.flip(i, x)

        def g(x: Tensor, i: int = i, given: Tensor = given) -> Tensor:
            return reference.g(i, x, given, LABELS)

        x, more_calls, more_fed = solve(i, g, given)
        x, calls, fed = reference.flip(i, x), calls + more_calls, fed + more_fed
    return reference.images(x), calls, fed * len(z)


@pytest.mark.parametrize("threshold", [2.0, 0.5, 1e-3])
def test_selective_jacobi_is_its_rule(threshold: float) -> None:
    flow = make_flow(num_classes=3, num_blocks=3)
    z, length = latents(flow, 3), flow.config.num_tokens

    def solve(i: int, g: oracle.Map, given: Tensor) -> tuple[Tensor, int, int]:
        if i == flow.config.num_blocks - 1:
            return oracle.sequential(g, given), length, length
        return reference_whole(g, given, threshold)

    images, calls, fed = expected(flow, z, solve)
    out = PEERS["Selective Jacobi Decoding"](flow, z, LABELS, threshold=threshold)
    torch.testing.assert_close(out.images, images, rtol=0, atol=1e-9)
    assert (out.network_calls, out.token_evaluations) == (calls, fed)
    assert length < calls <= 3 * length


@pytest.mark.parametrize("fresh_keys", [False, True])
@pytest.mark.parametrize(
    ("run_length", "threshold", "max_sweeps"), [(16, 1e-3, 32), (5, 1e-2, 32), (6, 1e-9, 2), (3, 1e-9, 1), (1, 1e-3, 4)]
)
def test_starflow_is_its_rule(run_length: int, threshold: float, max_sweeps: int, fresh_keys: bool) -> None:
    flow = make_flow(num_classes=3)
    z = latents(flow, 3)
    settings = {
        "run_length": run_length, "threshold": threshold, "max_sweeps": max_sweeps, "fresh_keys": fresh_keys,
    }  # fmt: skip
    images, calls, fed = expected(flow, z, lambda i, g, given: reference_runs(g, given, **settings))
    out = PEERS["STARFlow"](flow, z, LABELS, **settings)
    torch.testing.assert_close(out.images, images, rtol=0, atol=1e-9)
    assert (out.network_calls, out.token_evaluations) == (calls, fed)


@pytest.mark.parametrize(("run_length", "max_sweeps"), [(3, 1), (5, 4), (16, 9)])
def test_fresh_keys_are_those_of_the_final_values(run_length: int, max_sweeps: int) -> None:
    inner = make_flow()
    z = latents(inner, 3)
    ledgers = [Ledger(block, slack=1e-12) for block in inner.blocks]
    for ledger, block in zip(ledgers, inner.blocks, strict=True):
        ledger.permutation = block.permutation  # type: ignore[attr-defined]
    flow = SimpleNamespace(config=inner.config, blocks=ledgers, var=inner.var, to_images=inner.to_images)
    settings = {"run_length": run_length, "threshold": 1e-3, "max_sweeps": max_sweeps}
    out = PEERS["STARFlow"](flow, z, **settings)
    calls = [call for ledger in ledgers for call in ledger.calls]
    assert out.network_calls == len(calls)
    assert out.token_evaluations == 3 * sum(stop - start for start, stop in calls)
    if run_length < 16:
        with pytest.raises(AssertionError, match="stale keys"):
            PEERS["STARFlow"](flow, z, fresh_keys=False, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "calls", "tokens"),
    [  # of the identity, with 16 tokens and 2 blocks
        ("Selective Jacobi Decoding", {}, 16 + 2, 16 + 2 * 16),  # from 0, a sweep to z, and one that changes nothing
        ("STARFlow", {"run_length": 5, "fresh_keys": False}, 2 * 4, 2 * 16),  # a sweep a run
        ("STARFlow", {"run_length": 5}, 2 * 4, 2 * (5 + 9 + 9 + 5)),  # 4 tokens of the run before are fed again
    ],
)
def test_a_network_in_bfloat16_keeps_the_state_in_float32(
    name: str, settings: dict[str, Any], calls: int, tokens: int
) -> None:
    flow = make_identity(torch.bfloat16)
    z = latents(make_identity(torch.float32), 3)
    out = PEERS[name](flow, z, **settings)
    want = flow.to_images(z * torch.tensor(0.5).sqrt())
    assert out.images.dtype == torch.float32
    assert torch.equal(out.images, want)
    assert (out.network_calls, out.token_evaluations) == (calls, 3 * tokens)


# ------------------------------------------------------------------------------------------------------ grids, settings


def test_grids_start_with_the_published_settings() -> None:
    assert set(GRIDS) == set(PEERS)
    assert GRIDS["Selective Jacobi Decoding"][0] == {"threshold": 0.5}
    published = {"run_length": 16, "threshold": 1e-3, "max_sweeps": 32}
    assert GRIDS["STARFlow"][:2] == [{**published, "fresh_keys": fresh} for fresh in (False, True)]
    flow = make_flow()
    for name, grid in GRIDS.items():
        for settings in grid[:: len(grid) // 4]:
            assert PEERS[name](flow, latents(flow, 1), **settings).images.isfinite().all()


def test_published_settings_of_the_bundled_model() -> None:
    """Both stop with an error that can be seen: their thresholds are for a likeness, not for the inverse."""
    flow, labels = jf.load("fashion-p2"), torch.tensor([3, 7])
    z = latents(flow, 2)
    exact = jf.sample(flow, latents=z, labels=labels, strategy="sequential", certify=False, progress=False)
    for name, peer in PEERS.items():
        out = peer(flow, z, labels, **GRIDS[name][0])
        assert 1e-5 < (out.images - exact.images).abs().max().item() < math.inf
        assert out.network_calls < flow.config.num_blocks * flow.config.num_tokens / 2


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("Selective Jacobi Decoding", {"threshold": 0.0}, r"threshold=0\.0: give a positive number"),
        ("STARFlow", {"threshold": math.nan}, "threshold=nan"), ("STARFlow", {"run_length": 0}, "run_length=0"),
        ("STARFlow", {"max_sweeps": 0}, "max_sweeps=0"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    flow = make_flow()
    with pytest.raises(ValueError, match=words):
        PEERS[name](flow, latents(flow, 3), **settings)


@pytest.mark.parametrize("name", PEERS)
def test_latents_and_labels_that_do_not_fit_are_refused(name: str) -> None:
    flow, peer = make_flow(num_classes=3), PEERS[name]
    z = latents(flow, 3)
    for wrong in (z[:, :-1], z[:0], z[0]):
        with pytest.raises(ValueError, match="z of shape"):
            peer(flow, wrong)
    with pytest.raises(ValueError, match="label 3"):
        peer(flow, z, torch.tensor([0, 1, 3]))
