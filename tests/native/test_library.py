"""Compiling, storing and loading the native library."""

from __future__ import annotations

import ctypes
import functools
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from jacobiflow import native
from jacobiflow.native import compiler, library
from jacobiflow.native.boundary import ChainArgs, GradientArgs
from jacobiflow.native.library import Library
from tests.helpers.native_problems import copying_compiler


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

    def restart(self) -> Library | None:
        """The library of a new process."""
        library._load_or_explain.cache_clear()
        return native.load_library()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    loaded, calls = native.load_library(), tmp_path / "calls"
    assert loaded is not None
    on_link = f"echo compiled >> {shlex.quote(str(calls))}"
    monkeypatch.setenv("CXX", str(copying_compiler(tmp_path / "compiler", loaded.path, on_link)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    # The other tests keep the library that they have loaded.
    monkeypatch.setattr(library, "_load_or_explain", functools.cache(library._load_or_explain.__wrapped__))
    return Machine(tmp_path / "home", calls)


def test_compiles_once_into_a_folder_of_this_user_alone(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second process needs no compiler: an image may be built with one, and run without it."""
    assert machine.restart() is not None
    notice = "jacobiflow compiles its native code once; that takes up to a minute"
    (path,) = machine.stored()
    assert path.parent.stat().st_mode & 0o077 == 0
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert machine.restart() is not None and machine.compiled() == 1
    assert caplog.messages == [notice]
    assert native.library_name() == path.name
    assert native.describe().startswith("compiled for ")


def test_the_library_of_a_wheel_needs_no_compiler(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "SHIPPED", tmp_path)
    monkeypatch.setattr(library, "_CPU", tmp_path / "no such file")
    *_, every_processor_can_run_it = compiler.compile_targets(tmp_path)
    machine.calls.unlink()
    assert machine.restart() is not None and machine.compiled() == 0 and machine.stored() == []
    assert native.library_name() == every_processor_can_run_it.name
    assert native.describe().endswith(", in the wheel")


def test_a_processor_with_other_instructions_compiles_its_own(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another clock rate, or another order, makes no other processor."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(library, "_CPU", path)
    for lines, compiled in (("MHz\t: 2000\nflags\t: fma avx", 1), ("flags\t: avx fma", 1), ("flags\t: fma", 2)):
        path.write_text(f"processor\t: 0\n{lines}\n\nprocessor\t: 1\n")
        assert machine.restart() is not None and machine.compiled() == compiled == len(machine.stored())


def test_a_file_that_the_system_cannot_load_is_replaced(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the system's own libraries are older than those of the machine that compiled it."""
    machine.restart()
    (path,), load = machine.stored(), library.Library

    def refuse(path: Path) -> Library:
        monkeypatch.setattr(library, "Library", load)
        raise OSError(f"{path}: GLIBC not found")

    monkeypatch.setattr(library, "Library", refuse)
    assert machine.restart() is not None and machine.compiled() == 2
    assert machine.stored() == [path]


def test_a_file_that_is_not_what_was_stored_is_replaced(machine: Machine) -> None:
    """Loading one that was cut short would end the process with SIGBUS."""
    machine.restart()
    (path,) = machine.stored()
    content = path.read_bytes()
    for compiled, changed in enumerate((content + b"more", content[: len(content) // 2]), start=2):
        path.unlink()  # the loaded file itself must stay whole
        path.write_bytes(changed)
        assert machine.restart() is not None and machine.compiled() == compiled
        assert path.read_bytes() == content


def test_a_folder_that_others_can_write_to_is_not_used(machine: Machine) -> None:
    machine.restart()
    (path,) = machine.stored()
    path.parent.chmod(0o777)
    content = path.read_bytes()
    assert machine.restart() is not None and machine.compiled() == 2
    assert path.read_bytes() == content


def test_a_compiler_that_is_missing_or_fails_is_named(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nprintf 'no room: \\377 left\\nand much more\\n' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for command, reason in (("", "no C++ compiler found"), (str(failing), "no room: \ufffd left")):
        monkeypatch.setenv("CXX", command)
        assert machine.restart() is None
        remedy = "install a C++ compiler, or name it in CXX, for faster exact loops"
        assert native.describe() == f"none: {reason}; {remedy}"


def test_the_environment_turns_it_off_at_any_time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JACOBIFLOW_NATIVE", "0")
    assert machine.restart() is None and machine.compiled() == 0
    assert native.describe() == "off, by JACOBIFLOW_NATIVE=0"
    monkeypatch.setenv("JACOBIFLOW_NATIVE", "1")
    assert native.load_library() is not None


def test_a_call_without_enough_threads_is_made_again_with_one() -> None:
    chain = ChainArgs()
    for arguments in (chain, GradientArgs(ctypes.addressof(chain))):
        chain.num_threads = 8
        assert Library._call(lambda *_: 5 if chain.num_threads == 1 else -1, arguments, torch.float32) == 5
