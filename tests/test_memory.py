"""The memory setting of a process: the command line makes it, and the library leaves it alone."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of Linux")
def test_only_the_command_line_changes_how_the_process_allocates() -> None:
    script = """
        import ctypes
        calls = []
        class Watched(ctypes.CDLL):
            def __getattr__(self, name):
                calls.append(name) if name == "mallopt" else None
                return super().__getattr__(name)
        ctypes.CDLL = Watched
        import torch, zuko
        import jacobiflow as jf
        for name in ("digits-p1", "digits-maf"):
            flow = jf.load(name)
            for strategy in ("sequential", "jacobi-1"):
                images = jf.sample(flow, 1, strategy=strategy).images
            flow.log_prob(images)
        flow = zuko.flows.MAF(8)
        with torch.no_grad(), jf.accelerate(flow) as done:
            flow().sample()
        assert done.passes and not calls
        from jacobiflow.cli import main
        main(["info", "--model", "digits-p1"])
        assert calls
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
