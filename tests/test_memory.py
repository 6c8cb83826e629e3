"""The memory setting of a process, which the command line makes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jacobiflow import memory
from jacobiflow.cli import main


def test_the_command_line_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict[int, int]()
    library = SimpleNamespace(mallopt=settings.__setitem__)
    with monkeypatch.context() as patch:
        patch.setattr(memory.ctypes, "CDLL", lambda name: library)
        memory.keep_freed_memory()
    assert settings == {-1: 2**31 - 1, -3: 2**25}
    calls = list[str]()
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: calls.append("called"))
    main(["info", "--model", "digits-p1"])
    assert calls == ["called"]
