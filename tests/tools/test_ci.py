"""CI fails, and names the cause, if a tool is missing or a test is skipped that is not on the list."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ROOT

SKIPS = """import pytest
@pytest.mark.parametrize("reason", ["listed", "another"])
def test_a(reason):
    pytest.skip(f"this is {reason} here")
"""
BASH = shutil.which("bash")


@pytest.mark.skipif(BASH is None, reason="no bash is installed")
@pytest.mark.parametrize("missing", ["c++", "chromium", "clang++", "aarch64-linux-gnu-g++", "qemu-aarch64"])
def test_a_tool_that_cannot_be_installed_is_named(missing: str, tmp_path: Path) -> None:
    tools = {"c++", "chromium", "clang++", "aarch64-linux-gnu-g++", "qemu-aarch64", "make", "apt-get"} - {missing}
    for name in tools:
        (tmp_path / name).write_text(f"#!{BASH}\nexit {100 * (name == 'apt-get')}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(str(shutil.which("dirname")))
    line = [str(BASH), str(ROOT / ".ci/run")]
    done = subprocess.run(line, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, f"the tests need {missing}, and the package " in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize(("only_allowed", "code"), [("", 0), ("1", 1)])
def test_a_skip_that_is_not_on_the_list_fails_ci_only(only_allowed: str, code: int, tmp_path: Path) -> None:
    shutil.copyfile(ROOT / "tests/conftest.py", tmp_path / "conftest.py")
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "allowed_skips.txt").write_text("# comment\ntest_skips.py::test_a: listed here\n")
    line = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "xdist", "-n", "1", "--rootdir", ".", "."]
    environment = os.environ | {"JACOBIFLOW_ONLY_ALLOWED_SKIPS": only_allowed, "JACOBIFLOW_NATIVE": "0"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("test_skips.py::test_a[another]: this is another here\n" in done.stdout) == (code == 1)
    assert "test_skips.py::test_a[listed]: " not in done.stdout
    assert "this is listed here" in done.stdout
