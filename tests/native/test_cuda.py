"""The kernel for GPUs as C++ on a CPU, against the libraries in float64, and its launch by a stand-in for cuda.core."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

PROCESSORS = 2
FLOWS = [  # All but polynomials. Only some are tests of `make test`.
    name if name in ("zuko MAF", "zuko NSF", "nflows coupling") else pytest.param(name, marks=pytest.mark.slow)
    for name in NATIVE
    if name not in ("zuko BPF", "zuko SOSPF")
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulator") / "emulator.so"
    flags = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=fast", f"-I{compiler.SOURCES}")
    flags += tuple(os.environ.get("EMULATOR_FLAGS", "").split())
    subprocess.run((compiler.find_compiler(), *flags, Path(__file__).parent / "emulate.cpp", "-o", path), check=True)
    return path


@pytest.fixture
def gpu(emulator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """All rows are on a GPU, whose new memory has NaN in it, and whose kernel the model of costs prefers."""
    fake = FakeCuda(emulator)
    nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 12, 9))

    def run(command: tuple[str, ...], **_: Any) -> None:
        monkeypatch.setattr(sys, "argv", [*command[2:]])
        cuda.main()

    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(core=fake))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=nvrtc))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("jacobiflow.adapters.discovery.is_installed", lambda: True)
    monkeypatch.setattr(cuda, "subprocess", SimpleNamespace(run=run, SubprocessError=subprocess.SubprocessError))
    monkeypatch.setattr(cuda, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda, "estimate_seconds", lambda *_: (1.0, 0.0))
    monkeypatch.setattr(torch.cuda, "device", fake.use_device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    properties = SimpleNamespace(multi_processor_count=PROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: _filled(torch.zeros(*size, **options)))
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *size, **options: _filled(x.new_zeros(*size, **options)))
    cuda.load_kernel.cache_clear()
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
@pytest.mark.parametrize("name", FLOWS)
def test_results_are_those_of_the_library(name: str, is_inverse: bool, gpu: FakeCuda) -> None:
    check(CASES[name].make(3, 5), 33, 3, is_inverse, gpu)


@pytest.mark.parametrize(
    ("rows", "blocks", "threads"),
    [(1, 1, 256), (31, 1, 256), (32, 1, 256), (33, 2, 256), (100, 4, 256), (1000, 32, 32)],
)
def test_more_rows_have_fewer_warps_each(rows: int, blocks: int, threads: int, gpu: FakeCuda) -> None:
    check(zuko.flows.MAF(5, 3, transforms=1, hidden_features=(8, 8)), rows, 3, True, gpu)
    assert gpu.launches[-1] == LaunchConfig(blocks, threads)
    assert len(gpu.compiled) == 1


@pytest.mark.slow
@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("features", [2, 20, 64])
def test_many_features(features: int, is_inverse: bool, gpu: FakeCuda) -> None:
    check(zuko.flows.NSF(features, 4, transforms=2, hidden_features=(50, 50)), 33, 4, is_inverse, gpu, features)


@pytest.mark.slow
def test_the_kernel_under_sanitizers() -> None:
    sanitizer = SANITIZERS["memory and undefined behaviour"]
    if not sanitizer.paths():
        pytest.skip("the compiler has no such sanitizer")
    environment = {
        "LD_PRELOAD": " ".join(sanitizer.paths()), "EMULATOR_FLAGS": "-g1 " + " ".join(sanitizer.flags),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }  # fmt: skip
    command = (sys.executable, "-m", "pytest", "-q", __file__, "-m", "not slow", "-k", "(results or rows) and not 1000")
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel by NVIDIA's compiler, which needs no GPU, with the sizes of boundary.py."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    options = ("-std=c++17", "-arch=compute_80", "-default-device", f"-I{compiler.SOURCES}")
    sizes = "\n".join(line for line in compiler._layout_assertions().splitlines() if "sizeof" in line)
    source = f"{(compiler.SOURCES / 'chain.cu').read_text()}\n{sizes}".encode()
    _, program = nvrtc.nvrtcCreateProgram(source, b"chain.cu", 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytes(size)
    nvrtc.nvrtcGetPTX(program, text)
    path = tmp_path_factory.mktemp("ptx") / "chain.ptx"
    path.write_bytes(text.rstrip(b"\0"))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_the_kernel_fits_the_registers_of_a_device(architecture: str, ptx: Path) -> None:
    nvcc = pytest.importorskip("nvidia.cuda_nvcc")
    ptxas = Path(nvcc.__path__[0], "bin", "ptxas")
    command = (ptxas, "-v", f"-arch=sm_{architecture}", ptx, "-o", ptx.with_suffix(f".{architecture}.cubin"))
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spills = re.findall(r"Used (\d+) registers", text), re.findall(r"(\d+) bytes spill", text)
    assert max(map(int, registers)) <= 128 and max(map(int, spills)) <= 200, text


def test_a_stored_kernel_is_not_compiled_again(gpu: FakeCuda) -> None:
    for _ in range(2):
        cuda.load_kernel.cache_clear()
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


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": torch.Tensor.double,
    "no rows": lambda x: x[:0],
    "gradients": lambda x: x.clone().requires_grad_(),
    "not one finite row": lambda x: x * torch.nan,
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_the_kernel_does_not_take_is_left_to_the_library(name: str, gpu: FakeCuda) -> None:
    flow, x = zuko.flows.MAF(5, transforms=1), INPUTS[name](normal(4, 5))
    with jf.accelerate(flow.to(x.dtype), cuda=True) as handle:
        assert flow().transform.inv(x).shape == x.shape
        assert not gpu.launches and "not used" not in str(handle)


def test_polynomials_are_left_to_the_library(gpu: FakeCuda) -> None:
    with torch.no_grad(), jf.accelerate(flow := CASES["zuko BPF"].make(3, 5), cuda=True) as handle:
        values(flow, normal(4, 5), normal(4, 3), is_inverse=False)
        assert not gpu.launches and "not used" not in str(handle)


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "a graph is captured": (torch.cuda, "is_current_stream_capturing", lambda: True),
    "out of memory": (cuda.DevicePlan, "launch", out_of_memory),
    "a slow shape": (cuda, "estimate_seconds", lambda *_: (1.0, 1.0)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_without_the_kernel_the_library_computes(
    name: str, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(*FAULTS[name])
    flow, x = zuko.flows.MAF(5, transforms=1), normal(4, 5)
    expected = flow().transform.inv(x)
    with torch.no_grad(), jf.accelerate(flow, cuda=True):
        torch.testing.assert_close(flow().transform.inv(x), expected)
    assert not gpu.launches


def test_tensors_of_two_devices_are_an_error_of_the_library(gpu: FakeCuda) -> None:
    flow = zuko.flows.MAF(5, 3, transforms=1)
    with torch.no_grad(), jf.accelerate(flow, cuda=True), pytest.raises((RuntimeError, NotImplementedError)):
        flow(torch.zeros(3, device="meta")).transform.inv(normal(4, 5)).tolist()
    assert not gpu.launches


def inputs_as_results(command: tuple[str, ...], are_failed: bool, **_: Any) -> None:
    folder = Path(command[-1])
    *_others, x, _context = torch.load(folder / "request.pt", weights_only=True)
    torch.save([(x, None, torch.full((len(x),), are_failed))], folder / "results.pt")


def ended(command: tuple[str, ...], **_: Any) -> None:
    text = "Traceback:\nRuntimeError: an illegal memory access was encountered\n"
    raise subprocess.CalledProcessError(1, command, stderr=text)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (partial(inputs_as_results, are_failed=False), "differed from the library's own by"),
        (partial(inputs_as_results, are_failed=True), "by inf"),
        (ended, "RuntimeError: an illegal memory access was encountered"),
    ],
)
def test_a_wrong_first_result_ends_the_use_of_the_kernel(
    run: Callable[..., None], reason: str, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, x = zuko.flows.MAF(5, transforms=1), normal(4, 5)
    expected = flow().transform.inv(x)
    handle = jf.accelerate(flow, cuda=True)
    assert "never run on a GPU by us" in str(handle)
    monkeypatch.setattr(cuda.subprocess, "run", run)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(flow().transform.inv(x), expected)
    assert reason in str(handle)
    assert not gpu.launches


@pytest.mark.slow
def test_a_process_without_a_gpu_is_a_reason(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real process: it has no GPU."""
    monkeypatch.setattr(cuda, "subprocess", subprocess)
    flow = zuko.flows.MAF(5, transforms=1)
    with torch.no_grad(), jf.accelerate(flow, cuda=True) as handle:
        flow().transform.inv(normal(4, 5))
        assert re.search(r"not used, since the process for its first results failed: \w+Error: ", str(handle))


def test_cuda_without_its_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacobiflow.adapters.discovery.is_installed", lambda: False)
    flow = zuko.flows.MAF(3)
    with pytest.raises(ValueError, match=r"cuda=True: .*cuda-core\[cu12\]"):
        jf.accelerate(flow, cuda=True)
    monkeypatch.setenv("JACOBIFLOW_CUDA", "1")
    with pytest.raises(ValueError, match=r"JACOBIFLOW_CUDA=1: .*cuda-core\[cu12\]"):
        jf.accelerate(flow)
    assert not jf.accelerate(flow, cuda=False).uses_gpu


def test_the_environment_turns_the_kernel_on(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = zuko.flows.MAF(5, transforms=1)
    assert not jf.accelerate(flow).uses_gpu
    monkeypatch.setenv("JACOBIFLOW_CUDA", "1")
    assert jf.accelerate(flow).uses_gpu


def test_flows_of_a_library_use_the_kernel(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad(), jf.accelerate(zuko, cuda=True) as handle:
        zuko.flows.MAF(5, transforms=1)().transform.inv(normal(4, 5))
        assert gpu.launches and str(handle).endswith("compared with the library's own")
        monkeypatch.setattr(cuda.subprocess, "run", ended)
        flow = zuko.flows.MAF(5, transforms=1)
        flow().transform.inv(normal(4, 5))
        assert "illegal memory access" in str(handle)


@pytest.mark.parametrize("rows", [1, 33, 10_000])
def test_the_grid_fits_the_device(rows: int) -> None:
    blocks, warps = choose_grid(rows, 132 * 16)
    assert 1 <= warps <= 8 and blocks * warps <= max(132 * 16, warps) and blocks <= -(-rows // 32)


def test_the_model_of_costs_prefers_the_kernel_unless_the_work_is_large() -> None:
    def wins(flow: nn.Module, rows: int, is_inverse: bool = True) -> bool:
        chain = jf.accelerate(flow).parts[flow.transform].find_native(is_conditional=False).chain
        library, kernel = cuda.estimate_seconds(chain, is_inverse, rows, processors=132)
        return library > kernel

    small, spline = zuko.flows.MAF(5, hidden_features=(50, 50)), zuko.flows.NSF(20, hidden_features=(50, 50))
    assert all(wins(flow, rows) for flow in (small, spline) for rows in (1, 10_000))
    assert wins(spline, 1, is_inverse=False)
    assert not wins(small, 10_000_000)
    assert not wins(zuko.flows.MAF(784, hidden_features=(1024, 1024)), 1)
