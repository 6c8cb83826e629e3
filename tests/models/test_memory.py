"""The memory of a machine, a container and a batch, and the memory setting of a process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import jacobiflow as jf
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import guided
from jacobiflow.models import memory
from jacobiflow.models.latents import draw_latents
from tests.helpers.fake_device import FakeDevice


def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict[int, int]()
    library = SimpleNamespace(mallopt=settings.__setitem__)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    memory.keep_freed_memory()
    assert settings == {-1: 2**31 - 1, -3: 2**25}


@pytest.mark.parametrize("guidance", [None, jf.Guidance(1.0)])
@pytest.mark.parametrize("large", [0, 1])
def test_the_largest_block_tells_how_much_a_batch_takes(large: int, guidance: jf.Guidance | None) -> None:
    widths, layers = ((64, 16), (8, 1)) if large == 0 else ((16, 64), (1, 8))
    config = jf.TokenConfig(64, 4, widths, num_blocks=2, layers_per_block=layers, num_classes=5, head_dim=16)
    with FakeDevice() as device:
        flow = jf.TarFlow(config).requires_grad_(False).to("cuda")
        z, labels = draw_latents(16, 64, 4).to("cuda"), torch.arange(16, device="cuda") % 5
        with device.counting() as counts:
            jf.solve(guided(flow.blocks[large], guidance), z, jf.Solver(), labels, certify=False)
        needed = memory.memory_needs(flow.guided(guidance)).of_batch(16)
    assert needed is not None
    assert 0.5 * needed < counts.peak <= needed


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_the_exact_loop_copies_a_block_s_weights_unless_they_are_large(dtype: torch.dtype, size: int) -> None:
    for width, layers, is_copied in ((128, 2, True), (1024, 3, dtype == torch.float32)):
        flow = jf.TarFlow(jf.TokenConfig(4, 2, width, num_blocks=1, layers_per_block=layers)).to(dtype)
        one, two = (memory.memory_needs(flow).of_batch(num) for num in (1, 2))
        assert one is not None and two is not None
        weights = 12 * layers * width**2 * size * is_copied
        assert weights <= 2 * one - two < weights + 2**16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [None, jf.Guidance(1.0)])
def test_the_needs_of_a_flow_are_those_of_the_loaded_one(dtype: torch.dtype, guidance: jf.Guidance | None) -> None:
    config = jf.TokenConfig(64, 4, (32, 64), num_blocks=2, layers_per_block=(1, 3), num_classes=5, head_dim=16)
    with torch.device("meta"):
        shapes = jf.TarFlow(config).guided(guidance)
    flow, cpu = jf.TarFlow(config).to(dtype).guided(guidance), torch.device("cpu")
    needs = memory.memory_needs(shapes, cpu, dtype)
    blocks = [sum(tensor.nbytes for tensor in block.state_dict().values()) for block in flow.blocks]
    assert (needs.weights, needs.largest_block) == (sum(blocks), max(blocks))
    one, two = (memory.memory_needs(flow).of_batch(num) for num in (1, 2))
    assert one is not None and two is not None and needs.sample is not None
    assert (needs.sample, needs.copied) == (two - one, 2 * one - two)
    deep = flow.inverse_block(1).init_cache(draw_latents(1, 64, 4), Context(torch.zeros(1, dtype=torch.int64)))
    layers = deep.layers if guidance is None else deep.inner.layers
    assert needs.keys_values == sum(layer.nbytes for layer in layers)
    offloaded = memory.memory_needs(flow.offloaded(cpu))  # The gradient keeps the activations of one block at a time.
    assert needs == memory.memory_needs(flow) == replace(offloaded, gradient=needs.gradient)
    assert needs.offloaded == max(blocks) + needs.copied
    free = int((needs.weights + needs.copied + 4 * needs.sample) / 0.8) + 1
    batches = [needs.max_batch(free, needs.weights + needs.copied, limit) for limit in (None, 3, 9)]
    assert batches == [4, 3, 4] and needs.max_batch(0, 0) == 0


def test_a_gpu_holds_two_blocks_of_an_offloaded_flow() -> None:
    config = jf.TokenConfig(64, 4, 64, num_blocks=3, layers_per_block=(1, 3, 2), head_dim=16)
    flow = jf.TarFlow(config)
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in flow.blocks]
    needs = memory.memory_needs(flow, torch.device("cuda"))
    assert (needs.copied, needs.offloaded) == (0, blocks[1] + blocks[2])


def test_the_machine_and_every_group_limit_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, own = torch.device("cpu"), tmp_path / "own"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9000))
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_CGROUP_OF_PROCESS", own)
    assert memory.free_memory(cpu) == 9000
    own.write_text("4:memory:/other\n0::/job/step\n")

    def limit(group: str, most: str, used: int, files: int) -> None:
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        stat = f"anon {used - files}\nactive_file {files // 2}\ninactive_file {files - files // 2}\n"
        for name, text in {"max": f"{most}\n", "current": f"{used}\n", "stat": stat}.items():
            (tmp_path / group / f"memory.{name}").write_text(text)

    for group, most, used, files, free in (
        ("job/step", "max", 10, 0, 9000), ("job", "8000", 3000, 1000, 6000), ("job/step", "7000", 3000, 500, 4500),
        (".", "20000", 16000, 0, 4000),
    ):  # fmt: skip
        limit(group, most, used, files)
        assert memory.free_memory(cpu) == free
