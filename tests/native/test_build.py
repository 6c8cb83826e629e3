"""Compiling, keeping and loading the native library."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import platform
import pwd
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compilers import copying_compiler
from native_problems import CASES, relative_error
from running import ends_within

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.native import build, compiler


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
    """A machine where nothing was compiled yet, whose compiler gives the same library each time, at once."""

    home: Path
    calls: Path

    def compiled(self) -> int:
        return len(self.calls.read_text().split()) if self.calls.exists() else 0

    def kept(self) -> list[Path]:
        folder = self.home / "jacobiflow/native"
        return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []

    def restart(self) -> ctypes.CDLL | None:
        """What a new process finds."""
        build._loaded.cache_clear()
        return native.library()


@pytest.fixture
def machine(tmp_path: Path, binary: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    calls = tmp_path / "calls"
    before = f"echo compiled >> {shlex.quote(str(calls))}; sleep 0.2"
    monkeypatch.setenv("CXX", str(copying_compiler(tmp_path / "compiler", binary, before)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    # The other tests keep the library that they have loaded.
    monkeypatch.setattr(build, "_loaded", functools.cache(build._loaded.__wrapped__))
    return Machine(tmp_path / "home", calls)


def test_compiles_once_and_keeps_it_for_this_user_alone(machine: Machine) -> None:
    umask = os.umask(0o002)
    try:
        assert machine.restart() is not None
    finally:
        os.umask(umask)
    (path,) = machine.kept()
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    assert machine.restart() is not None and machine.compiled() == 1
    assert native.describe().startswith("compiled for ")


def test_once_compiled_it_needs_no_compiler(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image that was built with a compiler, and is run without one."""
    machine.restart()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert machine.restart() is not None and machine.compiled() == 1
    name, (path,) = native.library_name(), machine.kept()
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
    assert machine.restart() is not None and machine.compiled() == 0 and machine.kept() == []
    assert native.library_name() == shipped.name
    assert native.describe().endswith(", in the wheel")


def test_the_library_of_a_wheel_suits_the_processor(machine: Machine, shipped: Path) -> None:
    machine.restart()
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    best = compiler.best(shipped.parent, platform.machine(), flags)
    assert best is not None and native.library_name() == best.name


@pytest.mark.parametrize("fault", ["not for this system", "of other sources"])
def test_a_library_of_a_wheel_that_is_of_no_use(fault: str, machine: Machine, shipped: Path) -> None:
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


@pytest.mark.skipif(platform.system() != "Linux", reason="the file is Linux's")
def test_another_processor_compiles_its_own(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another clock rate makes no other processor."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(build, "_CPU", path)
    lines = ("model\t: 85\ncpu MHz\t: 2000", "model\t: 85\ncpu MHz\t: 3000", "model\t: 86", "model\t: 85\nflags\t: fma")
    for line, compiled in zip(lines, (1, 1, 2, 3), strict=True):
        path.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n")
        assert machine.restart() is not None and machine.compiled() == compiled == len(machine.kept())


@pytest.mark.parametrize("name", build.STRUCTURES)
def test_a_structure_of_another_size_is_a_fault(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Larger(build.STRUCTURES[name]):  # type: ignore[misc]
        _fields_ = (("more", ctypes.c_void_p),)

    monkeypatch.setitem(build.STRUCTURES, name, Larger)
    with pytest.raises(RuntimeError, match=r"Larger is of \d+ bytes here, and of \d+ in C\+\+"):
        machine.restart()


@pytest.mark.parametrize("damage", ["truncated", "random", "empty", "one bit"])
def test_a_damaged_library_is_compiled_anew(damage: str, machine: Machine) -> None:
    machine.restart()
    (path,) = machine.kept()
    content = path.read_bytes()
    flipped = bytes([content[len(content) // 2] ^ 1])
    bad = {
        "truncated": content[: len(content) // 3],
        "random": os.urandom(len(content)),
        "empty": b"",
        "one bit": content[: len(content) // 2] + flipped + content[len(content) // 2 + 1 :],
    }[damage]
    path.unlink()  # it is mapped in this process
    path.write_bytes(bad)
    path.chmod(0o600)
    assert machine.restart() is not None and machine.compiled() == 2
    assert [path.read_bytes() for path in machine.kept()] == [content]


def test_a_whole_file_that_is_no_library_is_not_fatal(machine: Machine) -> None:
    """As where the system's own libraries are older than those of the machine that compiled it."""
    machine.restart()
    (path,) = machine.kept()
    foreign = build._path(path.parent, path.name.rpartition("-")[0], b"not for this system")
    foreign.write_bytes(b"not for this system")
    foreign.chmod(0o600)
    path.unlink()
    assert machine.restart() is not None and machine.compiled() == 2


def test_a_pipe_in_the_place_of_a_library_is_not_waited_for(machine: Machine) -> None:
    machine.restart()
    (path,) = machine.kept()
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path, 0o600)
    with ends_within(60):
        assert machine.restart() is not None and machine.compiled() == 2
    assert [path.read_bytes() for path in machine.kept()] == [content]


def test_what_others_can_write_to_is_not_used(machine: Machine) -> None:
    machine.restart()
    (path,) = machine.kept()
    path.chmod(0o666)
    assert machine.restart() is not None and machine.compiled() == 2
    assert [kept.stat().st_mode & 0o077 for kept in machine.kept()] == [0]
    path.parent.chmod(0o777)
    content = path.read_bytes()
    assert machine.restart() is not None and machine.compiled() == 3
    assert [kept.read_bytes() for kept in machine.kept()] == [content]


def test_a_folder_that_cannot_be_written_to(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.restart()
    (path,) = machine.kept()
    path.unlink()
    path.mkdir()  # in the way of the library, also for an administrator
    assert machine.restart() is not None and machine.kept() == []
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert machine.restart() is not None and machine.compiled() == 3


def test_a_user_without_a_home(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert machine.restart() is not None and machine.compiled() == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_processes_that_compile_at_the_same_time(machine: Machine) -> None:
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)

    def work() -> None:
        start.wait(30)
        if machine.restart() is None:
            sys.exit(native.describe())

    processes = [fork.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0] and machine.compiled() == 3
    assert len(machine.kept()) == 1
    assert machine.restart() is not None and machine.compiled() == 3


def failing(tmp_path: Path, text: str) -> str:
    compiler = tmp_path / "failing"
    compiler.write_text(f"#!/bin/sh\nprintf '{text}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.parametrize("why", ["no compiler", "it fails", "it is none"])
def test_without_a_compiler_pytorch_solves(
    why: str, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"no compiler": "no C++ compiler found", "it fails": "no room: \ufffd left", "it is none": "Exec format"}[
        why
    ]
    if why == "no compiler":
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", str(tmp_path))
    elif why == "it fails":
        monkeypatch.setenv("CXX", failing(tmp_path, r"no room: \377 left\nand much more\n"))
    else:
        (tmp_path / "text").write_bytes(b"\x7fELF, not")
        (tmp_path / "text").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "text"))
    assert machine.restart() is None
    line = native.describe()
    assert line.startswith("none: ") and said in line and "install a C++ compiler, or name it in CXX" in line
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
