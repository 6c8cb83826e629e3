"""Every path on tensors that say they are on a GPU: the numbers of the CPU, and what a GPU would be asked."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import zuko
from torch import Tensor

import jacobiflow as jf
from jacobiflow.blocks.guidance import guided
from jacobiflow.data import Noise, digits, noisy_images
from jacobiflow.evaluation import bits_per_dim
from jacobiflow.fixed_point.cuda_graphs import GraphCapture
from jacobiflow.models.latents import draw_latents
from jacobiflow.models.memory import find_batch_size, memory_needs
from jacobiflow.sampling.folder import SampleFolder
from jacobiflow.training import TrainingConfig, train
from tests.helpers.fake_device import Counts, FakeDevice
from tests.helpers.library_flows import problem_of, same_bits
from tests.helpers.problems import latents, make_flow, make_star, texts, to_float32

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = torch.arange(5)
WINDOW, SEGMENTS = "window:4", "[0/1-4-4-5]"


def small(device: str) -> jf.TarFlow:
    """A flow of 16 tokens and 2 blocks over digits, where the subject is what happens around it."""
    return to_float32(make_flow(num_classes=10, noise_std=0.1)).to(device)


def sample(
    make: Any = small, num: int = 3, guidance: jf.Guidance | None = None, denoise: float = 0.0, **options: Any
) -> Callable[[str], Tensor]:
    def run(device: str) -> Tensor:
        flow = make(device=device)
        z = draw_latents(num, flow.config.num_tokens, flow.config.token_dim, 0)
        options.setdefault("tolerance", None if options["strategy"] in ("sequential", SEGMENTS) else 1e-6)
        settings = jf.SamplingSettings(guidance, denoise)
        return jf.sample(flow, latents=z, labels=LABELS[:num], settings=settings, **options).images

    return run


def images(flow: jf.Flow, num: int) -> Tensor:
    return noisy_images(digits(), torch.arange(num), Noise(flow.config.noise_std))


def evaluate(device: str) -> Tensor:
    flow, data = small(device), digits()
    few = replace(data, images=data.images[:4], labels=data.labels[:4])
    return torch.tensor(bits_per_dim(flow, few, Noise(flow.config.noise_std)))


def calibrate(device: str) -> Tensor:
    flow = small(device)
    report = jf.calibrate(flow, images(flow, 2), digits().labels[:2], num_convergence_samples=1)
    return torch.tensor([*report.crm, *report.mean_sweeps("noise", 1e-3)])


def folder(device: str) -> Tensor:
    flow, out = small(device), Path(f"samples-{device}")
    settings: dict[str, Any] = {"strategy": "sequential", "batch_size": 1, "shard_size": 1}
    jf.sample_to_folder(flow, 2, out, LABELS[:2], **settings)
    return torch.cat([images.float() for images in SampleFolder.open(out).batches()]) / 255


def planned(device: str) -> Tensor:
    """The samples, not the plan, which depends on the clock."""
    plan = jf.plan(small(device), batch_size=2, tolerance=1e-6)
    return sample(num=2, strategy=plan)(device)


def training(device: str) -> Tensor:
    """It resumes on the CPU."""
    config = jf.TarFlowConfig(1, 8, 2, 32, 2, layers_per_block=1, num_classes=10, head_dim=16, noise_std=0.1)
    settings, out = TrainingConfig(steps=2, batch_size=16, bf16=False), Path(f"run-{device}")
    for steps, where in ((2, device), (3, "cpu")):
        torch.manual_seed(0)
        flow = train(jf.TarFlow(config).to(where), digits(), replace(settings, steps=steps), out)
    return torch.cat([parameter.flatten() for parameter in flow.parameters()])


def accelerated(device: str) -> Tensor:
    torch.manual_seed(0)
    flow = zuko.flows.MAF(features=8, transforms=2, hidden_features=(32,)).to(device)
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), jf.accelerate(flow):
        return flow().transform.inv(z)


def texts_read(strategy: str) -> Callable[[str], Tensor]:
    """More samples than batch_size, under guidance: a new one's text takes the place of another's."""

    def run(device: str) -> Tensor:
        flow = deepcopy(make_star()).float().to(device)
        guidance, z = jf.Guidance(1.0, annealed=False, rule="density"), latents(make_star(), 5).float()
        tolerance = None if strategy == "sequential" else 1e-6
        settings: dict[str, Any] = {"strategy": strategy, "batch_size": 2, "tolerance": tolerance}
        return jf.sample(flow.guided(guidance), latents=z, context=texts(make_star(), 5).float(), **settings).images

    return run


GUIDANCE, DIGITS_MAF = jf.Guidance(1.0, attn_temperature=1.4), partial(jf.load, "digits-maf")
PATHS: dict[str, Callable[[str], Tensor]] = {
    "sequential": sample(strategy="sequential"), "denoised": sample(strategy="jacobi", denoise=1.0),
    "segments": sample(strategy=SEGMENTS, guidance=GUIDANCE),
    "waiting samples": sample(num=5, strategy=WINDOW, batch_size=2, guidance=GUIDANCE, tolerance=1e-5),
    "bfloat16 first": sample(strategy=jf.Strategy.uniform(jf.Solver(guess=jf.Bf16Sweeps(3)), 2)),
    "maf": sample(DIGITS_MAF, strategy=WINDOW), "maf, sequential": sample(DIGITS_MAF, strategy="sequential"),
    "evaluate": evaluate, "calibrate": calibrate, "train": training, "accelerate": accelerated, "folder": folder,
    "plan": planned, "texts": texts_read("window:3"),
    "texts, sequential": texts_read("sequential"),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_gives_the_numbers_of_the_cpu(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = PATHS[path]("cpu")
    with FakeDevice() as device:
        found = PATHS[path]("cuda").cpu()
    assert device.counts.to_device > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("default", ["meta", "cuda"])  # "cuda" also where there is none
def test_the_default_device_changes_no_bit_of_a_flow_on_the_cpu(default: str, tmp_path: Path) -> None:
    flow, maf, data = jf.load("digits-p1"), jf.load("digits-maf"), digits()
    x, labels = images(flow, 4), data.labels[:4]
    problems = [problem_of(name) for name in ("zuko NSF", "nflows coupling", "normflows spline", "pyro spline")]

    def compute(name: str) -> list[Tensor]:
        report = jf.calibrate(flow, x, labels, num_convergence_samples=1)
        trained = train(deepcopy(maf).requires_grad_(), data, TrainingConfig(steps=2, batch_size=4), tmp_path / name)
        results = [*flow.encode(x, labels), *maf.encode(x.clamp(-1, 1), labels), *trained.parameters()]
        for strategy in ("sequential", "auto", "gs-jacobi:4"):
            results += [jf.sample(each, 2, strategy=strategy).images for each in (flow, maf)]
        for case, module, y, context in problems:
            with jf.accelerate(module) as handle:
                results += case.invert(module, y, context)
            assert {*handle.backends.values()} == {"native"}
        return [*results, x.new_tensor(report.crm)]

    expected = compute("before")
    torch.set_default_device(default)
    try:
        found = compute("with")
    finally:
        torch.set_default_device(None)
    assert same_bits(found, expected)


def test_tf32_is_a_precision_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    flow = small("cpu")
    assert flow.precision == "float32"
    with FakeDevice():
        assert flow.to("cuda").precision == "tf32"
        assert flow.to("cuda", dtype=torch.bfloat16).precision == "bfloat16"


def count(
    side: int, solver: jf.Solver, guidance: jf.Guidance | None, num: int = 3, batch_size: int | None = None,
    tolerance: float | None = 1e-3,
) -> tuple[int, Counts]:  # fmt: skip
    """The sweeps of a solve over (side/2)^2 tokens by a block of 2 layers, and the counts of the device."""
    config = jf.TarFlowConfig(3, side, 2, width=32, num_blocks=1, layers_per_block=2, num_classes=5, head_dim=16)
    torch.manual_seed(0)
    flow = jf.TarFlow(config).requires_grad_(False)
    flow.blocks[0].proj_out.weight.normal_(std=0.02)
    with FakeDevice() as device:
        block = guided(flow.to("cuda").blocks[0], guidance)
        z = draw_latents(num, config.num_tokens, config.token_dim, 0).to("cuda")
        labels = torch.arange(num, device="cuda") % 5
        with device.counting() as counts:
            solution = jf.solve(block, z, solver, labels, tolerance=tolerance, certify=False, batch_size=batch_size)
    return solution.sweeps, counts


def count_sweep(solver: Callable[[int], jf.Solver], *arguments: Any, **options: Any) -> dict[str, float]:
    """The counts of each further sweep, given a solver for a number of tokens."""
    (few, before), (many, after) = (count(side, solver(side**2 // 4), *arguments, **options) for side in (8, 16))
    totals = [
        {"operations": counts.operations.total(), "read_backs": counts.read_backs, "copies": counts.to_device,
         "explicit_masks": counts.attention["explicit"]}
        for counts in (before, after)
    ]  # fmt: skip
    return {name: (totals[1][name] - totals[0][name]) / (many - few) for name in totals[0]}


@pytest.mark.parametrize(("guidance", "most"), [(None, 48), (jf.Guidance(1.0), 56)])
def test_the_operations_of_a_token(guidance: jf.Guidance | None, most: int) -> None:
    """Launched one by one, or as a graph; the context is rounded up, and hidden by a mask in each layer."""
    for launches in (most, 1):
        capture = (lambda graphs, step: step) if launches > 1 else GraphCapture.capture
        with patch.object(GraphCapture, "capture", capture):
            counts = count_sweep(lambda tokens: jf.Solver(jf.Sequential()), guidance)
        assert counts == {"operations": launches, "read_backs": 0, "copies": 0, "explicit_masks": 2}


def test_an_exact_loop_never_waits_for_the_device() -> None:
    """Each further block is launched while those before it still run."""
    waits = []
    for num_blocks in (2, 4):
        config = jf.TarFlowConfig(3, 8, 2, width=32, num_blocks=num_blocks, layers_per_block=1, head_dim=16)
        with FakeDevice() as device:
            flow = jf.TarFlow(config).requires_grad_(False).to("cuda")
            jf.sample(flow, 3, strategy="sequential")  # which reads the weights once, for their fingerprint
            with device.counting() as counts:
                jf.sample(flow, 3, strategy="sequential")
        waits.append(counts.read_backs)
    assert waits[0] == waits[1]


@pytest.mark.parametrize("guidance", [None, jf.Guidance(1.0)])
def test_a_sweep(guidance: jf.Guidance | None) -> None:
    """A fixed number of them never waits for the device; a window does so at every fourth.

    The window has one sample: several stand at tokens of their own if their rounding differs, and some move.
    """
    three = jf.Stopping(3)
    segments = count_sweep(lambda tokens: jf.Solver(jf.Segments(tokens // 8), stopping=three), guidance, tolerance=None)
    assert segments["read_backs"] == segments["copies"] == segments["explicit_masks"] == 0
    window = count_sweep(lambda tokens: jf.Solver(jf.Window(4)), guidance, num=1, tolerance=1e-30)
    assert window["read_backs"] <= 0.25
    assert window["operations"] <= 45  # of which one is the graph of the network
    assert window["copies"] == 0


@pytest.mark.parametrize("guidance", [None, jf.Guidance(1.0)])
def test_waiting_samples_take_the_memory_of_those_that_have_finished(guidance: jf.Guidance | None) -> None:
    solver = jf.Solver(jf.Window(8))
    (_, alone), (_, waiting) = (count(8, solver, guidance, num, 8, tolerance=1e-6) for num in (8, 24))
    assert waiting.peak <= 1.5 * alone.peak


@pytest.mark.parametrize("guidance", [None, GUIDANCE])
@pytest.mark.parametrize("partition", [jf.Whole(), jf.Window(8), jf.Sequential()])
def test_a_batch_takes_at_most_the_estimated_memory(partition: jf.Partition, guidance: jf.Guidance | None) -> None:
    config = jf.TarFlowConfig(3, 16, 2, width=32, num_blocks=1, layers_per_block=8, num_classes=5, head_dim=16)
    with FakeDevice() as device:
        flow = jf.TarFlow(config).requires_grad_(False).to("cuda")
        z = draw_latents(16, config.num_tokens, config.token_dim, 0).to("cuda")
        labels, needed = torch.arange(16, device="cuda") % 5, memory_needs(flow.guided(guidance)).of_batch(1)
        assert needed is not None
        with device.counting() as counts:
            jf.solve(guided(flow.blocks[0], guidance), z, jf.Solver(partition), labels, certify=False)
        assert 0.5 * 16 * needed < counts.peak <= 16 * needed
        for free, num in ((needed * 1.25 * 7.9, 4), (needed * 1.25 * 3000, 100)):  # four fifths of it are used
            with patch.object(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 0)):
                assert find_batch_size(flow.guided(guidance), 100) == num
        with (
            patch.object(torch.cuda, "mem_get_info", lambda device: (needed, 0)),
            pytest.raises(ValueError, match=r"a sample needs 0\.0 GiB beside the weights, and 0\.0 GiB are free"),
        ):
            find_batch_size(flow.guided(guidance), 100)
