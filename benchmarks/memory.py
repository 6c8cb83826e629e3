"""The memory of a process that measures a large STARFlow of random weights."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import jacobiflow as jf


def random_starflow(config: jf.STARFlowConfig, dtype: str) -> jf.STARFlow:
    """A STARFlow with random weights whose outputs are small. It never has weights of another dtype in memory."""
    with torch.device("meta"):
        flow = jf.STARFlow(config).eval().requires_grad_(False).to(getattr(torch, dtype))
    flow.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, values in flow.state_dict().items():
        values.normal_(std=values.shape[-1] ** -0.5) if values.ndim > 1 else values.fill_("norm.weight" in name)
    flow.var.fill_(1)
    for block in flow.blocks:
        block.final_norm.weight.zero_()
        block.proj_out.weight.mul_(0.3)
    flow.blocks[-1].null_text.mul_(0.1)
    return flow


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process, whose memory has held nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def memory(name: str) -> int:
    """Bytes of this process: all in memory ("VmRSS"), without pages of files ("RssAnon"), or at most ("VmHWM")."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def reset_peak_memory() -> None:
    """Sets the peak, `memory("VmHWM")`, to what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
