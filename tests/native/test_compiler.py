"""The choice between the libraries of a wheel; and the sources under other compilers and for other processors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from jacobiflow.native import compiler

HARNESS = Path(__file__).parent / "harness.cpp"
AVX2 = {"sse2", "avx", "avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "amx_tile"}
# The compiler, and the command that runs what it makes.
OTHERS = {
    "Clang": (("clang++",), ()),
    "AArch64": (("aarch64-linux-gnu-g++",), ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The libraries of a wheel for every machine."""
    for targets in compiler.TARGETS.values():
        for name in targets:
            compiler._path(tmp_path, name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("machine", "instructions", "name"),
    [
        ("x86_64", AVX512, "avx512"),
        ("x86_64", AVX512 - {"avx512vl"}, "avx2"),  # as on Knights Landing
        ("x86_64", AVX2 - {"fma"}, "sse2"),
        ("aarch64", set(), "neon"),
    ],
)
def test_the_best_library_that_a_processor_can_run(
    machine: str, instructions: set[str], name: str, folder: Path
) -> None:
    path = compiler.find_compiled(folder, machine, instructions)
    assert path is not None and path.name.startswith(f"{name}-")


def test_a_library_of_other_sources_is_not_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same, other = (shutil.copytree(compiler.SOURCES, tmp_path / name) for name in ("same", "other"))
    (other / "threads.h").write_text((other / "threads.h").read_text() + "\n")
    assert compiler.find_compiled(folder, "riscv64", AVX512) is None
    monkeypatch.setattr(compiler, "SOURCES", same)
    assert compiler.find_compiled(folder, "x86_64", AVX512) is not None
    monkeypatch.setattr(compiler, "SOURCES", other)
    assert compiler.find_compiled(folder, "x86_64", AVX512) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_sources_pass_under(name: str, tmp_path: Path) -> None:
    (compile_command, run_command), program = OTHERS[name], tmp_path / "harness"
    missing = [command for command in (*compile_command, *run_command[:1]) if shutil.which(command) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here")
    for source in compiler.SOURCES.glob("*.cpp"):
        assert f'#include "{source.name}"' in HARNESS.read_text()
    flags = (*compiler.FLAGS, "-O0", f"-I{compiler.SOURCES}")
    subprocess.run((*compile_command, *flags, HARNESS, "-o", program), check=True, timeout=300)
    result = subprocess.run((*run_command, program), capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (0, "OK\n"), result.stdout + result.stderr
