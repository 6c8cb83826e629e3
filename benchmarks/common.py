"""Parts that the benchmarks share: folders, latents, random flows, and result files that are completed step by step."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks import sources
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import draw_latents
from jacobiflow.native import SWITCH
from jacobiflow.utils.files import write_json
from jacobiflow.utils.timing import Timing, describe_machine, time_interleaved

ROOT = sources.ROOT
RESULTS, FIGURES = ROOT / "docs" / "results", ROOT / "docs" / "figures"
MODELS = ROOT / "src" / "jacobiflow" / "bundled"
IN_PYTORCH = "sequential, in PyTorch"

Json = dict[str, Any]


def parser(description: str | None) -> ArgumentParser:
    """Makes a parser that shows the docstring of a script as its help."""
    return ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)


def latents(flow: Flow, batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and labels of a batch, the same each time."""
    z = draw_latents(batch, flow.config.num_tokens, flow.config.token_channels, seed)
    return z, torch.arange(batch) % max(flow.config.num_classes, 1)


def random_flow(config: jf.TarFlowConfig | jf.TokenConfig) -> jf.TarFlow:
    """A flow with random weights. The last layers, zero in a new flow, are small enough that nothing grows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = jf.TarFlow(config).eval().requires_grad_(False)
        for block in flow.blocks:
            block.proj_out.weight.normal_(std=0.1 * block.proj_out.in_features**-0.5)
    return flow


@contextmanager
def without_native() -> Iterator[None]:
    """Runs exact loops in PyTorch until the block ends; also decorates a function."""
    with patch.dict(os.environ, {SWITCH: "0"}):
        yield


@contextmanager
def temporary_folder() -> Iterator[None]:
    """Runs in a folder that is removed when the block ends."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def to_json(timings: Mapping[str, Timing]) -> Json:
    return {name: vars(timing) for name, timing in timings.items()}


def time_speed_up(runs: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[Json, Json]:
    """Times "library" and "accelerated" in turn; returns the metrics, and the results of both."""
    timings, results = time_interleaved(runs, rounds)
    ratio = timings["library"].median / timings["accelerated"].median
    return {"rounds": rounds, "seconds": to_json(timings), "speed_up": ratio}, results


def origin(measure: Callable[..., Any]) -> Json:
    """The command and the machine of a benchmark, the commit, and the digest of the code that it measures."""
    module = module_of(measure)
    command = {"command": f"python -m {module}", "machine": describe_machine()}
    return command | {"commit": sources.find_commit(), "code": sources.code_digest(module)}


def module_of(function: Callable[..., Any]) -> str:
    """The module of a function, by its name even if it runs as a script."""
    name = function.func.__module__ if isinstance(function, partial) else function.__module__
    return sys.modules["__main__"].__spec__.name if name == "__main__" else name  # type: ignore[union-attr]


def read(out: Path, head: Json) -> Json:
    """Reads a result file to go on with; `head`, its `origin`, if there is none, or one of other code.

    Raises:
        SystemExit: If the file is of another machine, whose figures must not stand beside those of this one.
    """
    old: Json = json.loads(out.read_text()) if out.exists() else head
    check_machine(out, old, head)
    return old if old.get("code") == head["code"] else head


def check_machine(out: Path, old: Json, head: Json) -> None:
    if old["machine"] != head["machine"]:
        raise SystemExit(
            f"{out} is of {old['machine']}, and this machine is {head['machine']}: remove the file to measure all of it"
        )


def complete(
    out: Path, keys: Iterable[Json], measure: Callable[[Json], Json], show: Callable[[Json], None] = print
) -> Json:
    """Measures each key of which the result file has no row of the present code, and writes after each row.

    A row is the key, what was measured, the commit, and the digest of the code. Rows of other keys are dropped.

    Returns:
        The content of the file.

    Raises:
        SystemExit: If the file is of another machine.
    """
    head, keys = origin(measure), [*keys]
    result = {name: head[name] for name in ("command", "machine")}
    code = {name: head[name] for name in ("commit", "code")}
    old: Json = json.loads(out.read_text()) if out.exists() else result
    check_machine(out, old, head)
    rows: list[Json] = [next((run for run in old.get("runs", []) if key.items() <= run.items()), {}) for key in keys]
    out.parent.mkdir(parents=True, exist_ok=True)
    for i, key in enumerate(keys):
        if rows[i].get("code") != code["code"]:
            rows[i] = key | measure(key) | code
            write_json(out, result | {"runs": [row for row in rows if row]})
            show(rows[i])
    return result | {"runs": rows}
