"""Settings that all tests share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from jacobiflow import native

ONLY_ALLOWED = "JACOBIFLOW_ONLY_ALLOWED_SKIPS"  # Environment variable; 1 makes other skips a failure, as in .ci/run.

# `make test` draws few examples, and `make test-slow` many.
settings.register_profile("short", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("long", settings.get_profile("short"), max_examples=200)
settings.load_profile("short")


def pytest_configure(config: pytest.Config) -> None:
    """Compiles the native library before the workers start; pytest's cache keeps it for the next run."""
    home = config.cache.mkdir("home")  # type: ignore[union-attr]
    (home / "jacobiflow").mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(home)
    native.load_library()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run if a test is skipped that CI does not allow."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get(ONLY_ALLOWED) == "1" and reporter is not None and any(_unexpected_skips(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unexpected_skips(reporter: pytest.TerminalReporter) -> Iterator[str]:
    """Yields a line for each skipped test that the list does not have."""
    lines = (Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()
    allowed = [line.partition(": ")[::2] for line in lines if not line.startswith("#")]
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(report.nodeid.startswith(test) and part in reason for test, part in allowed):
            yield f"{report.nodeid}: {reason}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the skipped tests that CI would not allow, and the ten slowest files."""
    unexpected = list(_unexpected_skips(terminalreporter)) if os.environ.get(ONLY_ALLOWED) == "1" else []
    if unexpected:
        terminalreporter.section("skipped, but not in tests/allowed_skips.txt")
        terminalreporter.write("".join(f"{line}\n" for line in unexpected))
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration  # type: ignore[assignment]
    terminalreporter.section("slowest files")
    for name, each in seconds.most_common(10):
        terminalreporter.write_line(f"{each:7.1f} s  {name}")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans and other files that are kept between runs go to a folder of this session, except the native library."""
    home, compiled = tmp_path_factory.mktemp("cache"), Path(os.environ["XDG_CACHE_HOME"], "jacobiflow", "native")
    (home / "jacobiflow").mkdir()
    if compiled.exists():
        (home / "jacobiflow" / "native").symlink_to(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setattr(os, "fsync", lambda file: None)  # Thousands of files, which no power failure threatens.
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread: faster for the tiny float64 flows, and the same rounding on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
