"""Compiling, storing and loading the native library."""

from __future__ import annotations

import ctypes
import functools
import platform
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.native import build, compiler
from tests.helpers.compilers import copying_compiler
from tests.helpers.native_problems import CASES, relative_error


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled once."""
    if shutil.which("c++") is None:
        pytest.skip("there is no compiler here")
    path = tmp_path_factory.mktemp("binary") / "recurrences.so"
    native.compile_library(path, ("-O0",))
    return path


@dataclass(frozen=True)
class Machine:
    """A machine without a compiled library, whose compiler gives the same one each time, at once."""

    home: Path
    calls: Path

    def compiled(self) -> int:
        return len(self.calls.read_text().split()) if self.calls.exists() else 0

    def stored(self) -> list[Path]:
        """The files in the cache folder."""
        return [path for path in (self.home / "jacobiflow/native").glob("*") if path.is_file()]

    def restart(self) -> ctypes.CDLL | None:
        """The library of a new process."""
        build._loaded.cache_clear()
        return native.library()


@pytest.fixture
def machine(tmp_path: Path, binary: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    calls = tmp_path / "calls"
    on_link = f"echo compiled >> {shlex.quote(str(calls))}; sleep 0.2"
    monkeypatch.setenv("CXX", str(copying_compiler(tmp_path / "compiler", binary, on_link)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    # The other tests keep the library that they have loaded.
    monkeypatch.setattr(build, "_loaded", functools.cache(build._loaded.__wrapped__))
    return Machine(tmp_path / "home", calls)


def test_compiles_once_into_a_folder_of_this_user_alone(machine: Machine) -> None:
    assert machine.restart() is not None
    (path,) = machine.stored()
    assert path.parent.stat().st_mode & 0o077 == 0
    assert machine.restart() is not None and machine.compiled() == 1
    assert native.describe().startswith("compiled for ")


def test_once_compiled_it_needs_no_compiler(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image that was built with a compiler, and is run without one."""
    machine.restart()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert machine.restart() is not None and machine.compiled() == 1
    name, (path,) = native.library_name(), machine.stored()
    assert name == path.name


@pytest.fixture
def shipped(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a wheel that every processor can run."""
    monkeypatch.setattr(build, "SHIPPED", tmp_path)
    *_, path = compiler.compile_targets(tmp_path)
    machine.calls.unlink()
    return path


def test_the_library_of_a_wheel_needs_no_compiler(
    machine: Machine, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_CPU", shipped.parent / "no such file")
    assert machine.restart() is not None and machine.compiled() == 0 and machine.stored() == []
    assert native.library_name() == shipped.name
    assert native.describe().endswith(", in the wheel")


@pytest.mark.parametrize("fault", ["not for this system", "of other sources"])
def test_a_broken_library_in_a_wheel_is_compiled_anew(fault: str, machine: Machine, shipped: Path) -> None:
    for path in shipped.parent.glob("*.so"):
        if fault == "not for this system":
            path.write_bytes(b"not for this system")
        else:
            path.rename(path.with_name("x" + path.name))
    assert machine.restart() is not None and machine.compiled() == 1
    assert not native.describe().endswith(", in the wheel")


@pytest.mark.skipif(platform.system() != "Linux", reason="the library has OpenMP on Linux only")
def test_the_threads_are_those_of_pytorch() -> None:
    assert torch.backends.openmp.is_available()
    functions: list[int | None] = []
    build._use_threads_of_pytorch(SimpleNamespace(jacobiflow_use_openmp=functions.extend))  # type: ignore[arg-type]
    assert len(functions) == 3 and all(functions)


def test_a_processor_with_other_instructions_compiles_its_own(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another clock rate, or another order, makes no other processor."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(build, "_CPU", path)
    for lines, compiled in (("MHz\t: 2000\nflags\t: fma avx", 1), ("flags\t: avx fma", 1), ("flags\t: fma", 2)):
        path.write_text(f"processor\t: 0\n{lines}\n\nprocessor\t: 1\n")
        assert machine.restart() is not None and machine.compiled() == compiled == len(machine.stored())


def test_a_file_that_is_no_library_is_replaced(machine: Machine) -> None:
    """As if the system's own libraries are older than those of the machine that compiled it."""
    path = machine.home / "jacobiflow/native" / build._name(build._instructions())
    path.parent.mkdir(mode=0o700, parents=True)
    path.write_bytes(b"not for this system")
    assert machine.restart() is not None and machine.compiled() == 1
    assert len(path.read_bytes()) > 1000


def test_a_folder_that_others_can_write_to_is_not_used(machine: Machine) -> None:
    machine.restart()
    (path,) = machine.stored()
    path.parent.chmod(0o777)
    content = path.read_bytes()
    assert machine.restart() is not None and machine.compiled() == 2
    assert path.read_bytes() == content


def failing(tmp_path: Path, text: str) -> str:
    compiler = tmp_path / "failing"
    compiler.write_text(f"#!/bin/sh\nprintf '{text}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.parametrize("why", ["no compiler", "it fails"])
def test_without_a_compiler_pytorch_solves(
    why: str, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"no compiler": "no C++ compiler found", "it fails": "no room: \ufffd left"}
    if why == "no compiler":
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CXX", failing(tmp_path, r"no room: \377 left\nand much more\n"))
    assert machine.restart() is None
    line = native.describe()
    assert line.startswith("none: ") and reasons[why] in line and "install a C++ compiler, or name it in CXX" in line
    assert "\n" not in line
    case = CASES["heads of 32"]
    flow = case.flow()
    block, z, labels = case.block(flow), case.z(flow), case.context()
    assert block.exact_inverse(z, labels) is None
    solution = jf.solve(block, z, jf.Solver(jf.Sequential()), labels)
    assert relative_error(solution.x, case.answer(flow, z)) < 1e-5


def test_the_environment_turns_it_off_at_any_time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JACOBIFLOW_NATIVE", "0")
    assert machine.restart() is None and machine.compiled() == 0
    assert native.describe() == "off, by JACOBIFLOW_NATIVE=0"
    monkeypatch.setenv("JACOBIFLOW_NATIVE", "1")
    assert native.library() is not None
    monkeypatch.setenv("JACOBIFLOW_NATIVE", "0")
    assert native.library() is None


def test_takes_float32_on_a_cpu(machine: Machine) -> None:
    machine.restart()
    assert native.usable(torch.ones(2), torch.nn.Parameter(torch.ones(3))) is native.library()
    subclass = type("Subclass", (torch.Tensor,), {})
    wrapped = torch.nn.Parameter(torch.ones(2).as_subclass(subclass))
    for other in (torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta"), wrapped, wrapped.detach()):
        assert native.usable(torch.ones(2), other) is None
