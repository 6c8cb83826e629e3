"""The kernel for GPUs as C++ on a CPU, against the libraries in float64, and its launch by a stand-in for cuda.core."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zuko
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.native import compiler, cuda
from jacobiflow.native.cuda import choose_grid
from tests.helpers.fake_cuda import FakeCuda, LaunchConfig
from tests.helpers.library_flows import CASES, NATIVE, exact, normal, values
from tests.native.sanitizers import SANITIZERS


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulator") / "emulator.so"
    flags = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=fast", f"-I{compiler.SOURCES}")
    flags += tuple(os.environ.get("EMULATOR_FLAGS", "").split())
    subprocess.run((compiler._compiler(), *flags, Path(__file__).parent / "emulate.cpp", "-o", path), check=True)
    return path


@pytest.fixture
def gpu(emulator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """All rows are on a GPU of 2 processors, whose new memory has NaN in it."""
    fake = FakeCuda(emulator)
    nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 12, 9))
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(core=fake))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=nvrtc))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("jacobiflow.adapters.discovery.is_installed", lambda: True)
    monkeypatch.setattr(cuda, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: _filled(torch.zeros(*size, **options)))
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *size, **options: _filled(x.new_zeros(*size, **options)))
    cuda._load_kernel.cache_clear()
    return fake


def _filled(x: Tensor) -> Tensor:
    return x.fill_(torch.nan) if x.is_floating_point() else x


def check(flow: nn.Module, rows: int, width: int, is_inverse: bool, gpu: FakeCuda, features: int = 5) -> None:
    x, context = normal(rows, features), normal(rows, width, seed=1) if width else None
    with torch.no_grad(), jf.accelerate(flow, cuda=True) as handle:
        results = []
        for gpu.order in (0, 1):
            results.append(values(flow, x, context, is_inverse))
            assert set(handle.backends.values()) == {"cuda"}, handle
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    for ours, theirs in zip(results[0], exact(flow, x, context, is_inverse), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", NATIVE)
def test_results_are_those_of_the_library(name: str, is_inverse: bool, gpu: FakeCuda) -> None:
    check(CASES[name].make(3, 5), 33, 3, is_inverse, gpu)


@pytest.mark.parametrize(("rows", "blocks", "threads"), [(1, 1, 256), (32, 1, 256), (100, 4, 256), (1000, 32, 32)])
def test_more_rows_have_fewer_warps_each(rows: int, blocks: int, threads: int, gpu: FakeCuda) -> None:
    check(zuko.flows.MAF(5, 3, transforms=2), rows, 3, True, gpu)
    assert gpu.launches[-1] == LaunchConfig(blocks, threads)
    assert len(gpu.compiled) == 1


@pytest.mark.slow
@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("features", [2, 20, 64])
def test_many_features(features: int, is_inverse: bool, gpu: FakeCuda) -> None:
    check(zuko.flows.NSF(features, 4, transforms=2, hidden_features=(50, 50)), 70, 4, is_inverse, gpu, features)


@pytest.mark.slow
def test_the_kernel_under_sanitizers() -> None:
    sanitizer = SANITIZERS["memory and undefined behaviour"]
    if not sanitizer.paths():
        pytest.skip("the compiler has no such sanitizer")
    environment = {
        "LD_PRELOAD": " ".join(sanitizer.paths()), "EMULATOR_FLAGS": "-g1 " + " ".join(sanitizer.flags),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }  # fmt: skip
    command = (sys.executable, "-m", "pytest", "-q", __file__, "-k", "results or rows")
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_the_kernel_compiles_for_real_devices(architecture: str, tmp_path: Path) -> None:
    """NVRTC and ptxas need no GPU; they are in nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvcc-cu12, 130 MB."""
    nvrtc, nvcc = pytest.importorskip("cuda.bindings.nvrtc"), pytest.importorskip("nvidia.cuda_nvcc")
    options = ("-std=c++17", f"-arch=compute_{architecture}", "-default-device", f"-I{compiler.SOURCES}")
    source = (compiler.SOURCES / "chain.cu").read_bytes()
    _, program = nvrtc.nvrtcCreateProgram(source, b"chain.cu", 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    _, size = nvrtc.nvrtcGetPTXSize(program)
    ptx = bytes(size)
    nvrtc.nvrtcGetPTX(program, ptx)
    (tmp_path / "chain.ptx").write_bytes(ptx.rstrip(b"\0"))
    ptxas = Path(nvcc.__path__[0], "bin", "ptxas")
    command = (ptxas, "-v", f"-arch=sm_{architecture}", tmp_path / "chain.ptx", "-o", tmp_path / "chain.cubin")
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spills = re.findall(r"Used (\d+) registers", text), re.findall(r"(\d+) bytes spill", text)
    assert max(map(int, registers)) <= 128 and max(map(int, spills)) <= 200, text


def test_a_stored_kernel_is_not_compiled_again(gpu: FakeCuda) -> None:
    for _ in range(2):
        cuda._load_kernel.cache_clear()
        check(zuko.flows.MAF(5, transforms=1), 2, 0, True, gpu)
    assert len(gpu.compiled) == 1


def test_strides_one_context_new_weights_and_rows_that_fail(gpu: FakeCuda) -> None:
    flow = zuko.flows.NSF(5, 4, transforms=2)
    x, context = normal(40, 7)[:, 1:6], normal(1, 4)[0]
    x[3, 2] = torch.nan
    with torch.no_grad(), jf.accelerate(flow, cuda=True) as handle:
        for _ in range(2):
            ours = flow(context).transform.inv(x)
            assert set(handle.backends.values()) == {"cuda"}
            handle.restore()
            torch.testing.assert_close(ours, flow(context).transform.inv(x), rtol=1e-4, atol=1e-4, equal_nan=True)
            handle = jf.accelerate(flow, cuda=True)
            for parameter in flow.parameters():
                parameter.data.mul_(1.1)  # leaves the version of the parameter as it is


def test_what_the_kernel_does_not_take_is_left_to_the_library(gpu: FakeCuda) -> None:
    flow = zuko.flows.MAF(5, transforms=1)
    for change in (torch.Tensor.double, lambda x: x[:0], lambda x: x.clone().requires_grad_()):
        x = change(normal(4, 5))
        with jf.accelerate(flow.to(x.dtype), cuda=True):
            assert flow().transform.inv(x).shape == x.shape
    assert not gpu.launches


def test_a_wrong_first_result_ends_the_use_of_the_kernel(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = zuko.flows.MAF(5, transforms=1), normal(4, 5)
    expected = flow().transform.inv(x)
    handle = jf.accelerate(flow, cuda=True)
    assert "never run on a GPU by us" in str(handle)
    monkeypatch.setattr(FakeCuda, "launch", lambda self, *_: None)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # no row fails, and all values are NaN
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(flow().transform.inv(x), expected)
    assert "differed from the library's own" in str(handle)


def test_cuda_without_its_packages_is_refused() -> None:
    if cuda.is_installed():
        pytest.skip("they are installed")
    with pytest.raises(ValueError, match=r"jacobiflow\[cuda\]"):
        jf.accelerate(zuko.flows.MAF(3), cuda=True)


@pytest.mark.parametrize("rows", [1, 33, 10_000])
def test_the_grid_fits_the_device(rows: int) -> None:
    blocks, warps = choose_grid(rows, 132 * 16)
    assert 1 <= warps <= 8 and blocks * warps <= max(132 * 16, warps) and blocks <= -(-rows // 32)
