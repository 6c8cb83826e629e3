"""The samplers of others in jacobiflow.baselines.peers, against their rules written out over the oracle, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from problems import Ledger, latents, make_flow
from torch import Tensor

import jacobiflow as jf
from jacobiflow.baselines import peers

ROOT = Path(__file__).resolve().parents[2]

# Settings at which each rule stops at the exact answer: sweeps suffice, and the threshold is rounding.
TIGHT = {
    "Selective Jacobi Decoding": {"threshold": 1e-12},
    "STARFlow": {"run_length": 5, "threshold": 1e-24, "max_sweeps": 5},
}
GUIDES = {
    "unguided": (None, None),
    "annealed": (jf.Guidance(0.6, attn_temperature=1.5), oracle.Guide(0.6, True, "both", 1.5)),
    "scale": (jf.Guidance(0.4, annealed=False, on="scale"), oracle.Guide(0.4, False, "scale", 1.0)),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def class_flow() -> jf.TarFlow:
    return make_flow(num_classes=3)


LABELS = torch.tensor([0, 2, -1])


# ----------------------------------------------------------------------------------------------------- the exact answer


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("name", peers.PEERS)
def test_tight_settings_reach_the_sequential_answer(name: str, guide: str) -> None:
    flow, (guidance, reference) = class_flow(), GUIDES[guide]
    z = latents(flow, 3)
    out = peers.PEERS[name](flow, z, LABELS, guidance, **TIGHT[name])
    exact = oracle.Oracle(flow).decode(z, LABELS, reference)
    torch.testing.assert_close(out.images, exact, rtol=0, atol=1e-9)
    assert torch.equal(z, latents(flow, 3))


@pytest.mark.parametrize("flow", [{"nvp": False}, {"image_size": 12, "num_blocks": 3}, {"num_blocks": 1}], ids=str)
@pytest.mark.parametrize("name", peers.PEERS)
def test_tight_settings_are_exact_for_flows_of_other_shapes(name: str, flow: dict[str, Any]) -> None:
    made = make_flow(**flow)
    z = latents(made, 2)
    out = peers.PEERS[name](made, z, **TIGHT[name])
    torch.testing.assert_close(out.images, oracle.Oracle(made).decode(z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("fresh_keys", [False, True])
@pytest.mark.parametrize("run_length", [1, 3, 7, 16, 40])
def test_runs_of_any_length_are_exact(run_length: int, fresh_keys: bool) -> None:
    flow = class_flow()
    z, sweeps = latents(flow, 3), run_length + (not fresh_keys)  # the keys of a run are those before its last sweep
    out = peers.starflow(
        flow, z, LABELS, run_length=run_length, threshold=1e-24, max_sweeps=sweeps, fresh_keys=fresh_keys
    )
    torch.testing.assert_close(out.images, oracle.Oracle(flow).decode(z, LABELS), rtol=0, atol=1e-9)


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
            fed += max(stop - start - sweeps, 0)  # the last sweep read the first sweeps - 1 as they are
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


@pytest.mark.parametrize("threshold", [2.0, 0.5, 0.1, 1e-3])
def test_selective_jacobi_is_its_rule(threshold: float) -> None:
    flow = make_flow(num_classes=3, num_blocks=3)
    z, length = latents(flow, 3), flow.config.num_tokens

    def solve(i: int, g: oracle.Map, given: Tensor) -> tuple[Tensor, int, int]:
        if i == flow.config.num_blocks - 1:
            return oracle.sequential(g, given), length, length
        return reference_whole(g, given, threshold)

    images, calls, fed = expected(flow, z, solve)
    out = peers.selective_jacobi(flow, z, LABELS, threshold=threshold)
    torch.testing.assert_close(out.images, images, rtol=0, atol=1e-9)
    assert (out.network_calls, out.token_evaluations) == (calls, fed)
    assert length < calls <= 3 * length


@pytest.mark.parametrize("fresh_keys", [False, True])
@pytest.mark.parametrize(
    ("run_length", "threshold", "max_sweeps"),
    [(16, 1e-3, 32), (5, 1e-2, 32), (5, 1e-3, 32), (6, 1e-9, 2), (3, 1e-9, 1), (1, 1e-3, 4)],
)
def test_starflow_is_its_rule(run_length: int, threshold: float, max_sweeps: int, fresh_keys: bool) -> None:
    flow = class_flow()
    z = latents(flow, 3)
    settings = {
        "run_length": run_length, "threshold": threshold, "max_sweeps": max_sweeps, "fresh_keys": fresh_keys,
    }  # fmt: skip
    images, calls, fed = expected(flow, z, lambda i, g, given: reference_runs(g, given, **settings))
    out = peers.starflow(flow, z, LABELS, **settings)
    torch.testing.assert_close(out.images, images, rtol=0, atol=1e-9)
    assert (out.network_calls, out.token_evaluations) == (calls, fed)


@pytest.mark.parametrize("max_sweeps", [1, 2, 4, 9])
@pytest.mark.parametrize("run_length", [1, 3, 5, 16])
def test_fresh_keys_are_those_of_the_final_values(
    run_length: int, max_sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = class_flow()
    z = latents(flow, 3)
    ledgers: list[Ledger] = []

    def wrapped(block: jf.Block, guidance: None) -> Ledger:
        ledgers.append(Ledger(block, slack=1e-12))
        return ledgers[-1]

    monkeypatch.setattr(peers, "guided", wrapped)
    settings = {"run_length": run_length, "threshold": 1e-3, "max_sweeps": max_sweeps}
    out = peers.starflow(flow, z, LABELS, **settings)
    calls = [call for ledger in ledgers for call in ledger.calls]
    assert out.network_calls == len(calls)
    assert out.token_evaluations == 3 * sum(stop - start for start, stop in calls)
    if 1 < run_length < 16 and max_sweeps < run_length:
        with pytest.raises(AssertionError, match="stale keys"):
            peers.starflow(flow, z, LABELS, fresh_keys=False, **settings)


# ------------------------------------------------------------------------------------------------------ grids, settings


def test_grids_start_with_the_published_settings() -> None:
    assert set(peers.GRIDS) == set(peers.PEERS)
    assert peers.GRIDS["Selective Jacobi Decoding"][0] == {"threshold": 0.5}
    published = {"run_length": 16, "threshold": 1e-3, "max_sweeps": 32}
    assert peers.GRIDS["STARFlow"][:2] == [{**published, "fresh_keys": fresh} for fresh in (False, True)]


@pytest.mark.parametrize(
    ("name", "settings"), [(name, settings) for name, grid in peers.GRIDS.items() for settings in grid], ids=str
)
def test_every_setting_of_a_grid_runs(name: str, settings: dict[str, Any]) -> None:
    flow = class_flow()
    assert peers.PEERS[name](flow, latents(flow, 2), LABELS[:2], **settings).images.isfinite().all()


@pytest.mark.parametrize("guidance", [None, jf.Guidance(1.0)], ids=["unguided", "guided"])
def test_published_settings_of_the_bundled_model(guidance: jf.Guidance | None) -> None:
    """Both stop with an error that can be seen: their thresholds are for a likeness, not for the inverse."""
    flow, labels = jf.load("fashion-p2"), torch.tensor([3, 7])
    z = latents(flow, 2)
    exact = jf.sample(flow, latents=z, labels=labels, strategy="sequential", guidance=guidance, progress=False)
    length, blocks = flow.config.num_tokens, flow.config.num_blocks
    for name, peer in peers.PEERS.items():
        out = peer(flow, z, labels, guidance, **peers.GRIDS[name][0])
        error = (out.images - exact.images).abs().max().item()
        assert 1e-5 < error < math.inf
        assert out.network_calls < blocks * length / 2


def test_the_grid_of_gs_jacobi_is_of_the_report() -> None:
    flow = jf.load("fashion-p2")
    assert flow.report_file is not None
    report = jf.Report.load(flow.report_file)
    grid = peers.gs_jacobi_grid(report)
    assert {"Jacobi-30", "Jacobi-60", "[7-196-1-10]", "[7-8-32-10]", "[7-4-32-10]", "[7-8-6-10]"} <= set(grid)
    for text, strategy in grid.items():
        assert strategy == jf.Strategy.parse(text, report)
        strategy.check(flow)
    z = latents(flow, 1)
    exact = jf.sample(flow, latents=z, strategy="sequential", progress=False)
    out = jf.sample(flow, latents=z, strategy=grid["[7-8-32-10]"], certify=False, progress=False)
    assert (out.images - exact.images).abs().max() < math.inf


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("Selective Jacobi Decoding", {"threshold": 0.0}, r"threshold=0\.0"),
        ("Selective Jacobi Decoding", {"threshold": math.nan}, "threshold=nan"),
        ("STARFlow", {"threshold": -1.0}, r"threshold=-1\.0"),
        ("STARFlow", {"run_length": 0}, "run_length=0"),
        ("STARFlow", {"max_sweeps": 0}, "max_sweeps=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    flow = class_flow()
    with pytest.raises(ValueError, match=words):
        peers.PEERS[name](flow, latents(flow, 3), LABELS, **settings)


@pytest.mark.parametrize("name", peers.PEERS)
def test_latents_and_labels_that_do_not_fit_are_refused(name: str) -> None:
    flow, peer = class_flow(), peers.PEERS[name]
    z = latents(flow, 3)
    for wrong in (z[:, :-1], z[:0], z[0]):
        with pytest.raises(ValueError, match="z of shape"):
            peer(flow, wrong)
    with pytest.raises(ValueError, match="label 3"):
        peer(flow, z, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="labels of shape"):
        peer(flow, z, LABELS[:2])
